# SPDX-License-Identifier: Apache-2.0
"""A relay in this process: what `offload.publish` does when the host cannot.

One task reads the source into a ring of entries, one task per sink sends from it; a sink that is slower than the ring loses
whole entries, and nobody else notices. Simple, and as good as a server's own loop: a few hundred clients. Where a sink stands is
told as at the host (`handoff/positions.py`), so it can go on there."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import IO, Any

from guest_agent import local
from guest_agent.handoff.positions import Positions
from guest_agent.handoff.ring_file import Piece, RingReader
from guest_agent.held_files import held
from guest_agent.ring import Ring

POLL_INTERVAL = 0.02
"""Seconds between two looks at a file."""
LOOK_BYTES = 1 << 16
"""Of a ring, read in one look."""
AWAY_LIMIT = 60.0
"""Seconds for which a ring's file may be missing: its share is unmounted while the VM moves."""
Entries = AsyncIterator[tuple[int, bytes]]
"""What comes, each with its position."""


@dataclass(frozen=True)
class Ending:
    """How a sink left: bytes that it got, why (None: it was removed or the source ended), and the position where it would have
    gone on. `alive`: its socket is usable."""

    sent: int
    reason: str | None
    message: str
    cursor: int | None
    alive: bool


class LocalSink:
    """One client of `relay`: `cursor` is the entry that it gets next, `offset` the byte of it where it begins, `early` the position
    that the source must reach first. `over` is done when it has left."""

    def __init__(self, relay: LocalRelay, target: Any, cursor: int) -> None:
        self.relay, self.target, self.cursor = relay, target, cursor
        self.offset = 0
        self.early: int | None = None
        self.sent = self.lost = 0
        self.removed = False
        self.over: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None

    def leave(self, position: int, reason: str | None, message: str = "", *, alive: bool = True) -> None:
        """At an entry's end, unless it is dead."""
        if not self.over.done():
            self.over.set_result(Ending(self.sent, reason, message, position, alive))


class LocalRelay:
    """See `begin`. `over` is done when the source gives no more: why. With `on_idle` it ends when its last sink has left, and says
    so."""

    def __init__(self, source: Entries, *, ring_entries: int, positions: Positions, by_bytes: bool) -> None:
        self._source, self._positions, self._by_bytes = source, positions, by_bytes
        self._ring: deque[bytes] = deque(maxlen=ring_entries)
        self._sinks: set[LocalSink] = set()
        self._more = asyncio.Condition()
        self.on_idle: Callable[[], None] | None = None
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.get_running_loop().create_task(self._read())

    @property
    def head(self) -> int:
        """The position behind the newest entry."""
        return self._positions.end

    @property
    def _head(self) -> int:
        return self._positions.head

    @property
    def _tail(self) -> int:
        return self._positions.tail

    async def _read(self) -> None:
        why = "the source's ring was ended" if self._by_bytes else "the source closed its connection"
        try:
            async for position, data in self._source:
                self._ring.append(data)
                self._positions.append(position, len(data) if self._by_bytes else 1)
                await self._wake()
        except OSError as error:
            why = str(error)
        except asyncio.CancelledError:
            why = "closed"
        finally:
            if not self.over.done():
                self.over.set_result(why)
            with contextlib.suppress(asyncio.CancelledError):
                await self._wake()

    async def _wake(self) -> None:
        async with self._more:
            self._more.notify_all()

    def add_sink(self, target: Any, *, join: str, begin: int | None) -> LocalSink:
        """Join rules as at the host, but that the next sync point is the next entry. Raises OSError."""
        if isinstance(target, ssl.SSLSocket):
            raise OSError(errno.EOPNOTSUPP, "asyncio cannot send on an SSLSocket: give its transport, or the StreamWriter")
        sink = LocalSink(self, target, self._tail if join == "oldest" else self._head)
        sink.early = begin if begin is None or self._by_bytes else min(begin, self._positions.end)
        self._sinks.add(sink)
        sink.task = asyncio.get_running_loop().create_task(self._send(sink))
        sink.over.add_done_callback(lambda _: self._left(sink))
        return sink

    def _left(self, sink: LocalSink) -> None:
        self._sinks.discard(sink)
        if self.on_idle is not None and not self._sinks:
            self.end()
            self.on_idle()

    def keeps(self, position: int) -> bool:
        """Whether what begins there is still here."""
        return self._positions.of(self._tail) <= position

    async def _send(self, sink: LocalSink) -> None:
        resume = local.pause_reading(_transport(sink.target))
        try:
            while not sink.removed:
                if not self._has_something_for(sink):
                    if self.over.done():
                        break
                    async with self._more:
                        await self._more.wait_for(
                            lambda: sink.removed or self._has_something_for(sink) or self.over.done()
                        )
                    continue
                data = self._next(sink)
                await _send_all(sink.target, data)
                sink.sent += len(data)
                sink.cursor += 1
            sink.leave(self._position(sink), None)
        except OSError as error:
            sink.leave(self._position(sink), "peer_gone", str(error), alive=False)
        finally:
            if resume is not None:
                resume()

    def _has_something_for(self, sink: LocalSink) -> bool:
        found = self._positions.find(sink.early) if sink.early is not None else None
        if found is not None:
            (sink.cursor, sink.offset), sink.early = found, None
        return sink.early is None and sink.cursor < self._head

    def _next(self, sink: LocalSink) -> bytes:
        """What it gets now; what is before the ring is lost."""
        lost = max(self._tail - sink.cursor, 0)
        offset = 0 if lost else sink.offset
        sink.lost, sink.cursor, sink.offset = sink.lost + lost, sink.cursor + lost, 0
        return self._ring[sink.cursor - self._tail][offset:]

    def _position(self, sink: LocalSink) -> int:
        return self._positions.of(sink.cursor) if sink.early is None else sink.early

    async def remove(self, sink: LocalSink) -> None:
        """At the end of the entry that it is in the middle of."""
        sink.removed = True
        await self._wake()

    def end(self) -> None:
        """Read no more; the sinks get what is here, and leave."""
        self._reader.cancel()
        if not self.over.done():  # a task that has not begun has no end either
            self.over.set_result("closed")
        self._waking = asyncio.get_running_loop().create_task(self._wake())

    async def stop(self) -> None:
        """The same, and the source is nobody's when this returns: what it has not given is still there."""
        self.end()
        await asyncio.wait((self._reader,))

    async def close(self) -> None:
        """Everybody leaves."""
        self.end()
        for sink in list(self._sinks):
            sink.removed = True
        await self._wake()

    def status(self) -> dict[str, Any]:
        """As much as there is to tell."""
        lost = sum(sink.lost for sink in self._sinks)
        return {"engine": "local", "head": self._head, "tail": self._tail, "sink_count": len(self._sinks), "lost": lost}


