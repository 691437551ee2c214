# SPDX-License-Identifier: Apache-2.0
"""A byte stream on a file descriptor in an asyncio loop: reads as data comes, writes without ever blocking.

Both ends of the channel use it: a virtio port in the guest, QEMU's Unix socket on the host. Transports of asyncio are for
sockets and pipes only, and add a copy and a callback to every message."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

READ_SIZE = 1 << 18
MAX_BACKLOG = 64 << 20


class Stream:
    """`on_data(bytes)` for what comes, `on_lost()` once when the other end is gone or does not read any more."""

    def __init__(self, fd: int, *, on_data: Callable[[bytes], None], on_lost: Callable[[], None]) -> None:
        self._fd, self._on_data, self._on_lost = fd, on_data, on_lost
        self._backlog = bytearray()
        self._buffer = bytearray(READ_SIZE)
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._readable)

    def close(self) -> None:
        """Stop watching and close the descriptor; idempotent."""
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        os.close(self._fd)
        self._fd = -1

    def pause(self) -> None:
        """Do not read until `resume()`; the other end is held back."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)

    def resume(self) -> None:
        """Undo `pause()`."""
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._readable)

    @property
    def backlog(self) -> int:
        """Bytes that the other end has not taken yet."""
        return len(self._backlog)

    def write(self, data: bytes | bytearray) -> None:
        """Send now what goes and keep the rest; more than MAX_BACKLOG waiting counts as a lost peer."""
        if self._fd < 0:
            return
        if not self._backlog:
            data = data[self._write_some(data) :]
            if data and self._fd >= 0:
                self._loop.add_writer(self._fd, self._writable)
        self._backlog += data
        if len(self._backlog) > MAX_BACKLOG:
            self._lost()

    def _write_some(self, data: bytes | bytearray) -> int:
        done = 0
        view = memoryview(data)
        try:
            while done < len(view):
                done += os.write(self._fd, view[done:])
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._lost()
        return done

    def _writable(self) -> None:
        done = self._write_some(self._backlog)
        del self._backlog[:done]
        if not self._backlog and self._fd >= 0:
            self._loop.remove_writer(self._fd)

    def _readable(self) -> None:
        """All that is there, up to READ_SIZE: a virtio port gives a page at a time (virtio_console.c, fill_readbuf)."""
        room, got, over = memoryview(self._buffer), 0, False
        try:
            while got < READ_SIZE and not over:
                step = os.readv(self._fd, [room[got:]])
                got, over = got + step, not step
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            over = True
        if got:
            self._on_data(bytes(room[:got]))
        if over:
            self._lost()

    def _lost(self) -> None:
        if self._fd >= 0:
            self.close()
            self._on_lost()
