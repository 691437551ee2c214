# SPDX-License-Identifier: Apache-2.0
"""A file as the source of a `user` relay: one that grows, or a ring (`handoff/ring_file.py`) that a guest writes into the share.

Both are a stream of bytes whose positions every session knows alike, so a sink that leaves one goes on in the next, at this host
or another. What a file holds stays as it is: its entries are parts of it, and pages of the page cache go to the sinks. A ring is
written over while sockets may still hold its pages, so its bytes are taken out of the page cache once, for all sinks."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING

from guest_agent.handoff.positions import Positions
from guest_agent.handoff.ring_file import RingReader
from hypervisor_svc.mpegts import Framer
from hypervisor_svc.ring import Payload, Slice
from hypervisor_svc.splice import FileSource, Framing
from hypervisor_svc.splice_source import RECEIVE_BYTES, RECEIVES, SourceReader

if TYPE_CHECKING:
    from hypervisor_svc.splice_user import UserSession

POLL_INTERVAL = 0.01
"""Seconds between two looks; nobody tells a file system's other side when a file has grown."""


class FileReader(SourceReader):
    """Entries are parts of the file, whole pages where that is possible without waiting."""

    def __init__(self, session: UserSession, source: FileSource) -> None:
        super().__init__(session)
        options = session.options
        self.file, self._at = source.file, source.offset
        self._framer = Framer(options.entry_bytes) if options.framing is Framing.MPEGTS else None
        self._most = RECEIVE_BYTES if self._framer else options.entry_bytes
        self._positions = Positions(options.ring_entries, source.offset, usual=options.entry_bytes)
        self._timer: asyncio.TimerHandle | None = self._loop.call_soon(self._look)  # type: ignore[assignment]

    def position(self, entry: int) -> int:
        return self._positions.of(entry)

    def find(self, position: int) -> tuple[int, int] | None:
        return self._positions.find(position)

    def _look(self) -> None:
        try:
            more = self._grown()
        except OSError as error:
            self._session.end(f"the source's file: {error.strerror}")
            return
        if self._timer is not None:
            self._timer = self._loop.call_later(0 if more else POLL_INTERVAL, self._look)

    def _grown(self) -> bool:
        """Give the session what is new; whether there may be more at once."""
        size = os.fstat(self.file).st_size
        if size < self._at:
            raise OSError(errno.ESTALE, "it was cut short")
        parts: list[Payload] = []
        for _ in range(RECEIVES):
            length = min(size - self._at, self._most)
            if not length:
                break
            parts += self._cut(Slice(self._at, length))
            self._at += length
        if parts:
            self._session.take(parts)
        return size > self._at

    def _cut(self, part: Slice) -> list[Payload]:
        if self._framer is None:
            self._positions.append(part.offset, part.length)
            return [part]
        parts: list[Payload] = []
        for entry in self._framer.feed(self.read(part)):
            parts.append(Slice(self._positions.end, len(entry)))
            self._positions.append(self._positions.end, len(entry))
        return parts

    def read(self, part: Slice) -> bytes:
        return os.pread(self.file, part.length, part.offset)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def release(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class RingFileReader(FileReader):
    """Nothing of it is believed but within the file; a writer that is quicker than this reader costs the bytes in between."""

    def __init__(self, session: UserSession, source: FileSource) -> None:
        super().__init__(session, source)
        self._ring, self._begin = RingReader(), source.offset
        self._overwritten = 0

    def _grown(self) -> bool:
        for _ in range(min(RECEIVES, self._session.options.ring_entries // 2)):
            piece = self._ring.read(self.file, self._at, self._most)
            if piece.position > self._at:
                self._miss(piece.position)
            self._at = piece.position + len(piece.data)
            entries = self._entries(piece.data) + (self._rest() if piece.ended else [])
            if entries:
                self._session.take(entries)
            if piece.ended:
                self._session.end("the source's ring was ended")
            if not piece.data or piece.ended:
                return False
        return True

    def _miss(self, position: int) -> None:
        """No entry spans a gap. What was overwritten before this session began is not its loss."""
        if self._at > self._begin:
            self._overwritten += position - self._at
        rest = self._rest()
        if rest:
            self._session.take(rest)
        self._positions.end = position

    def _rest(self) -> list[Payload]:
        rest = self._framer.flush() if self._framer else b""
        return self._entry(rest) if rest else []

    def _entries(self, data: bytes) -> list[Payload]:
        if self._framer is None:
            return self._entry(data) if data else []
        return [part for entry in self._framer.feed(data) for part in self._entry(entry)]

    def _entry(self, data: bytes) -> list[Payload]:
        self._positions.append(self._positions.end, len(data))
        return [data]

    def dropped(self) -> dict[str, int]:
        return {"overwritten": self._overwritten} if self._overwritten else {}
