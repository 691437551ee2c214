# SPDX-License-Identifier: Apache-2.0
"""Step 7: hand back.

Directly, where the guest's place-holder stands by and all went as expected::

    hand_back()   freeze, extract, un-redirect, send the snapshot: packets go to the guest's frozen socket, which keeps them
                  (`hold.py`); the guest completes it and thaws
    release()     it has: close silently, put what our copy kept back on the road

Otherwise with the guest's restore between the halves::

    hand_back()   freeze, extract, send the snapshot; packets still come to our frozen copy, which keeps them
    unredirect()  the guest has restored it
    release()     close silently, let the guest thaw, put what was kept back on the road

There the redirect stays until the guest has its socket, because a socket is not in the kernel's tables while it is rebuilt
in place: a packet that reached the guest then would be answered with a RST. If the guest says that it cannot take the
connection, our copy is the only one left, and ends it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from dataclasses import replace

from guest_agent.handoff import kernel
from guest_agent.handoff.backend import Backend
from guest_agent.handoff.diag import tcp_state
from guest_agent.handoff.errors import HandoffError, Reason
from guest_agent.handoff.freeze import is_frozen
from guest_agent.handoff.hold import Hold
from guest_agent.handoff.segment import absorb, is_stale
from guest_agent.handoff.snapshot import CLOSE_WAIT, Snapshot, before_fin, encode
from guest_agent.handoff.state import Host
from guest_agent.handoff.wire import Header
from hypervisor_svc.connection import Connection, Durations
from hypervisor_svc.inject import Injector, fin_segment
from hypervisor_svc.policy import RelayJob
from hypervisor_svc.redirect import SILENT_MARK, SOCKET_MARK, Redirect

CALLED_HOME = frozenset({Reason.OPERATOR, Reason.DRAINING})
"""Reasons of those who want a connection home before its time."""
_ACK_DELAY = 200
"""Milliseconds that an ACK may be delayed (TCP_DELACK_MAX)."""


class HandBack:
    """Gives connections back, and ends those that nobody can take."""

    def __init__(
        self,
        backend: Backend,
        redirect: Redirect,
        keep: Hold | None,
        injector: Injector,
        durations: Durations,
        *,
        collect: Callable[[], None],
    ) -> None:
        """`collect` brings `Connection.held` up to date."""
        self._backend, self._redirect, self._keep = backend, redirect, keep
        self._injector, self._durations = injector, durations
        self._collect = collect

    def hand_back(self, connection: Connection) -> None:
        """From a connection that is served to one whose snapshot is on its way to the guest. Raises HandoffError or
        OSError if the connection cannot be frozen any more: it has died, and is the caller's to bury."""
        assert connection.sock is not None and connection.endpoint is not None
        with self._durations.of("back"):
            self.send_home(connection, self.freeze(connection))

    def freeze(self, connection: Connection) -> Snapshot:
        """From a connection that is served to one that stands at a byte boundary. Raises as `hand_back` does."""
        with self._durations.of("freeze_extract"):
            snapshot = self._take(connection)
            _mark(connection, SILENT_MARK)
            connection.move(Host.FROZEN)
        _roll_back(connection, snapshot)
        return snapshot

    def send_home(self, connection: Connection, snapshot: Snapshot) -> None:
        """What was frozen."""
        connection.direct = _as_expected(connection, snapshot) and self._unredirected(connection)
        self._collect()
        snapshot, held = absorb(snapshot, connection.held)
        connection.held = [segment for segment in held if not is_stale(segment, snapshot.send_sequence)]
        header, body = encode(snapshot)
        connection.parting = (self._message(connection, header), body)
        connection.move(Host.RETURNING)
        connection.guest.send(*connection.parting)

    def _unredirected(self, connection: Connection) -> bool:
        try:
            self.unredirect(connection)
        except (HandoffError, OSError):
            return False
        return True

    def recall(self, connection: Connection) -> None:
        """Packets come to our copy again: the guest's place-holder does not stand by any more. Raises HandoffError, OSError."""
        if connection.direct:
            assert connection.endpoint is not None
            self._redirect.redirect(connection.flow, connection.endpoint)
            connection.direct = False
            if connection.parting is not None:
                connection.parting[0]["direct"] = False

    def _take(self, connection: Connection) -> Snapshot:
        assert connection.sock is not None
        spare = 0 if isinstance(connection.job, RelayJob) else connection.sent
        snapshot = self._backend.take(connection.sock, self._keep, own=True, known=connection.job.snapshot, spare=spare)
        if self._backend.name == connection.guest.backend == "socket_offload":
            return snapshot  # it carries everything, and while it is frozen no timer runs
        owes_ack = snapshot.window.rcv_wup != snapshot.receive_next
        snapshot = self._without_fin(connection, snapshot)
        return _after_delayed_ack(snapshot) if owes_ack or connection.fin else snapshot

    def _without_fin(self, connection: Connection, snapshot: Snapshot) -> Snapshot:
        """The FIN comes again, without a timestamp: we do not know the client's clock."""
        if snapshot.state == CLOSE_WAIT:
            snapshot = before_fin(snapshot)
            connection.fin = fin_segment(
                connection.flow,
                sequence=snapshot.receive_next,
                acknowledge=snapshot.send_sequence,
                window=min(65535, snapshot.window.snd_wnd >> (snapshot.send_scale or 0)),
            )
        return snapshot

    def take_again(self, connection: Connection) -> None:
        """One whose snapshot is on its way, and that nobody has said to have: packets come to our copy all the time, and the
        guest's stays frozen until it hears that ours was released. Raises HandoffError, OSError."""
        assert connection.sock is not None and not connection.direct
        connection.sent += connection.rolled_back
        connection.move(Host.SERVING)
        _mark(connection, SOCKET_MARK)
        self._backend.thaw(connection.sock)
        held, connection.held = connection.held, []
        for segment in held:
            self._injector.inject(connection.flow, segment)

    def _message(self, connection: Connection, snapshot: Header) -> Header:
        return {
            "type": "hand_back",
            "token": connection.token,
            "sent": connection.sent_before + connection.sent,
            "reason": connection.reason.value if connection.reason else None,
            "message": connection.message,
            "errno": connection.errno,
            "cursor": connection.cursor,
            "answered": connection.answered,
            "direct": connection.direct,
            "closed": bool(connection.fin),
            "snapshot": snapshot,
        }

    def unredirect(self, connection: Connection) -> None:
        """From here on packets go to the guest."""
        assert connection.endpoint is not None
        with self._durations.of("unredirect"):
            self._redirect.unredirect(connection.flow, connection.endpoint)

    def release(self, connection: Connection) -> Header:
        """The guest owns the connection. What a restarted agent is told that asks for it later."""
        if not connection.direct:
            connection.guest.send({"type": "released", "token": connection.token})
        connection.close()
        connection.move(Host.GONE)
        for segment in connection.held:
            self._injector.inject(connection.flow, segment)
        if connection.fin:
            self._injector.inject(connection.flow, connection.fin)
        assert connection.parting is not None
        said = connection.parting[0]
        home = {key: said[key] for key in ("token", "sent", "reason", "message", "errno", "cursor", "answered")}
        return {"type": "home", "unsent": said["snapshot"]["queues"][2] > 0, **home}

    def end(self, connection: Connection) -> None:
        """Close the connection as the kernel does for a process that dies; if it is dead already, nothing is said. The redirect
        stays until the last packets of the close have passed (`forget`). One that went home directly is no longer ours to end:
        our copy closes silently."""
        if connection.sock is not None and not connection.direct and is_frozen(connection.sock):
            with contextlib.suppress(OSError):
                _mark(connection, SOCKET_MARK)
                self._backend.thaw(connection.sock)
        connection.close()
        connection.state = Host.GONE

    def is_closing(self, connection: Connection) -> bool:
        """Whether the kernel still has something to say to the client of a connection that was ended."""
        if connection.endpoint is None:
            return False
        local, client = connection.endpoint, connection.flow.client
        family = socket.AF_INET6 if ":" in local.address else socket.AF_INET
        state = tcp_state(family, ((local.address, local.port), (client.address, client.port)))
        return state not in (None, kernel.TIME_WAIT, kernel.CLOSE)

    def forget(self, connection: Connection) -> None:
        """Remove the redirect of a connection that is over."""
        if connection.endpoint is not None:
            with contextlib.suppress(OSError, HandoffError):
                self._redirect.forget(connection.flow, connection.endpoint)


