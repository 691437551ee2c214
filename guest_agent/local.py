# SPDX-License-Identifier: Apache-2.0
"""The transfer without us: what `offload` does whenever the host cannot or need not serve a file.

sendfile(2) where the kernel can, read and send where it cannot (TLS, exotic file systems, event loops without sendfile).
The file's position is neither used nor, by the blocking call, changed: many transfers may share one file object."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import ssl
from collections.abc import Callable
from typing import IO, Any

MAX_SENDFILE = 0x7FFFF000
"""Bytes that one sendfile(2) takes at most (MAX_RW_COUNT in the kernel)."""
COPY_CHUNK = 1 << 17
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def send(sock: socket.socket, file: IO[bytes], offset: int, count: int) -> int:
    """Send `count` bytes of `file` from `offset`; returns how many, fewer only if the file ends early.

    A timeout of the socket bounds each wait for room, not the whole: TimeoutError. Else OSError as from the kernel."""
    if isinstance(sock, ssl.SSLSocket):
        return _copy(sock, file.fileno(), offset, count)
    sent = 0
    while sent < count:
        try:
            moved = os.sendfile(sock.fileno(), file.fileno(), offset + sent, min(count - sent, MAX_SENDFILE))
        except BlockingIOError:
            _wait_for_room(sock)
            continue
        except OSError as error:
            if error.errno in _CANNOT and not sent:
                return _copy(sock, file.fileno(), offset, count)
            raise
        if not moved:
            break
        sent += moved
    return sent


def _wait_for_room(sock: socket.socket) -> None:
    """Until the peer took something, within the socket's timeout (None: for ever, as SO_SNDTIMEO does not exist here)."""
    timeout = sock.gettimeout()
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    if not poll.poll(None if timeout is None else timeout * 1000):
        raise TimeoutError(f"the peer took nothing for {timeout} s")


def _copy(sock: socket.socket, file_fd: int, offset: int, count: int) -> int:
    sent = 0
    while sent < count:
        data = os.pread(file_fd, min(count - sent, COPY_CHUNK), offset + sent)
        if not data:
            break
        sock.sendall(data)
        sent += len(data)
    return sent


async def send_on_socket(sock: socket.socket, file: IO[bytes], offset: int, count: int) -> int:
    """`send` for a non-blocking socket of the running loop."""
    return await asyncio.get_running_loop().sock_sendfile(sock, file, offset, count)


async def send_on_transport(transport: asyncio.WriteTransport, file: IO[bytes], offset: int, count: int) -> int:
    """`send` for a transport: after what it has buffered, with its reading paused (the loop sees to both)."""
    loop = asyncio.get_running_loop()
    try:
        return await loop.sendfile(transport, file, offset, count)
    except NotImplementedError:  # uvloop
        return await _write(transport, file.fileno(), offset, count)


async def _write(transport: asyncio.WriteTransport, file_fd: int, offset: int, count: int) -> int:
    sent = 0
    while sent < count:
        data = os.pread(file_fd, min(count - sent, COPY_CHUNK), offset + sent)
        if not data:
            break
        await drain(transport)
        transport.write(data)
        sent += len(data)
    return sent


def pause_reading(transport: Any) -> Callable[[], None] | None:
    """The loop must not watch a socket that is restored in place; returns what undoes it."""
    if transport is None or not transport.is_reading():
        return None
    transport.pause_reading()

    def resume() -> None:
        if not transport.is_closing():
            transport.resume_reading()

    return resume


async def drain(transport: asyncio.WriteTransport) -> None:
    """Until the transport has given all that was written to the kernel. Raises ConnectionError if it closes first."""
    if transport.is_closing():
        raise ConnectionResetError(errno.ECONNRESET, "the transport is closing")
    if not transport.get_write_buffer_size():
        return
    low, high = transport.get_write_buffer_limits()
    # The protocol is the application's and hears what it would have heard; we listen in for the one call we need.
    listener = _Listener(transport.get_protocol())
    transport.set_protocol(listener)
    try:
        transport.set_write_buffer_limits(high=0)
        await listener.drained
    finally:
        if transport.get_protocol() is listener:
            transport.set_protocol(listener.protocol)
        transport.set_write_buffer_limits(high=high, low=low)


class _Listener(asyncio.Protocol):
    """Stands in for a protocol until the write buffer is empty; passes everything on."""

    def __init__(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol: Any = protocol
        self.drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def pause_writing(self) -> None:
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        self.protocol.resume_writing()
        if not self.drained.done():
            self.drained.set_result(None)

    def data_received(self, data: bytes) -> None:
        if isinstance(self.protocol, asyncio.BufferedProtocol):
            _deliver(self.protocol, data)
        else:
            self.protocol.data_received(data)

    def eof_received(self) -> bool | None:
        keep_open: bool | None = self.protocol.eof_received()
        return keep_open

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.drained.done():
            self.drained.set_exception(exc or ConnectionResetError(errno.ECONNRESET, "the transport was closed"))
        self.protocol.connection_lost(exc)


def _deliver(protocol: asyncio.BufferedProtocol, data: bytes) -> None:
    while data:
        buffer = memoryview(protocol.get_buffer(len(data)))
        size = min(len(buffer), len(data))
        buffer[:size] = data[:size]
        protocol.buffer_updated(size)
        data = data[size:]
