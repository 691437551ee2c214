# SPDX-License-Identifier: Apache-2.0
"""The way in, the steps in order: open, restore, redirect; then the guest is told, and commit.

A failure at one step undoes those before it, in reverse, and the guest, which still holds its frozen original, goes on as if
nothing had been. The guest is told before our copy thaws: whatever happens to this process, an offer without an answer was
never taken, and nobody has heard of our copy."""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import replace

from guest_agent.handoff import kernel
from guest_agent.handoff.backend import Backend
from guest_agent.handoff.errors import HandoffError, HostError, Reason
from guest_agent.handoff.hold import Hold
from guest_agent.handoff.snapshot import Snapshot
from guest_agent.handoff.state import Host
from hypervisor_svc.connection import Connection, Durations
from hypervisor_svc.policy import RelayJob, open_file
from hypervisor_svc.redirect import SOCKET_MARK, Redirect
from hypervisor_svc.serve import COLD_CONGESTION, paces


class Handoff:
    """Takes connections over. `keep` may be None: packets that come meanwhile are then lost and retransmitted."""

    def __init__(self, backend: Backend, redirect: Redirect, keep: Hold | None, durations: Durations) -> None:
        self._backend, self._redirect, self._keep, self._durations = backend, redirect, keep, durations

    def take(self, connection: Connection) -> None:
        """From a checked offer to a frozen socket to which the client's packets come. Raises HandoffError; nothing is left
        behind then."""
        with contextlib.ExitStack() as undo:
            undo.callback(self._gone, connection)
            begin = time.perf_counter()
            self._open(connection)
            opened = time.perf_counter()
            self._restore(connection)
            restored = time.perf_counter()
            undo.callback(self._unredirect, connection)
            self._redirect_here(connection)
            undo.pop_all()
        done = time.perf_counter()
        for step, seconds in (
            ("open", opened - begin),
            ("restore", restored - opened),
            ("redirect", done - restored),
        ):
            self._durations.add(step, seconds)

    def _open(self, connection: Connection) -> None:
        if isinstance(connection.job, RelayJob):
            return  # its bytes come from the relay
        if connection.job.count == 0:
            return  # all of it was sent by the last host, and the client may ask for more
        share = connection.guest.machine.share
        if share is None:
            raise HostError(Reason.NOT_ON_SHARE, "this VM has no share on the host")
        try:
            connection.file = open_file(share, connection.job)
        except OSError as error:
            raise HostError(Reason.NO_SUCH_FILE, f"the share {share}: {error.strerror}", errno=error.errno or 0) from None

    def _restore(self, connection: Connection) -> None:
        connection.endpoint = self._redirect.bind_address(connection.flow)
        cold = not isinstance(connection.job, RelayJob) and self._begins_cold(connection.job.snapshot)
        try:
            sock = self._backend.restore_fresh(
                _for_bulk(connection.job.snapshot, cold=cold),
                self._keep,
                bind=connection.endpoint,
                transparent=self._redirect.transparent,
                mark=SOCKET_MARK,
            )
            connection.sock, connection.cold = sock, cold
            connection.cookie = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, kernel.SO_COOKIE, 8), "little")
            connection.move(Host.RESTORED)
        except OSError as error:
            raise HostError(Reason.RESTORE_FAILED, f"restore: {error}", errno=error.errno or 0) from None

    def _begins_cold(self, snapshot: Snapshot) -> bool:
        """Whether its congestion control paces, and nobody tells it at which rate."""
        warm = self._backend.name == "socket_offload" and snapshot.warm is not None and snapshot.warm.srtt_us > 0
        return paces(snapshot.options.congestion) and not warm

    def _redirect_here(self, connection: Connection) -> None:
        assert connection.endpoint is not None
        try:
            self._redirect.redirect(connection.flow, connection.endpoint)
            connection.move(Host.REDIRECTED)
        except OSError as error:
            raise HostError(Reason.REDIRECT_FAILED, f"redirect: {error}", errno=error.errno or 0) from None

    def commit(self, connection: Connection) -> None:
        """Thaw: from here the host owns the connection. Raises HandoffError; the connection must then be ended."""
        assert connection.sock is not None
        with self._durations.of("commit"):
            try:
                connection.move(Host.SERVING)
                self._backend.thaw(connection.sock)
                self._backend.send_unsent(connection.sock, connection.job.snapshot, more=True)
            except OSError as error:
                raise HostError(Reason.RESTORE_FAILED, f"thaw: {error}", errno=error.errno or 0) from None
        self._durations.add("out", time.monotonic() - connection.started)

    def _unredirect(self, connection: Connection) -> None:
        assert connection.endpoint is not None
        with contextlib.suppress(OSError, HandoffError):
            self._redirect.unredirect(connection.flow, connection.endpoint)

    def _gone(self, connection: Connection) -> None:
        """Undo open and restore: the frozen socket closes silently."""
        if connection.endpoint is not None and connection.state in (Host.OFFERED, Host.RESTORED):
            self._redirect.release(connection.flow, connection.endpoint)
        connection.close()
        if connection.state is not Host.GONE:
            connection.state = Host.GONE


def _for_bulk(snapshot: Snapshot, *, cold: bool) -> Snapshot:
    """The last part of a file must leave at once, whatever the application prefers for its own small writes; its options come
    home with its own snapshot. A congestion control that paces begins when there is a round-trip time (`serve.py`)."""
    options = snapshot.options
    congestion = COLD_CONGESTION if cold else options.congestion
    return replace(snapshot, options=replace(options, nodelay=True, cork=False, congestion=congestion))