def begin(source: Any, *, ring_entries: int, entry_bytes: int, offset: int, rest: bytes = b"") -> LocalRelay:
    """`source`: a non-blocking socket, a StreamReader, a file that grows, or a `Ring`. `offset`: the first position; `rest`: what
    has come already. Raises ValueError."""
    if isinstance(source, asyncio.StreamReader):
        parts = _stream_parts(source, entry_bytes)
    elif isinstance(source, socket.socket):
        parts = _socket_parts(source, entry_bytes)
    elif isinstance(source, asyncio.BaseTransport | asyncio.StreamWriter):
        raise ValueError("a transport cannot be read: publish the StreamReader's socket")
    else:
        of_ring = isinstance(source, Ring)
        entries = _ring_entries(source.path, offset, entry_bytes) if of_ring else _file_entries(source, offset, entry_bytes)
        positions = Positions(ring_entries, offset, usual=entry_bytes)
        return LocalRelay(entries, ring_entries=ring_entries, positions=positions, by_bytes=True)
    counted = _counted(parts, offset, rest)
    return LocalRelay(counted, ring_entries=ring_entries, positions=Positions(ring_entries, offset, usual=1), by_bytes=False)


async def _counted(parts: AsyncIterator[bytes], number: int, rest: bytes) -> Entries:
    """Of a source without positions of its own the entries are counted."""
    if rest:
        yield number, rest
        number += 1
    async for part in parts:
        yield number, part
        number += 1


async def _socket_parts(sock: socket.socket, size: int) -> AsyncIterator[bytes]:
    """Whoever cancels this has taken nothing with it: nothing is waited for between a part's receipt and its place in the ring."""
    size = 65536 if sock.type == socket.SOCK_DGRAM else size
    while True:
        try:
            data = sock.recv(size)
        except BlockingIOError:
            await _readable(sock)
            continue
        if not data:
            return
        yield data


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(sock)


async def _stream_parts(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while data := await reader.read(size):
        yield data


async def _file_entries(file: IO[bytes], offset: int, size: int) -> Entries:
    fd = os.dup(file.fileno())
    try:
        with held(fd) as hold:
            while True:
                hold.check()
                data = os.pread(fd, size, offset)
                if data:
                    yield offset, data
                    offset += len(data)
                elif os.fstat(fd).st_size < offset and not hold.away:
                    raise OSError(errno.ESTALE, "the file was cut short")
                else:
                    await asyncio.sleep(POLL_INTERVAL)
    finally:
        os.close(fd)


async def _ring_entries(path: str, offset: int, size: int) -> Entries:
    """The file is open during each look alone, for its share must be free to go; while it is gone, this waits."""
    ring, loop = RingReader(), asyncio.get_running_loop()
    seen = loop.time()
    while True:
        try:
            with open(path, "rb", buffering=0) as file:
                piece = ring.read(file.fileno(), offset, LOOK_BYTES)
            seen = loop.time()
        except FileNotFoundError:
            if loop.time() - seen > AWAY_LIMIT:
                raise
            piece = Piece(offset, b"", False)
        for at in range(0, len(piece.data), size):
            yield piece.position + at, piece.data[at : at + size]
        offset = piece.position + len(piece.data)
        if piece.ended:
            return
        if not piece.data:
            await asyncio.sleep(POLL_INTERVAL)


async def _send_all(target: Any, data: bytes) -> None:
    transport = _transport(target)
    if transport is None:
        if target.type == socket.SOCK_DGRAM:
            with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                target.send(data)
        else:
            await asyncio.get_running_loop().sock_sendall(target, data)
        return
    transport.write(data)
    await local.drain(transport)


def _transport(target: Any) -> Any:
    if isinstance(target, asyncio.StreamWriter):
        return target.transport
    return target if isinstance(target, asyncio.BaseTransport) else None
