# SPDX-License-Identifier: Apache-2.0
"""The same bytes to many sockets, in one call.

Each function gives its bytes to `count` sockets of `fds` (an `array("i")`) from index `start` on, the first after the last,
without ever waiting. It returns those that did not take everything, as (index, result): what was taken (bytes of a stream,
whole datagrams of several), or the negative errno.

`fanout.c` does it between two looks at the interpreter, hundreds of sockets in one system call where the kernel has io_uring(7)
(`send_ring.h`); where it was not built, Python does the same, one call a socket (`NATIVE` tells). A burst is one send of many
datagrams of `size` bytes, of which the last may be shorter (UDP_SEGMENT, udp(7)): all or nothing. Its `size` counts, not the
socket's (`set_segment`); 0: it is one datagram."""

from __future__ import annotations

import errno
import os
import socket
import struct
from array import array
from collections.abc import Callable, Sequence

Misfits = list[tuple[int, int]]
Buffer = bytes | memoryview
MAX_BUFFERS = 1024
"""IOV_MAX: how many buffers one send takes."""
MAX_BURST = 64
"""UDP_MAX_SEGMENTS of Linux: datagrams of one burst."""
MAX_BURST_BYTES = 65_000
_UDP_SEGMENT = 103
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def set_segment(sock: socket.socket, size: int) -> bool:
    """The length of the datagrams that a send of more bytes is cut into; 0: none is. Whether the socket can do that."""
    try:
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, size)
    except OSError:
        return False
    return True


def _each(fds: array[int], start: int, count: int, send: Callable[[int], int], whole: int) -> Misfits:
    if not (start >= 0 and 0 <= count <= len(fds) and (start < len(fds) or not count)):
        raise ValueError(f"{count} sockets from {start} on, of {len(fds)}")
    misfits = []
    for turn in range(count):
        index = (start + turn) % len(fds)
        try:
            taken = send(fds[index])
        except OSError as error:
            taken = -(error.errno or errno.EIO)
        if taken != whole:
            misfits.append((index, taken))
    return misfits


def _python_stream(fds: array[int], start: int, count: int, buffers: Sequence[Buffer]) -> Misfits:
    def send(fd: int) -> int:
        with _borrowed(fd) as sock:
            return sock.sendmsg(buffers, (), _FLAGS)

    return _each(fds, start, count, send, sum(map(len, buffers)))


def _python_datagrams(fds: array[int], start: int, count: int, buffers: Sequence[Buffer]) -> Misfits:
    def send(fd: int) -> int:
        with _borrowed(fd) as sock:
            for sent, payload in enumerate(buffers):
                try:
                    sock.send(payload, _FLAGS)
                except OSError:
                    if sent:
                        return sent
                    raise
        return len(buffers)

    return _each(fds, start, count, send, len(buffers))


def _python_burst(fds: array[int], start: int, count: int, buffers: Sequence[Buffer], size: int) -> Misfits:
    control = [(socket.IPPROTO_UDP, _UDP_SEGMENT, struct.pack("=H", size))]

    def send(fd: int) -> int:
        with _borrowed(fd) as sock:
            return sock.sendmsg(buffers, control, _FLAGS)

    return _each(fds, start, count, send, sum(map(len, buffers)))


def _python_file(fds: array[int], start: int, count: int, file: int, offset: int, length: int) -> Misfits:
    return _each(fds, start, count, lambda fd: os.sendfile(fd, file, offset, length), length)


class _borrowed:
    """A socket object for a descriptor that stays its owner's."""

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fd)

    def __enter__(self) -> socket.socket:
        return self._sock

    def __exit__(self, *exception: object) -> None:
        self._sock.detach()


try:
    import streamlift_fanout as _native

    NATIVE = True
except ImportError:
    NATIVE = False

send_stream: Callable[[array[int], int, int, Sequence[Buffer]], Misfits] = _native.send_stream if NATIVE else _python_stream
send_datagrams: Callable[[array[int], int, int, Sequence[Buffer]], Misfits]
send_datagrams = _native.send_datagrams if NATIVE else _python_datagrams
send_burst: Callable[[array[int], int, int, Sequence[Buffer], int], Misfits] = _native.send_burst if NATIVE else _python_burst
send_file: Callable[[array[int], int, int, int, int, int], Misfits] = _native.send_file if NATIVE else _python_file
