# SPDX-License-Identifier: Apache-2.0
"""Step 6a, once more: a client that asks for one segment after another is answered here, as the application said that it would be,
and the connection comes home when it asks for something else, or nothing::

    guest -> host   {"type":"anticipate","token":"...","first":0,"more":true,"everything":false}, body: `anticipated.py`; then
                    more of them, from number `first` on; none from 0 on: nothing is anticipated any more
    begin()         the client's next bytes are what was anticipated: read them, send the head, serve the file

What is not anticipated stays unread: it is in the receive queue when the connection comes home. `everything`: the application is
root's, and may read all files; any other is given what everybody may read (`look.py`).

A client that is silent for too long is the application's, which has a limit of its own (`serve.next_request_seconds`: longer than a
segment, for a player whose buffer is full asks once in that time)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from guest_agent.handoff.anticipated import (
    MAX_REQUEST,
    MAX_TOLD,
    Anticipated,
    check_limits,
    find,
    read_anticipated,
    write_anticipated,
)
from guest_agent.handoff.errors import GuestError, HandoffError, Reason
from guest_agent.handoff.state import Host
from guest_agent.handoff.wire import Header
from hypervisor_svc.connection import Connection, Guest
from hypervisor_svc.policy import Job, RelayJob, look_at, open_file, read_token

_MAX_BODY = 4 * MAX_TOLD
"""Bytes of JSON."""


class NotAnticipated(Exception):
    """It is for the guest."""


@dataclass
class Anticipation:
    """What was told, and the numbers of those that were answered, the last perhaps in part; `more` is about to be told."""

    told: tuple[Anticipated, ...]
    everything: bool
    answered: list[int] = field(default_factory=list)
    more: bool = False

    @property
    def first(self) -> int:
        """The next that may come."""
        return self.answered[-1] + 1 if self.answered else 0

    @property
    def expects(self) -> bool:
        """Whether any may."""
        return self.more or self.first < len(self.told)

    def add(self, first: int, told: tuple[Anticipated, ...], *, more: bool) -> None:
        """From number `first` on. If a part before was lost nothing is added, and no more waited for. Raises GuestError."""
        follows = first == len(self.told)
        expected, self.more = self.more, False
        if follows:
            check_limits(self.told + told)
            self.told += told
            self.more = expected and more

    def end(self) -> None:
        """None may."""
        self.told, self.more = self.told[: self.first], False


def write_anticipation(anticipation: Anticipation | None) -> dict[str, Any] | None:
    """For the next host."""
    if anticipation is None:
        return None
    told = write_anticipated(anticipation.told)
    return {"told": told, "everything": anticipation.everything, "answered": anticipation.answered}


def read_anticipation(row: object) -> Anticipation | None:
    """The inverse. Raises GuestError, KeyError or ValueError for anything else."""
    if row is None:
        return None
    if not isinstance(row, dict):
        raise ValueError("what is anticipated is no JSON object")
    told, answered = read_anticipated(row["told"]), row["answered"]
    numbers = isinstance(answered, list) and all(type(one) is int and 0 <= one < len(told) for one in answered)
    if not numbers or sorted(set(answered)) != answered or type(row["everything"]) is not bool:
        raise ValueError("what was answered is not what it is to be")
    return Anticipation(told, row["everything"], answered)


class AnticipateWords:
    """A guest's message, as `guests.py` dispatches it. `serve`: one that was finished already has something to wait for; `again`:
    what it waits for is another."""

    def __init__(self, *, serve: Callable[[Connection], None], again: Callable[[Connection], None]) -> None:
        self._serve, self._again = serve, again

    def on_anticipate(self, guest: Guest, header: Header, body: bytes) -> None:
        """Of a transfer that is here; for any other it comes too late."""
        first, more, everything = _read(header)
        told = _read_body(body)
        connection = guest.connections.get(read_token(header))
        if connection is None or connection.state is not Host.SERVING or isinstance(connection.job, RelayJob):
            return
        if connection.anticipation is None:
            if first == 0 and told:
                self._begin(connection, Anticipation(told, everything, more=more))
            return
        if first or told:
            connection.anticipation.add(first, told, more=more)
        else:
            connection.anticipation.end()
        self._again(connection)

    def no_more(self, connection: Connection) -> None:
        """Its agent has lost the thread: what it was about to say is not said."""
        if connection.anticipation is not None:
            connection.anticipation.more = False
            self._again(connection)

    def _begin(self, connection: Connection, anticipation: Anticipation) -> None:
        connection.anticipation = anticipation
        if connection.waits_for_guest and connection.reason is None:
            connection.stop_waiting()
            self._serve(connection)


def _read(header: Header) -> tuple[int, bool, bool]:
    match header:
        case {"first": int(first), "more": bool(more), "everything": bool(everything)}:
            return first, more, everything
    raise GuestError(Reason.BAD_REQUEST, "anticipate: first is no number, or more or everything neither true nor false")


def _read_body(body: bytes) -> tuple[Anticipated, ...]:
    if len(body) > _MAX_BODY:
        raise GuestError(Reason.BAD_REQUEST, f"anticipate: a body of {len(body)} bytes; {_MAX_BODY} may be")
    try:
        return read_anticipated(json.loads(body))
    except (ValueError, RecursionError):
        raise GuestError(Reason.BAD_REQUEST, "anticipate: the body is not JSON") from None


def begin(connection: Connection) -> bool:
    """Begin to answer the client's next request, if it has come whole. Raises NotAnticipated: it is left as it is; OSError: the
    connection is dead."""
    anticipation, sock = connection.anticipation, connection.sock
    assert anticipation is not None and sock is not None
    try:
        data = sock.recv(MAX_REQUEST, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    if not data:
        raise NotAnticipated  # it has closed
    try:
        at = find(anticipation.told, anticipation.first, data)
    except LookupError:
        if anticipation.more:
            return False
        raise NotAnticipated from None
    if at is None:
        return False
    _answer(connection, anticipation.told[at])
    anticipation.answered.append(at)
    connection.guest.counters["answered"] += 1
    return True


def _answer(connection: Connection, told: Anticipated) -> None:
    """The head is sent before the request is read: until then nothing has happened."""
    assert connection.sock is not None
    job, file = _open(connection, told)
    try:
        _send_whole(connection.sock, told.head)
    except BaseException:
        os.close(file)
        raise
    connection.sock.recv(len(told.request), socket.MSG_DONTWAIT)
    connection.serve_next(job, file, head=len(told.head))


def _open(connection: Connection, told: Anticipated) -> tuple[Job, int]:
    """The file, if it is still what the application saw. Raises NotAnticipated."""
    share, anticipation = connection.guest.machine.share, connection.anticipation
    assert anticipation is not None
    if share is None:
        raise NotAnticipated
    try:
        seen = look_at(share, told.path)
        if (seen.size, seen.mtime_ns) != (told.size, told.mtime_ns) or not (seen.public or anticipation.everything):
            raise NotAnticipated
        job = replace(connection.job, path=told.path, inode=seen.inode, offset=told.offset, count=told.count)
        return job, open_file(share, job)
    except (HandoffError, OSError):
        raise NotAnticipated from None


def _send_whole(sock: socket.socket, head: bytes) -> None:
    """There is room: all that was sent before is acknowledged. Raises OSError; NotAnticipated if nothing was sent."""
    with contextlib.suppress(OSError):
        sock.recvmsg(1, 512, socket.MSG_ERRQUEUE)  # the notice that said so
    try:
        sent = sock.send(head, socket.MSG_MORE | socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except BlockingIOError:
        raise NotAnticipated from None
    if sent < len(head):
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
