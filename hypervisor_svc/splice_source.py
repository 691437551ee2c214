# SPDX-License-Identifier: Apache-2.0
"""Where the entries of a `user` relay come from: a TCP connection or a UDP socket; files are in `splice_file.py`."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Hashable
from typing import TYPE_CHECKING

from guest_agent.handoff import kernel
from hypervisor_svc.mpegts import Framer
from hypervisor_svc.ring import Payload, Slice
from hypervisor_svc.splice import Framing

if TYPE_CHECKING:
    from hypervisor_svc.splice_user import UserSession

RECEIVE_BYTES = 1 << 16
RECEIVES = 16
"""Receives from a source between two turns of its sinks."""
SOURCE_BUFFER = 4 << 20
"""Bytes of datagrams that may wait in the source's socket."""
_SO_MEMINFO = 55


class SourceReader:
    """Gives the session what comes. Sockets stay their owner's."""

    file = -1

    def __init__(self, session: UserSession) -> None:
        self._session = session
        self._loop = session.engine.loop

    def read(self, part: Slice) -> bytes:
        """Bytes of the source's file."""
        raise NotImplementedError

    def position(self, entry: int) -> int:
        """What a sink is told that goes on at this entry (`handoff/positions.py`)."""
        return entry

    def find(self, position: int) -> tuple[int, int] | None:
        """The opposite: the entry that a position is in, and how many of its bytes are before it; None: it has not come yet."""
        return min(position, self._session.ring.head), 0

    @property
    def begun(self) -> bytes:
        """What has come of the next entry, if nobody else has it."""
        return b""

    def dropped(self) -> dict[str, int]:
        """See `splice.SessionStatus`."""
        return {}

    def rest(self) -> None:
        """Nothing is urgent before `catch_up`: what comes may wait where it is."""

    def catch_up(self) -> None:
        """Give the session what has come meanwhile."""

    def close(self) -> None:
        """Take no more. Idempotent."""

    def release(self) -> None:
        """The session needs nothing of it any more."""


class SocketSource(SourceReader):
    """A `schedule.Task`, after those of its sinks and before everything of a lower class. What has come waits in the socket until
    the sinks had their turns: so a class that has enough to do leaves nothing to lower ones, and loses nothing before they do."""

    def __init__(self, session: UserSession, sock: socket.socket) -> None:
        super().__init__(session)
        self._sock, self._engine = sock, session.engine
        self._open, self._rests = True, False
        self._receives = min(RECEIVES, session.options.ring_entries // 2)
        sock.setblocking(False)
        self._engine.watch(sock.fileno(), self, select.EPOLLIN)

    @property
    def owner(self) -> Hashable:
        """See `schedule.Task`."""
        return self._session.owner

    @property
    def rank(self) -> tuple[int, int]:
        """See `schedule.Task`."""
        return self._session.level, -1

    def event(self, events: int) -> None:
        """Something has come, or the end."""
        if not self._rests:
            self._engine.schedule.add(self)

    def rest(self) -> None:
        self._rests = True

    def catch_up(self) -> None:
        if self._rests:
            self._rests = False
            self.turn()

    def turn(self) -> None:
        """See `schedule.Task`."""
        if self._open and not self._exhausted():
            self._engine.schedule.add(self)

    def _exhausted(self) -> bool:
        """Take some of what has come; whether there was no more. True too when that was the end."""
        raise NotImplementedError

    def close(self) -> None:
        if self._open:
            self._open = False
            self._engine.schedule.remove(self)
            self._engine.unwatch(self._sock.fileno())


class StreamSource(SocketSource):
    def __init__(self, session: UserSession, sock: socket.socket) -> None:
        options = session.options
        self._framer = Framer(options.entry_bytes) if options.framing is Framing.MPEGTS else None
        room = options.entry_bytes * options.ring_entries // 2
        self._size = min(RECEIVE_BYTES, room) if self._framer else options.entry_bytes
        self._begun = options.rest
        super().__init__(session, sock)

    @property
    def begun(self) -> bytes:
        return self._begun or (self._framer.rest if self._framer else b"")

    def _exhausted(self) -> bool:
        for _ in range(self._receives):
            try:
                data = self._sock.recv(self._size)
            except BlockingIOError:
                return True
            except OSError as error:
                self._session.end(f"the source's connection: {error.strerror}")
                return True
            if not data:
                rest = self._begun + (self._framer.flush() if self._framer else b"")
                self._session.take([rest] if rest else [])
                self._session.end("the source closed its connection")
                return True
            data, self._begun = self._begun + data, b""
            self._session.take(self._framer.feed(data) if self._framer else [data])
        return False


class DatagramSource(SocketSource):
    def __init__(self, session: UserSession, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, kernel.SO_RCVBUFFORCE, SOURCE_BUFFER)
        self._before = _drops(sock)
        super().__init__(session, sock)

    def _exhausted(self) -> bool:
        came: list[Payload] = []
        exhausted = False
        for _ in range(self._receives):
            try:
                came.append(self._sock.recv(RECEIVE_BYTES))
            except BlockingIOError:
                exhausted = True
                break
            except ConnectionRefusedError:
                continue  # ICMP for something that somebody sent from here
            except OSError as error:
                self._session.end(f"the source's socket: {error.strerror}")
                return True
        if came:
            self._session.take(came)
        return exhausted

    def dropped(self) -> dict[str, int]:
        lost = _drops(self._sock) - self._before if self._sock.fileno() >= 0 else 0
        return {"not_read_in_time": lost} if lost else {}


def _drops(sock: socket.socket) -> int:
    """Datagrams that a socket had no room for (SO_MEMINFO, SK_MEMINFO_DROPS)."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36)[32:36], "little")
