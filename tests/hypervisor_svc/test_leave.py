# SPDX-License-Identifier: Apache-2.0
"""The drain's clock and its decisions; a list stands for the connections. The drain itself runs in namespaces and VMs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from guest_agent.handoff.presence import Presence
from hypervisor_svc.connection import Guest
from hypervisor_svc.domains import Machine
from hypervisor_svc.guests import Guests
from hypervisor_svc.leave import Late, LeaveError, Left, _check, _drain, meet


class Ends:
    """What became of those that were late; `keeps`: the host can finish them."""

    def __init__(self, *, keeps: bool) -> None:
        self.keeps, self.kept, self.ended = keeps, 0, 0

    def keep(self, connection: object) -> bool:
        self.kept += self.keeps
        return self.keeps

    def end_late(self, connection: object) -> None:
        self.ended += 1


def guest(count: int) -> Guest:
    made = Guest(Machine("vm", "uuid", "/nowhere", None, ()))
    made.hello = {"instance": "one"}
    made.connections = cast(Any, {str(number): object() for number in range(count)})
    return made


def comes_home(machine: Guest) -> None:
    machine.connections.popitem()
    machine.changed()


def drain(machine: Guest, ends: Ends, late: Late, deadline: float, *events: tuple[float, Callable[[], None]]) -> Left:
    """With `events` at so many seconds."""
    left = Left("vm")

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for seconds, event in events:
            loop.call_later(seconds, event)
        async with asyncio.timeout(20):
            await _drain(cast(Guests, ends), machine, left, "one", deadline, late)

    asyncio.run(run())
    return left


def test_the_deadline_counts_from_the_last_that_came_home() -> None:
    """Six in a row, each later than the deadline after the beginning: none is late."""
    machine, ends = guest(6), Ends(keeps=True)
    left = drain(machine, ends, Late.RESET, 0.4, *((0.2 * number, lambda: comes_home(machine)) for number in range(1, 7)))
    assert (left.finished, left.reset, ends.kept, ends.ended) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("late", "keeps", "finished", "reset"),
    [(Late.FINISH, True, 2, 0), (Late.FINISH, False, 0, 2), (Late.RESET, True, 0, 2)],
)
def test_what_is_late(late: Late, keeps: bool, finished: int, reset: int) -> None:
    machine, ends = guest(3), Ends(keeps=keeps)
    left = drain(machine, ends, late, 0.1, (0.05, lambda: comes_home(machine)))
    assert (left.finished, left.reset) == (finished, reset)
    assert (ends.kept, ends.ended) == (finished, reset)


def test_who_waits_waits() -> None:
    machine, ends = guest(1), Ends(keeps=True)
    left = drain(machine, ends, Late.WAIT, 0.01, (0.5, lambda: comes_home(machine)))
    assert (left.finished, left.reset, machine.connections) == (0, 0, {})


def test_nobody_is_out() -> None:
    assert drain(guest(0), Ends(keeps=True), Late.RESET, 0.0).slowest_ms == 0


def _restarted(machine: Guest) -> None:
    machine.hello = {"instance": "two"}


def _gone(machine: Guest) -> None:
    machine.gone = True


def _stays(machine: Guest) -> None:
    machine.answers, machine.presence_message = True, "the share is in use: player (7): /srv/share/film"


@pytest.mark.parametrize(("event", "words"), [(_restarted, "restarted"), (_gone, "stopped"), (_stays, r"player \(7\)")])
def test_what_ends_a_leave(event: Callable[[Guest], None], words: str) -> None:
    machine = guest(1)
    _check(machine, "one")
    event(machine)
    with pytest.raises(LeaveError, match=words):
        _check(machine, "one")


@pytest.mark.parametrize("presence", list(Presence))
@pytest.mark.parametrize("answers", [False, True])
def test_whether_it_stays(presence: Presence, answers: bool) -> None:
    """What it said before it heard the last call means nothing."""
    machine = guest(0)
    machine.presence, machine.answers = presence, answers
    assert machine.stays is (answers and presence in (Presence.HERE, Presence.RETURNING))


def test_meeting_takes_no_longer_than_it_may() -> None:
    with pytest.raises(LeaveError, match="channel down"):
        asyncio.run(meet(guest(0), seconds=0.05))
