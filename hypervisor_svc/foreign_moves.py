# SPDX-License-Identifier: Apache-2.0
"""Migrations that somebody else starts: `virsh migrate`, an orchestrator, an operator at QEMU's monitor.

A VM whose share is mounted cannot migrate: QEMU refuses, and says so. One without a share can: when it begins, its connections are
brought home, for which there is time while memory is copied. `domains.py` hears of it from libvirt, `monitor.py` from QEMU itself
where libvirt does not manage the VM. If it comes to nothing, the VM works with this host again."""

from __future__ import annotations

import asyncio
import logging

from guest_agent.handoff.presence import Presence
from hypervisor_svc import leave
from hypervisor_svc.connection import Guest
from hypervisor_svc.errors import OperatorError
from hypervisor_svc.guests import Guests

log = logging.getLogger("streamlift.moves")


class ForeignMoves:
    """By the VM's UUID."""

    def __init__(self, guests: Guests) -> None:
        self._guests = guests
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def close(self) -> None:
        """Watch no more."""
        for task in self._tasks.values():
            task.cancel()

    def begins(self, uuid: str) -> None:
        """A migration, or whatever else copies the VM's memory. One that we were asked to prepare is none of a stranger's."""
        guest = self._find(uuid)
        if guest is None or uuid in self._tasks or guest.draining or guest.presence is not Presence.HERE:
            return
        log.info("%s: somebody migrates it; its connections are brought home", guest.machine.name)
        self._tasks[uuid] = asyncio.get_running_loop().create_task(self._bring_home(guest))

    async def _bring_home(self, guest: Guest) -> None:
        try:
            left = await leave.leave(self._guests, guest, late=leave.Late.RESET)
        except OperatorError as error:
            log.warning("%s: %s. %s", guest.machine.name, error, error.hint)
        else:
            log.info("%s: %d connections came home in %g ms", guest.machine.name, left["home"], left["drain_ms"])

    def ends(self, uuid: str) -> None:
        """It is over, and the VM is still here."""
        task, guest = self._tasks.pop(uuid, None), self._find(uuid)
        if task is None:
            return
        task.cancel()
        if guest is not None:
            log.info("%s: it has not moved", guest.machine.name)
            self._guests.take_again(guest)
            guest.send({"type": "return"})

    def gone(self, uuid: str) -> None:
        """It has moved, or stopped."""
        task = self._tasks.pop(uuid, None)
        if task is not None:
            task.cancel()

    def _find(self, uuid: str) -> Guest | None:
        return next((guest for guest in self._guests if guest.machine.uuid == uuid), None)
