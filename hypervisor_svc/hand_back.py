# SPDX-License-Identifier: Apache-2.0
"""Step 7: hand back. Freeze, extract, send the packets home, then the snapshot.

The redirect goes away *before* the guest has its socket back, and the guest thaws without asking: that saves the client a
round trip over the channel. Nothing is lost meanwhile, because what a frozen socket does not take is kept (`hold.py`), and
never are there two owners, because our copy stays frozen until the guest says that the connection is home, and then closes
silently. If the guest says that it cannot take it, we are the only owner left, and end the connection."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import replace

from guest_agent.handoff import kernel
from guest_agent.handoff.errors import HandoffError
from guest_agent.handoff.extract import extract
from guest_agent.handoff.freeze import freeze, thaw
from guest_agent.handoff.hold import Hold
from guest_agent.handoff.snapshot import Snapshot, encode
from guest_agent.handoff.state import Host
from hypervisor_svc.connection import Connection, Durations
from hypervisor_svc.inject import Injector, fin_segment
from hypervisor_svc.redirect import Redirect


class HandBack:
    """Gives connections back, and ends those that nobody can take."""

    def __init__(self, redirect: Redirect, keep: Hold | None, injector: Injector, durations: Durations) -> None:
        self._redirect, self._keep, self._injector, self._durations = redirect, keep, injector, durations

    def hand_back(self, connection: Connection) -> None:
        """From a connection that is served to one whose snapshot is on its way to the guest. Raises HandoffError or
        OSError if the connection cannot be frozen any more: it has died, and is the caller's to bury."""
        assert connection.sock is not None and connection.endpoint is not None
        with self._durations.of("freeze_extract"):
            freeze(connection.sock, self._keep)
            connection.move(Host.FROZEN)
            snapshot = self._extract(connection)
        with self._durations.of("unredirect"):
            self._redirect.unredirect(connection.flow, connection.endpoint)
        header, body = encode(snapshot)
        connection.parting = (self._message(connection, header), body)
        connection.move(Host.RETURNING)
        connection.guest.send(*connection.parting)

    def _extract(self, connection: Connection) -> Snapshot:
        assert connection.sock is not None
        snapshot = extract(connection.sock, before_fin=True)
        original = connection.job.snapshot
        state = connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        if state == kernel.CLOSE_WAIT:  # the FIN comes again without a timestamp: we do not know the client's clock
            connection.fin = fin_segment(
                connection.flow,
                sequence=snapshot.receive_next,
                acknowledge=snapshot.send_sequence,
                window=min(65535, snapshot.window.snd_wnd >> (snapshot.send_scale or 0)),
            )
        return replace(snapshot, local=original.local, v4_mapped=original.v4_mapped)

    def _message(self, connection: Connection, snapshot: dict[str, object]) -> dict[str, object]:
        return {
            "type": "hand_back",
            "token": connection.token,
            "sent": connection.sent,
            "reason": connection.reason.value if connection.reason else None,
            "message": connection.message,
            "errno": connection.errno,
            "snapshot": snapshot,
        }

    def home(self, connection: Connection, segments: list[bytes]) -> None:
        """The guest has it: close silently, and put what neither of us took back on the road."""
        connection.close()
        connection.move(Host.GONE)
        for segment in (*connection.held, *segments):
            self._injector.inject(connection.flow, segment)
        if connection.fin:
            self._injector.inject(connection.flow, connection.fin)

    def end(self, connection: Connection) -> None:
        """Nobody can take the connection: close it as the kernel does for a process that dies. The redirect stays until
        the last packets of the close have passed (`forget`)."""
        if connection.sock is not None and connection.state in (Host.FROZEN, Host.RETURNING):
            if connection.state is Host.RETURNING and connection.endpoint is not None:
                self._redirect.redirect(connection.flow, connection.endpoint)
            with contextlib.suppress(OSError):
                thaw(connection.sock)
        connection.close()
        connection.state = Host.GONE

    def bury(self, connection: Connection) -> None:
        """The connection is dead (reset, timed out): nothing more to say to the client."""
        connection.close()
        connection.state = Host.GONE
        self.forget(connection)

    def forget(self, connection: Connection) -> None:
        """Remove the redirect of a connection that is over."""
        if connection.endpoint is not None:
            with contextlib.suppress(OSError, HandoffError):
                self._redirect.unredirect(connection.flow, connection.endpoint)
