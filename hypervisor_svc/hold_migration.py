# SPDX-License-Identifier: Apache-2.0
"""QEMU copies memory and does not stop the VM before it may, by what libvirt can change of a migration that goes on.

    begin     from the start the VM may stand still for a millisecond at most (virDomainMigrateSetMaxDowntime): too little for what
              remains, at any speed of a VM that works
    hold      when what remains would go over soon: next to nothing is copied (virDomainMigrateSetMaxSpeed), so in that millisecond
              not even one page would be, and QEMU stops no VM that has a page left to copy
    release   as it was: QEMU stops the VM, copies what remains and is done

QEMU does what it knows of the speed, every tenth of a second (migration/migration.c, migration_update_counters). So the copying
begins as slowly as it is held, until the first limit is known."""

from __future__ import annotations

import contextlib
from typing import Any

import libvirt

HOLD_SPEED = 1
"""MiB a second: in DOWNTIME a quarter of a page."""
DOWNTIME = 1
"""Milliseconds."""
AHEAD = 0.2
"""Seconds of copying before its end: QEMU is told in time."""


class MigrationHold:
    """Of one domain. `bandwidth`: MiB a second at which it is to be copied (0: libvirt's default for it). All may raise
    libvirt.libvirtError."""

    def __init__(self, domain: libvirt.virDomain, bandwidth: int) -> None:
        self._domain = domain
        self._downtime: int = domain.migrateGetMaxDowntime()
        self.usual_speed: int = domain.migrateGetMaxSpeed()
        self._speed = bandwidth or self.usual_speed

    def begin(self) -> None:
        """The migration goes on, at HOLD_SPEED."""
        self._domain.migrateSetMaxDowntime(DOWNTIME)
        self._domain.migrateSetMaxSpeed(self._speed)

    def hold(self) -> None:
        """See above."""
        self._domain.migrateSetMaxSpeed(HOLD_SPEED)

    def release(self) -> None:
        """The opposite of both."""
        self._domain.migrateSetMaxDowntime(self._downtime)
        self._domain.migrateSetMaxSpeed(self._speed)

    def forget(self) -> None:
        """The VM has not moved. libvirt remembers how fast its next migration may be; the rest it resets by itself."""
        with contextlib.suppress(libvirt.libvirtError):
            self._domain.migrateSetMaxSpeed(self.usual_speed)


def copies(stats: dict[str, Any]) -> bool:
    """Whether the copying has begun; of virDomainGetJobStats."""
    return bool(stats.get("data_total"))


def nears_end(stats: dict[str, Any]) -> bool:
    """Whether it is time to hold."""
    return copies(stats) and bool(stats.get("data_remaining", 0) <= AHEAD * stats.get("memory_bps", 0))
