# SPDX-License-Identifier: Apache-2.0
"""Step 8: take back. The host's snapshot goes into the application's own socket, which then thaws.

    restore()  the host's copy is frozen; ours becomes what that is, still frozen
    thaw()     the connection is ours

A transfer that went as expected comes home directly: our place-holder stands there already, packets come to it (and are
held), and it thaws at once. Any other is rebuilt while packets still go to the host, and thaws when the host has released
it. If we cannot restore, we say so, and the host ends the connection: it is the only one that still can.

A client that closed meanwhile has its FIN acknowledged by the host, perhaps, but TCP_REPAIR cannot restore a socket that has
received one. So it is restored as it was before, and the FIN comes once more; nothing may be sent until it has, because it
would acknowledge less than the host did (`await_fin`)."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable
from dataclasses import replace

from guest_agent.hand_out import Transfer
from guest_agent.handoff.backend import Backend
from guest_agent.handoff.errors import GuestError, Reason
from guest_agent.handoff.restore import arrives_at
from guest_agent.handoff.segment import absorb
from guest_agent.handoff.snapshot import decode
from guest_agent.handoff.state import Guest
from guest_agent.handoff.wire import Header

FIN_LIMIT = 1.0
"""Seconds until a FIN that the host promised is given up. It comes within one round trip over the channel."""


def restore(transfer: Transfer, backend: Backend, header: Header, body: bytes) -> None:
    """Restore the connection in place. Raises HandoffError or OSError: then it cannot come home.

    The application's options are those of our own snapshot; a transfer that was reclaimed has none, and takes the host's."""
    returned = decode(header.get("snapshot"), body)
    if transfer.snapshot is None:
        snapshot = replace(returned, options=replace(returned.options, mark=0))
    elif (returned.local, returned.peer) != (transfer.snapshot.local, transfer.snapshot.peer):
        raise GuestError(Reason.BAD_SNAPSHOT, "the host returned another connection than it took")
    else:
        snapshot = replace(returned, options=transfer.snapshot.options)
    snapshot, transfer.held = absorb(snapshot, transfer.held)
    transfer.move(Guest.RETURNING)
    if transfer.standing_by and transfer.expected is not None and arrives_at(snapshot, transfer.expected):
        backend.arrive(transfer.sock, snapshot)
    else:
        backend.restore_in_place(transfer.sock, snapshot)
    transfer.snapshot = snapshot
    transfer.closed = header.get("closed") is True


def thaw(transfer: Transfer, backend: Backend) -> None:
    """The connection is ours again; what was queued and never sent goes out now."""
    assert transfer.snapshot is not None
    backend.thaw(transfer.sock)
    backend.send_unsent(transfer.sock, transfer.snapshot)
    transfer.move(Guest.HOME)


def await_fin(loop: asyncio.AbstractEventLoop, sock: socket.socket, then: Callable[[], None]) -> None:
    """Call `then` once the socket has received the client's FIN, or is dead, or FIN_LIMIT has passed."""
    watch = select.epoll(1)

    def done() -> None:
        timer.cancel()
        loop.remove_reader(watch)
        watch.close()
        then()

    watch.register(sock, select.EPOLLRDHUP)
    loop.add_reader(watch, done)
    timer = loop.call_later(FIN_LIMIT, done)
