# SPDX-License-Identifier: Apache-2.0
"""The guest's half of a handoff: freeze, extract, offer; then either the host owns the connection or all is undone.

    begin() ──▶ OFFERED ──▶ stand_by()  the host owns it; our socket becomes a place-holder
                       └──▶ undo()      nothing has happened; the application sends the file itself
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from guest_agent.handoff import fault, kernel
from guest_agent.handoff.backend import Backend
from guest_agent.handoff.errors import HandoffError, HostError, Reason
from guest_agent.handoff.hold import Hold
from guest_agent.handoff.snapshot import ESTABLISHED, Snapshot, after, encode
from guest_agent.handoff.state import Guest, move_guest
from guest_agent.handoff.wire import Header
from guest_agent.mute import mute, unmute
from guest_agent.share import SharedFile

Send = Callable[[Header, bytes], None]


@dataclass
class Outcome:
    """What the application is told: `outcome` is "offloaded", "local" or "failed"; `sent` in bytes; `cursor`: of a relay's sink,
    the position where it would have gone on, of its source where that stands; `rest`: what has come of the next entry, in
    hexadecimal digits; `answered`: numbers of the anticipated requests that the host answered: `sent` is of the last of them."""

    outcome: str
    sent: int = 0
    reason: Reason | None = None
    message: str = ""
    errno: int = 0
    cursor: int | None = None
    rest: str = ""
    answered: tuple[int, ...] = ()


@dataclass
class Transfer:
    """One file on its way to one client, and the socket that it goes through. `waits`: for the next host, if the VM moves;
    `carried` tells whoever waits that it does, and by which token. `sent_before`: bytes that earlier hosts have sent, before it
    came home and was carried. `to_be_told`: its application is about to say what its client may ask next."""

    token: str
    sock: socket.socket
    file: SharedFile
    offset: int
    count: int
    priority: str
    reply: Callable[[Outcome], None]
    waits: bool = False
    carried: Callable[[], None] = lambda: None
    state: Guest = Guest.HOME
    snapshot: Snapshot | None = None
    expected: Snapshot | None = None
    standing_by: bool = False
    cookie: int = 0
    held: list[bytes] = field(default_factory=list)
    outcome: Outcome = field(default_factory=lambda: Outcome("offloaded"))
    sent_before: int = 0
    to_be_told: bool = False
    application_gone: bool = False
    closed: bool = False
    timer: asyncio.TimerHandle | None = None
    begun: float = field(default_factory=time.monotonic)

    def move(self, to: Guest) -> None:
        """Go to another state of the table in `handoff/state.py`."""
        self.state = move_guest(self.state, to)
        fault.reach(f"guest:{to.value}")

    def request(self) -> Header:
        """What the host is asked to do with the connection."""
        return {
            "type": "hand_out",
            "token": self.token,
            "path": self.file.path,
            "inode": self.file.inode,
            "offset": self.offset,
            "count": self.count,
            "priority": self.priority,
        }

    def expect(self) -> Snapshot | None:
        """How the connection will stand when that is done, if that is known."""
        assert self.snapshot is not None
        options = replace(self.snapshot.options, keepalive=False)
        return replace(after(self.snapshot, self.count), options=options)

    def taken(self) -> None:
        """The host has it."""

    @property
    def any_host(self) -> bool:
        """Whether another host can take it as well."""
        return True


def begin(transfer: Transfer, backend: Backend, keep: Hold | None, send: Send) -> None:
    """Steps 1 to 3. Raises HandoffError or OSError with the socket thawed, as it was."""
    transfer.cookie = int.from_bytes(transfer.sock.getsockopt(socket.SOL_SOCKET, kernel.SO_COOKIE, 8), "little")
    transfer.snapshot = backend.take(transfer.sock, keep)
    try:
        mute(transfer.sock)  # at once: the snapshot's clock stands, and a timer may still speak with a later one
        transfer.move(Guest.FROZEN)
        offer(transfer, send)
        transfer.expected = transfer.expect()  # made while the host is busy with the offer
    except (HandoffError, OSError):
        undo(transfer, backend)
        raise
    transfer.move(Guest.OFFERED)


def offer(transfer: Transfer, send: Send, **other: str) -> None:
    """Send the snapshot and the job, with `other` fields in the place of its own. Raises HostError(HOST_AWAY)."""
    assert transfer.snapshot is not None
    header, body = encode(transfer.snapshot)
    try:
        send({**transfer.request(), "snapshot": header, **other}, body)
    except ConnectionError as error:
        raise HostError(Reason.HOST_AWAY, str(error)) from None


def stand_by(transfer: Transfer, backend: Backend) -> None:
    """The host committed. Our socket is rebuilt as it will stand when the file is delivered: it has nothing to retransmit,
    and on the way home only what the client said meanwhile is missing (`take_back.py`). Raises HandoffError, OSError.

    One whose client has closed already is rebuilt at home: it would have to be while packets come."""
    assert transfer.snapshot is not None
    if transfer.snapshot.options.keepalive:  # a probe would tell the client about a second owner
        transfer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
    if transfer.snapshot.state == ESTABLISHED and transfer.expected is not None:
        backend.restore_in_place(transfer.sock, transfer.expected)
        transfer.standing_by = True


def undo(transfer: Transfer, backend: Backend) -> None:
    """The host did not take it: thaw; the socket never stopped being ours."""
    unmute(transfer.sock, transfer.snapshot.options.mark if transfer.snapshot else 0)
    backend.thaw(transfer.sock)
    if transfer.state is not Guest.HOME:
        transfer.move(Guest.HOME)