def _mark(connection: Connection, mark: int) -> None:
    assert connection.sock is not None
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)


def _after_delayed_ack(snapshot: Snapshot) -> Snapshot:
    """TCP_REPAIR does not stop the timer of an ACK that is due: our copy may still send it, with a later time stamp than it has
    now, and the clock that the client sees must not go back (RFC 7323 section 5)."""
    delay = _ACK_DELAY * (1000 if snapshot.timestamp_usec else 1)
    return replace(snapshot, timestamp=(snapshot.timestamp + delay) & 0xFFFFFFFF) if snapshot.timestamps else snapshot


def _roll_back(connection: Connection, snapshot: Snapshot) -> None:
    """Bytes of the file that were queued and not sent are not in the snapshot: the new owner reads them from the file. One that was
    called home and turns out to have all is as complete as any other."""
    job = connection.job
    if isinstance(job, RelayJob):
        return
    first = job.snapshot.send_next + len(job.snapshot.unsent) + connection.before
    reached = snapshot.send_next + len(snapshot.unsent) - first
    connection.rolled_back = (connection.sent - reached) & 0xFFFFFFFF
    connection.sent -= connection.rolled_back
    if connection.sent == job.count and connection.reason in CALLED_HOME:
        connection.reason, connection.message = None, ""


def _as_expected(connection: Connection, snapshot: Snapshot) -> bool:
    """Whether the guest's place-holder, if it stands by, stands there."""
    complete = connection.reason is None and connection.sent == connection.job.count and not connection.answered
    return complete and connection.ready is True and not snapshot.unacked and not snapshot.unsent
