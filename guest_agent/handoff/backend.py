# SPDX-License-Identifier: Apache-2.0
"""Two ways to do the socket work of a handoff, behind one interface; chosen once, at start.

    TcpRepair       TCP_REPAIR, tcp(7): any kernel since 4.10; open connections only, and they begin anew at the new owner
    SocketOffload   our kernel module: one call, every state, and the connection stays warm

A snapshot made by one restores with the other, with what that one can carry."""

from __future__ import annotations

import errno
import socket
from dataclasses import replace
from typing import Protocol

from guest_agent.handoff import extract, freeze, hold, restore
from guest_agent.handoff.errors import HostError, Reason
from guest_agent.handoff.hold import Hold
from guest_agent.handoff.snapshot import ESTABLISHED, Endpoint, Snapshot, without_unsent
from guest_agent.handoff.socket_offload import DEVICE, Device

NAMES = ("tcp_repair", "socket_offload")


class Backend(Protocol):
    """`name` as in every status; `why` it was chosen, for people."""

    name: str
    why: str

    def take(
        self, sock: socket.socket, keep: Hold | None, *, own: bool = False, known: Snapshot | None = None, spare: int = 0
    ) -> Snapshot:
        """Freeze and extract. On an error the socket is as it was. `own`: no application has it; `known`: an earlier snapshot
        of the same connection, whose ends and options still hold; `spare`: so many bytes at the end of the send queue need not be
        in the snapshot, if they were never sent. Raises NotMovable, OSError."""

    def restore_fresh(
        self, snapshot: Snapshot, keep: Hold | None, *, bind: Endpoint | None = None, transparent: bool = False, mark: int = 0
    ) -> socket.socket:
        """A new frozen socket that continues the snapshot. Raises NotMovable, OSError."""

    def restore_in_place(self, sock: socket.socket, snapshot: Snapshot) -> None:
        """Rebuild the snapshot inside a frozen socket. Raises NotMovable, OSError."""

    def arrive(self, sock: socket.socket, snapshot: Snapshot) -> None:
        """Complete a place-holder that stands where the snapshot does (`restore.arrives_at`). Raises NotMovable, OSError."""

    def thaw(self, sock: socket.socket) -> None:
        """The connection lives on here. Raises OSError."""

    def send_unsent(self, sock: socket.socket, snapshot: Snapshot, *, more: bool = False) -> None:
        """After `thaw`: queue what the old owner had not sent, if that is not there yet. Raises HostError, OSError."""


class TcpRepair:
    """The backend that needs no module."""

    name = "tcp_repair"

    def __init__(self, why: str = "") -> None:
        self.why = why or "works on every kernel since 4.10"

    def take(
        self, sock: socket.socket, keep: Hold | None, *, own: bool = False, known: Snapshot | None = None, spare: int = 0
    ) -> Snapshot:
        """`freeze.py`, then `extract.py`."""
        if not own:
            extract.check_movable(sock)
        freeze.freeze(sock, keep, own=own)
        try:
            return extract.extract(sock, known=known, spare=spare)
        except BaseException:
            freeze.thaw(sock)
            raise

    def restore_fresh(
        self, snapshot: Snapshot, keep: Hold | None, *, bind: Endpoint | None = None, transparent: bool = False, mark: int = 0
    ) -> socket.socket:
        """`restore.restore_fresh`."""
        return restore.restore_fresh(snapshot, keep, bind=bind, transparent=transparent, mark=mark)

    def restore_in_place(self, sock: socket.socket, snapshot: Snapshot) -> None:
        """`restore.restore_in_place`."""
        restore.restore_in_place(sock, snapshot)

    def arrive(self, sock: socket.socket, snapshot: Snapshot) -> None:
        """`restore.arrive`, where it can: not if a FIN came."""
        if snapshot.state == ESTABLISHED:
            restore.arrive(sock, snapshot)
        else:
            restore.restore_in_place(sock, snapshot)

    def thaw(self, sock: socket.socket) -> None:
        """`freeze.thaw`."""
        freeze.thaw(sock)

    def send_unsent(self, sock: socket.socket, snapshot: Snapshot, *, more: bool = False) -> None:
        """`restore.send_unsent`."""
        restore.send_unsent(sock, snapshot, more=more)


class SocketOffload:
    """The kernel module. Raises OSError if it is not there, or another version."""

    name = "socket_offload"

    def __init__(self) -> None:
        self._device = Device()
        self.why = "the module is loaded"

    def take(
        self, sock: socket.socket, keep: Hold | None, *, own: bool = False, known: Snapshot | None = None, spare: int = 0
    ) -> Snapshot:
        """SKOFF_FREEZE_EXPORT."""
        snapshot = without_unsent(self._export(sock, keep, own=own), spare)
        if known is None:
            return snapshot
        return replace(snapshot, local=known.local, peer=known.peer, v4_mapped=known.v4_mapped, options=known.options)

    def _export(self, sock: socket.socket, keep: Hold | None, *, own: bool) -> Snapshot:
        if keep is not None:
            return self._device.freeze_export(sock, keep.program_fd, own=own)
        freeze.shut(sock, None, own=own)
        try:
            return self._device.freeze_export(sock)
        except BaseException:
            hold.detach(sock)
            raise

    def restore_fresh(
        self, snapshot: Snapshot, keep: Hold | None, *, bind: Endpoint | None = None, transparent: bool = False, mark: int = 0
    ) -> socket.socket:
        """SKOFF_IMPORT into a new socket. `mark` replaces the snapshot's."""
        sock = restore.new_socket(snapshot, transparent=transparent)
        try:
            if keep is None:
                hold.attach(sock, None)
            filter_fd = keep.program_fd if keep is not None else -1
            self._device.import_into(sock, snapshot, filter_fd, bind=bind, options=True, mark=mark)
        except BaseException:
            sock.close()
            raise
        return sock

    def restore_in_place(self, sock: socket.socket, snapshot: Snapshot) -> None:
        """SKOFF_IMPORT; the socket's options are its own."""
        self._device.import_into(sock, snapshot)
        restore.resume_keepalive(sock, snapshot)

    arrive = restore_in_place

    def thaw(self, sock: socket.socket) -> None:
        """SKOFF_THAW; one that is not frozen is left alone."""
        if freeze.is_frozen(sock):
            self._device.thaw(sock)
        hold.detach(sock)

    def send_unsent(self, sock: socket.socket, snapshot: Snapshot, *, more: bool = False) -> None:
        """It went with the import, and leaves with the thaw."""


def choose(wanted: str = "auto") -> Backend:
    """The backend of this machine: `wanted` is one of NAMES, or "auto". Raises HostError if the module is wanted and cannot be."""
    if wanted == "tcp_repair":
        return TcpRepair("chosen by the configuration")
    try:
        return SocketOffload()
    except OSError as error:
        why = explain(error)
    if wanted == "socket_offload":
        raise HostError(Reason.RESTORE_FAILED, f"the backend socket_offload was asked for, but {why}")
    return TcpRepair(why)


def explain(error: OSError) -> str:
    """Why the module cannot be used, and what to do."""
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return f"the module socket_offload is not loaded (no {DEVICE}); 'streamlift module build', then 'streamlift module load'"
    if error.errno == errno.EPROTO:
        return "the loaded module socket_offload is of another version: build and load the one that came with this program"
    return f"{DEVICE}: {error.strerror}"

