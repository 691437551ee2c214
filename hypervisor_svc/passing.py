# SPDX-License-Identifier: Apache-2.0
"""A VM moves, and its files that are under way with it: what both hosts do. `pass_on.py` has what one tells the other::

    source        pass_on()     everything that is served stands still; what is offered from now on is parked: untouched, for the
                                next host as well
                  more()        what clients have said since, and what was parked
                  serve_again() the VM stays: all goes on here
                  let_pass()    the VM is gone
    destination   expect()      what is about to come is kept
                  inherit()     the VM runs here: what was kept is taken
                  put_late()    what clients said to the last host goes on the road

No two hosts serve one connection. The source thaws what it passed only if the VM stays. What is inherited once, refused, or over is
not inherited again: a guest that was faster than its row has offered the same to us already."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from guest_agent.handoff.errors import HandoffError
from guest_agent.handoff.recent import Recent
from guest_agent.handoff.state import Host
from guest_agent.handoff.wire import Header
from hypervisor_svc.ask_client import INTERVAL
from hypervisor_svc.connection import Connection, Guest
from hypervisor_svc.ends import REMEMBERED, Ends
from hypervisor_svc.held_packets import HeldPackets
from hypervisor_svc.inject import Injector
from hypervisor_svc.pass_on import Inheritance, Row, read_late, write_late, write_row
from hypervisor_svc.policy import Job

log = logging.getLogger("streamlift.guests")


class Passing:
    """For all VMs. `offer` checks a job, `take` restores its connection, `begin` thaws it (`ask_after`, as in `ask_client.py`);
    `take_over` is all of these for one that was parked, and tells the guest; `serve` sends on what was thawed."""

    def __init__(
        self,
        ends: Ends,
        held: HeldPackets,
        injector: Injector,
        *,
        offer: Callable[[Guest, Job, int], Connection],
        take: Callable[[Connection], None],
        begin: Callable[[Guest, Connection, float], None],
        take_over: Callable[[Guest, Connection], None],
        serve: Callable[[Connection], None],
    ) -> None:
        self._ends, self._held, self._injector = ends, held, injector
        self._offer, self._take, self._begin = offer, take, begin
        self._take_over, self._serve = take_over, serve
        self._inheritance = Inheritance()
        self._refused: Recent[str, None] = Recent(REMEMBERED)
        self.disclaimed: Recent[str, tuple[Header, bytes]] = Recent(REMEMBERED)
        """What a guest is told of those that could not be taken."""

    # The source.

    def pass_on(self, guest: Guest) -> list[Row]:
        """What the host that a VM moves to is told; what it cannot be given stays, and is to be called home."""
        guest.passing = True
        return [row for one in list(guest.connections.values()) if one.state is Host.SERVING and (row := self._ends.pass_on(one))]

    def park(self, connection: Connection) -> None:
        """Offered a moment too late. The guest waits for an answer, and asks the next host for it."""
        connection.guest.passed[connection.token] = connection
        connection.guest.parked.append(write_row(connection, connection.job.snapshot))

    def more(self, guest: Guest) -> dict[str, Any]:
        """What has come since the last time: `late` packets for what was passed on, and more `rows`."""
        self._held.collect()
        rows, guest.parked = guest.parked, []
        return {"late": [packet for connection in guest.passed.values() for packet in write_late(connection)], "rows": rows}

    def serve_again(self, guest: Guest) -> None:
        """What was passed on, and nobody took."""
        guest.passing, guest.parked = False, []
        for connection in list(guest.passed.values()):
            if connection.state is Host.OFFERED:
                del guest.passed[connection.token]
                self._take_over(guest, connection)
            elif self._ends.take_again(connection):
                self._serve(connection)

    def let_pass(self, guest: Guest) -> None:
        """What was passed on, and somebody may have."""
        for connection in list(guest.passed.values()):
            self._ends.let_pass(connection)

    # The destination.

    def expect(self, machine: str, guest: Guest | None, rows: list[object], *, first: bool) -> int:
        """What a VM of this name will bring, beyond what it is known to bring unless these are the first; `guest`: if it is known
        here, from an earlier stay or already again. Raises ValueError."""
        try:
            kept = self._inheritance.keep(machine, rows, first=first)
        except (HandoffError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"what {machine} brings: {error}") from None
        if first and guest is not None and not guest.hears:
            self._forget_stay(guest)
        return kept

    def put_late(self, machine: str, guest: Guest | None, packets: list[object]) -> int:
        """What clients said to the last host; `guest`: if it is here already. How many there are. Raises ValueError."""
        told = [read_late(packet) for packet in packets]
        connections = guest.connections if guest is not None else {}
        for token, segment in told:
            if token in connections:
                self._injector.inject(connections[token].flow, segment)
            else:
                self._inheritance.late(machine, token, segment)
        return len(told)

    def inherit(self, guest: Guest) -> None:
        """It runs here now: what was passed on to us is ours, and what we cannot take is told to those who ask for it."""
        for token in self._inheritance.tokens(guest.machine.name):
            self.inherit_one(guest, token)

    def inherit_one(self, guest: Guest, token: str) -> None:
        """If there is such a one."""
        inherited = self._inheritance.pop(guest.machine.name, token)
        if inherited is None or token in guest.connections or token in self._refused or token in self._ends.over:
            return
        self._forget_stay(guest)
        try:
            connection = self._offer(guest, inherited.job, len(inherited.body))
            connection.sent_before, connection.ready = inherited.sent_before, inherited.ready
            connection.anticipation, connection.finished = inherited.anticipation, inherited.job.count == 0
            self._take(connection)
        except (HandoffError, OSError) as error:
            log.warning("%s: %s goes to the guest: %s", guest.machine.name, token, error)
            self.disclaimed[token] = inherited.home(str(error)), inherited.body
        else:
            guest.counters["inherited"] += 1
            self._begin(guest, connection, INTERVAL)
            for segment in inherited.late:
                self._injector.inject(connection.flow, segment)

    def _forget_stay(self, guest: Guest) -> None:
        """It has been elsewhere since it left."""
        self.let_pass(guest)
        guest.draining = guest.passing = False

    def refused(self, token: str) -> None:
        """The guest goes on with it."""
        self._refused[token] = None
