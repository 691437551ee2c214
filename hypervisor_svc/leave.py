# SPDX-License-Identifier: Apache-2.0
"""A VM leaves this host, and comes back: the host's half (`guest_agent/leave.py` is the other).

    let_go       applications let go of their files, the agent unmounts the share; what is out stays out, and more is taken
    leave        announce; nothing more is taken; relays end where they stand, files at a byte boundary, and all connections go
                 home, or to the host that the VM moves to (`pass_on.py`); what is late is finished here, reset, or waited for;
                 the agent unmounts the share, if it has not yet, and says that it is away
    come_back    the agent mounts the share, and connections are handed out again

Whatever goes wrong on the way, the VM comes back. The deadline counts from the last connection that came home: a guest that needs
long for many loses none."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from guest_agent.handoff.presence import Presence
from hypervisor_svc.connection import Connection, Guest
from hypervisor_svc.control import ControlError
from hypervisor_svc.guests import Guests
from hypervisor_svc.pass_on import Row

DEADLINE = 2.0
LET_GO_LIMIT = 5.0
"""Seconds that the guest's applications have to let go of their files."""
ANSWER_LIMIT = 5.0
"""Seconds beyond that until an agent that says nothing counts as gone."""
CHANNEL_LIMIT = 2.0
"""Seconds that a channel that was cut has to come back."""
RETURN_LIMIT = 30.0


class Late(str, Enum):
    """What becomes of a transfer that has not come home in time."""

    FINISH = "finish"  # this host sends the rest of the file and closes the connection
    RESET = "reset"
    WAIT = "wait"


class LeaveError(ControlError):
    """The VM is where it was, and its connections are handed out again; `hint` tells what to do."""


@dataclass
class Left:
    """How a VM left: connections that were out, and what became of them. `passed`: to the next host; `slowest_ms`: the longest
    wait between two that came home."""

    machine: str
    presence: str = Presence.AWAY.value
    connections: int = 0
    home: int = 0
    passed: int = 0
    finished: int = 0
    reset: int = 0
    drain_ms: float = 0.0
    slowest_ms: float = 0.0
    share_ms: float = 0.0


async def let_go(guests: Guests, guest: Guest, *, deadline: float = DEADLINE, late: Late = Late.FINISH) -> dict[str, Any]:
    """Until memory may be copied. Raises LeaveError; then it has come back. An agent of an earlier release leaves at once."""
    if "let_go" not in guest.features:
        return await leave(guests, guest, deadline=deadline, late=late)
    left = Left(guest.machine.name, guest.presence.value, len(guest.connections))
    if guest.presence not in (Presence.LOOSE, Presence.AWAY):
        async with _or_back(guests, guest):
            begin, instance = time.monotonic(), guest.hello.get("instance")
            _call(guest, "let_go")
            await _until(guest, Presence.LOOSE, instance)
            left.presence, left.share_ms = Presence.LOOSE.value, _milliseconds(begin, time.monotonic())
    return asdict(left)


async def leave(
    guests: Guests, guest: Guest, *, deadline: float = DEADLINE, late: Late = Late.FINISH, passes: bool = False
) -> dict[str, Any]:
    """Until the VM may go. `passes`: files under way go to the next host, which is to be told the `rows`; asked again without it,
    they come home. Raises LeaveError; then it has come back."""
    left, rows = Left(guest.machine.name), list[Row]()
    otherwise = guest.passing and not passes
    if otherwise or guest.presence is not Presence.AWAY:
        async with _or_back(guests, guest):
            if otherwise:
                guests.passing.serve_again(guest)
            if guest.presence is Presence.AWAY:
                await _bring_home(guests, guest, left, deadline, late)
            else:
                rows = await _leave(guests, guest, left, deadline, late, passes=passes and "pass_on" in guest.features)
    return {**asdict(left), "rows": rows} if passes else asdict(left)


@contextlib.asynccontextmanager
async def _or_back(guests: Guests, guest: Guest) -> AsyncIterator[None]:
    """If the block fails, the VM comes back."""
    await _answer(guest)
    try:
        yield
    except BaseException:
        guests.take_again(guest)
        guest.send({"type": "return"})
        raise


async def _answer(guest: Guest) -> None:
    """Until the agent answers; the channel may have been cut a moment ago. Raises LeaveError."""
    until = time.monotonic() + CHANNEL_LIMIT
    while not guest.hears:
        if guest.gone or not await guest.news(max(0.0, until - time.monotonic())):
            silent = f"the agent in {guest.machine.name} does not answer"
            raise LeaveError(silent, "in the guest: systemctl status streamlift-agent")


async def _leave(guests: Guests, guest: Guest, left: Left, deadline: float, late: Late, *, passes: bool) -> list[Row]:
    begin, instance = time.monotonic(), guest.hello.get("instance")
    guest.draining = True
    unasked = passes and guest.presence is Presence.LOOSE and not guest.relays
    if not unasked:
        _call(guest, "leave", passes=passes)
    left.connections = len(guest.connections)
    rows = guests.passing.pass_on(guest) if passes else []
    left.passed = len(rows)
    await _bring_home(guests, guest, left, deadline, late)
    drained = time.monotonic()
    left.drain_ms = _milliseconds(begin, drained)
    if unasked:
        left.presence = guest.presence.value
        return rows
    await _until(guest, Presence.AWAY, instance)
    left.share_ms = _milliseconds(drained, time.monotonic())
    return rows


