# SPDX-License-Identifier: Apache-2.0
"""A relay in this process: what `offload.publish` does when the host cannot.

One task reads the source into a ring of entries, one task per sink sends from it; a sink that is slower than the ring loses
whole entries, and nobody else notices. Simple, and as good as a server's own loop: a few hundred clients."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import IO, Any

from guest_agent import local

POLL_INTERVAL = 0.02
"""Seconds between two looks at a file that grows."""


@dataclass(frozen=True)
class Ending:
    """How a sink left: bytes that it got, why (None: it was removed or the source ended), and the entry that it would have got
    next. `alive`: its socket is usable."""

    sent: int
    reason: str | None
    message: str
    cursor: int | None
    alive: bool


class LocalSink:
    """One client. `over` is done when it has left."""

    def __init__(self, target: Any, cursor: int) -> None:
        self.target, self.cursor = target, cursor
        self.sent = self.lost = 0
        self.removed = False
        self.over: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None

    def leave(self, reason: str | None, message: str = "", *, alive: bool = True) -> None:
        """At an entry's end, unless it is dead."""
        if not self.over.done():
            self.over.set_result(Ending(self.sent, reason, message, self.cursor, alive))


class LocalRelay:
    """See `begin`. `over` is done when the source gives no more: why."""

    def __init__(self, source: AsyncIterator[bytes], *, ring_entries: int) -> None:
        self._source, self._capacity = source, ring_entries
        self._ring: deque[bytes] = deque()
        self._head = 0
        self._sinks: set[LocalSink] = set()
        self._more = asyncio.Condition()
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.get_running_loop().create_task(self._read())

    @property
    def _tail(self) -> int:
        return self._head - len(self._ring)

    async def _read(self) -> None:
        why = "the source closed its connection"
        try:
            async for data in self._source:
                self._ring.append(data)
                self._head += 1
                if len(self._ring) > self._capacity:
                    self._ring.popleft()
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
        """Join rules as at the host, but that the next sync point is the next entry."""
        cursor = min(begin, self._head) if begin is not None else self._tail if join == "oldest" else self._head
        sink = LocalSink(target, cursor)
        self._sinks.add(sink)
        sink.task = asyncio.get_running_loop().create_task(self._send(sink))
        sink.over.add_done_callback(lambda _: self._sinks.discard(sink))
        return sink

    async def _send(self, sink: LocalSink) -> None:
        resume = local.pause_reading(_transport(sink.target))
        try:
            while not sink.removed:
                if sink.cursor >= self._head:
                    if self.over.done():
                        break
                    async with self._more:
                        await self._more.wait_for(lambda: sink.removed or sink.cursor < self._head or self.over.done())
                    continue
                sink.lost += max(self._tail - sink.cursor, 0)
                sink.cursor = max(self._tail, sink.cursor)
                data = self._ring[sink.cursor - self._tail]
                await _send_all(sink.target, data)
                sink.sent += len(data)
                sink.cursor += 1
            sink.leave(None)
        except OSError as error:
            sink.leave("peer_gone", str(error), alive=False)
        finally:
            if resume is not None:
                resume()

    async def remove(self, sink: LocalSink) -> None:
        """At the end of the entry that it is in the middle of."""
        sink.removed = True
        await self._wake()

    async def close(self) -> None:
        """Everybody leaves."""
        self._reader.cancel()
        if not self.over.done():  # a task that has not begun has no end either
            self.over.set_result("closed")
        for sink in list(self._sinks):
            sink.removed = True
        await self._wake()

    def status(self) -> dict[str, Any]:
        """As much as there is to tell."""
        lost = sum(sink.lost for sink in self._sinks)
        return {"engine": "local", "head": self._head, "tail": self._tail, "sink_count": len(self._sinks), "lost": lost}


def begin(source: Any, *, ring_entries: int, entry_bytes: int, offset: int) -> LocalRelay:
    """`source`: a non-blocking socket, a StreamReader, or a file that grows. Raises ValueError."""
    if isinstance(source, asyncio.StreamReader):
        return LocalRelay(_stream_entries(source, entry_bytes), ring_entries=ring_entries)
    if isinstance(source, socket.socket):
        return LocalRelay(_socket_entries(source, entry_bytes), ring_entries=ring_entries)
    if isinstance(source, asyncio.BaseTransport | asyncio.StreamWriter):
        raise ValueError("a transport cannot be read: publish the StreamReader's socket")
    return LocalRelay(_file_entries(source, offset, entry_bytes), ring_entries=ring_entries)


async def _socket_entries(sock: socket.socket, size: int) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(sock, 65536 if sock.type == socket.SOCK_DGRAM else size):
        yield data


async def _stream_entries(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while data := await reader.read(size):
        yield data


async def _file_entries(file: IO[bytes], offset: int, size: int) -> AsyncIterator[bytes]:
    fd = os.dup(file.fileno())
    try:
        while True:
            data = os.pread(fd, size, offset)
            offset += len(data)
            if data:
                yield data
            elif os.fstat(fd).st_size < offset:
                raise OSError(errno.ESTALE, "the file was cut short")
            else:
                await asyncio.sleep(POLL_INTERVAL)
    finally:
        os.close(fd)


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