async def _bring_home(guests: Guests, guest: Guest, left: Left, deadline: float, late: Late) -> None:
    begin, before = time.monotonic(), guest.counters.copy()
    guests.call_home(guest)
    await _drain(guests, guest, left, guest.hello.get("instance"), deadline, late)
    left.home = guest.counters["handed_back"] - before["handed_back"]
    left.drain_ms = _milliseconds(begin, time.monotonic())


def _call(guest: Guest, word: str, **more: bool) -> None:
    guest.call, guest.answers = guest.call + 1, False
    guest.asked = {"type": word, "call": guest.call, "seconds": LET_GO_LIMIT, **more}
    guest.send(guest.asked)


async def _drain(guests: Guests, guest: Guest, left: Left, instance: object, deadline: float, late: Late) -> None:
    last, out = time.monotonic(), len(guest.connections)
    while guest.connections:
        waited = time.monotonic() - last
        if late is not Late.WAIT and waited >= deadline:
            left_over = Counter(_too_late(guests, one, late) for one in list(guest.connections.values()))
            left.finished, left.reset = left_over[Late.FINISH], left_over[Late.RESET]
            return
        await guest.news(None if late is Late.WAIT else deadline - waited)
        _check(guest, instance)
        if len(guest.connections) < out:
            now = time.monotonic()
            left.slowest_ms = max(left.slowest_ms, _milliseconds(last, now))
            last, out = now, len(guest.connections)


def _too_late(guests: Guests, connection: Connection, late: Late) -> Late:
    """What becomes of it."""
    if late is Late.FINISH and guests.keep(connection):
        return Late.FINISH
    guests.end_late(connection)
    return Late.RESET


async def _until(guest: Guest, wanted: Presence, instance: object) -> None:
    until = time.monotonic() + LET_GO_LIMIT + ANSWER_LIMIT
    while not (guest.answers and guest.presence is wanted):
        if not await guest.news(max(0.0, until - time.monotonic())):
            message = f"the agent in {guest.machine.name} does not say that it is {wanted.value}"
            raise LeaveError(message, "see its log in the guest")
        _check(guest, instance)


def _check(guest: Guest, instance: object) -> None:
    """Whether it is still on its way out. Raises LeaveError."""
    if guest.hello.get("instance") != instance:
        raise LeaveError(f"the agent in {guest.machine.name} was restarted meanwhile", "try again")
    if guest.gone:
        raise LeaveError(f"{guest.machine.name} has stopped")
    if guest.stays:
        raise LeaveError(
            f"{guest.machine.name} stays: {guest.presence_message or 'it was called back'}",
            "end what is named there, or have it use the share through 'offload.attend' and 'offload.hold'; then try again",
        )


async def come_back(guests: Guests, guest: Guest, *, seconds: float = RETURN_LIMIT) -> dict[str, Any]:
    """Until the VM works with this host again. Raises LeaveError if its agent does not say so in time: it goes on trying."""
    begin = time.monotonic()
    guests.take_again(guest)
    guest.send({"type": "return"})
    return {**await meet(guest, seconds=seconds), "ms": _milliseconds(begin, time.monotonic())}


async def while_runs(guests: Guests, guest: Guest, process: int, *, give_up: Callable[[], Awaitable[None]]) -> None:
    """The VM comes back when the process that asked for its leaving has ended, unless it has moved by then. Before that its
    migration, if there is one, is given up: it is held, perhaps, by a process that cannot let it go on any more."""
    await _end_of(process)
    if not guest.gone and guest.presence is not Presence.HERE:
        await give_up()
    if not guest.gone and guest.presence is not Presence.HERE:
        guests.take_again(guest)
        guest.send({"type": "return"})


async def _end_of(process: int) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    try:
        watched = os.pidfd_open(process)
    except ProcessLookupError:
        return
    loop.add_reader(watched, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(watched)
        os.close(watched)


async def meet(guest: Guest, *, seconds: float) -> dict[str, Any]:
    """Until the agent has said hello and its share is mounted. Raises LeaveError."""
    begin = time.monotonic()
    while not (guest.hears and guest.presence is Presence.HERE):
        left = begin + seconds - time.monotonic()
        if guest.gone or left <= 0 or not await guest.news(left):
            raise LeaveError(
                f"{guest.machine.name}: channel {guest.channel.state if guest.channel else 'down'}, presence {guest.presence.value}"
                f" after {seconds:g} s{': ' + guest.presence_message if guest.presence_message else ''}",
                "its agent goes on trying by itself; 'streamlift status' tells when it is here",
            )
    ms = _milliseconds(begin, time.monotonic())
    return {"machine": guest.machine.name, "channel": "hello", "presence": guest.presence.value, "ms": ms}


def _milliseconds(begin: float, end: float) -> float:
    return round((end - begin) * 1000, 1)

