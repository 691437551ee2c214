# SPDX-License-Identifier: Apache-2.0
"""What a frozen socket does not take is kept, not lost.

A socket filter that only drops packets costs the client a retransmission timeout (200 ms and more) whenever it speaks
within the few hundred microseconds of a handoff. This filter is a 30-instruction eBPF program instead: it drops the
packet *and* copies it into a ring that all frozen sockets of the process share. Once the connection has its new owner,
the copies are put back on the road (`hypervisor_svc/inject.py`), and TCP itself sorts out order and duplicates.

One ring record::

    u32 length | u32 unused | u64 socket cookie | TCP header and payload, `length` bytes

Where bpf(2) is refused, `classic_drop()` gives a filter that only drops; status says so.
Sources: bpf(2), Documentation/bpf/ringbuf.rst, net/core/filter.c (sk_filter_trim_cap).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import socket
import struct
from collections.abc import Iterator
from types import TracebackType

from guest_agent.handoff import kernel

RING_BYTES = 4 << 20
SMALL, LARGE = 2048, 65536 + 64
_RECORD = struct.Struct("=IIQ")
_POSITION = struct.Struct("=Q")
_BUSY, _DISCARDED = 1 << 31, 1 << 30

_SYS_BPF = {"x86_64": 321, "aarch64": 280}.get(platform.machine(), -1)
_MAP_CREATE, _PROG_LOAD = 0, 5
_MAP_TYPE_RINGBUF, _PROG_TYPE_SOCKET_FILTER = 27, 1
_SKB_LOAD_BYTES, _GET_SOCKET_COOKIE, _RINGBUF_RESERVE, _RINGBUF_SUBMIT = 26, 46, 131, 132
_ADAPTIVE_WAKEUP = 0

_libc = ctypes.CDLL(None, use_errno=True)


def _instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("=BBhi", code, to | source << 4, offset, immediate)


def _copy_into(size: int, map_fd: int, to_exit: int) -> list[bytes]:
    """Reserve `size` bytes, fill in the record and submit it; `to_exit` instructions follow before the exit."""
    load_map = struct.pack("=BBhi", 0x18, 1 | 1 << 4, 0, map_fd) + struct.pack("=BBhi", 0, 0, 0, 0)
    body = [
        _instruction(0xBF, 8, 0),  # r8 = r0: the record
        _instruction(0x63, 8, 7, 0),  # record.length = r7
        _instruction(0xBF, 1, 6),
        _instruction(0x85, immediate=_GET_SOCKET_COOKIE),
        _instruction(0x7B, 8, 0, 8),  # record.cookie
        _instruction(0xBF, 1, 6),
        _instruction(0xB7, 2, immediate=0),
        _instruction(0xBF, 3, 8),
        _instruction(0x07, 3, immediate=_RECORD.size),
        _instruction(0xBF, 4, 7),
        _instruction(0x85, immediate=_SKB_LOAD_BYTES),
        _instruction(0xBF, 1, 8),
        _instruction(0xB7, 2, immediate=_ADAPTIVE_WAKEUP),
        _instruction(0x85, immediate=_RINGBUF_SUBMIT),
    ]
    return [
        load_map[:8],
        load_map[8:],
        _instruction(0xB7, 2, immediate=size),
        _instruction(0xB7, 3, immediate=0),
        _instruction(0x85, immediate=_RINGBUF_RESERVE),
        _instruction(0x15, 0, 0, len(body) + to_exit),  # the ring is full: drop only
        *body,
    ]


def _program(map_fd: int) -> bytes:
    exit_ = [_instruction(0xB7, 0, immediate=0), _instruction(0x95)]
    large = _copy_into(LARGE, map_fd, 0)
    small = [*_copy_into(SMALL, map_fd, 1 + len(large)), _instruction(0x05, 0, 0, len(large))]
    start = [
        _instruction(0xBF, 6, 1),  # r6 = skb
        _instruction(0x61, 7, 6, 0),  # r7 = skb->len, from the TCP header on
        _instruction(0xA5, 7, 0, 2 + len(small) + len(large), 20),  # shorter than a TCP header
        _instruction(0x25, 7, 0, 1 + len(small) + len(large), LARGE - _RECORD.size),
        _instruction(0x25, 7, 0, len(small), SMALL - _RECORD.size),
    ]
    return b"".join([*start, *small, *large, *exit_])


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, 128)
    result: int = _libc.syscall(_SYS_BPF, command, buffer, 128)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"bpf(2): {os.strerror(ctypes.get_errno())}")
    return result


def _load(program: bytes) -> int:
    code, licence = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(1 << 16)
    attributes = struct.pack(
        "=IIQQIIQ",
        _PROG_TYPE_SOCKET_FILTER,
        len(program) // 8,
        ctypes.addressof(code),
        ctypes.addressof(licence),
        1,
        len(log),
        ctypes.addressof(log),
    )
    try:
        return _bpf(_PROG_LOAD, attributes)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} {log.value.decode(errors='replace')[-400:]}") from None


class Hold:
    """The ring and the filter of this process. `drain()` yields what frozen sockets did not take.

    Raises OSError where the kernel refuses bpf(2) (no CAP_BPF, lockdown, no CONFIG_BPF_SYSCALL)."""

    def __init__(self) -> None:
        self._map_fd = _bpf(_MAP_CREATE, struct.pack("=IIII", _MAP_TYPE_RINGBUF, 0, 0, RING_BYTES))
        page = mmap.PAGESIZE
        self._consumer = mmap.mmap(self._map_fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(
            self._map_fd, page + 2 * RING_BYTES, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )
        self._data = memoryview(self._producer)[page:]
        self._position = 0
        self.program_fd = _load(_program(self._map_fd))

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the ring and the program; frozen sockets keep their reference until they thaw."""
        self._data.release()
        self._producer.close()
        self._consumer.close()
        os.close(self.program_fd)
        os.close(self._map_fd)

    def fileno(self) -> int:
        """Readable (epoll) when packets were kept."""
        return self._map_fd

    def drain(self) -> Iterator[tuple[int, bytes]]:
        """Yield (socket cookie, TCP segment) for every packet kept since the last call, oldest first."""
        while self._position < _POSITION.unpack_from(self._producer)[0]:
            at = self._position % RING_BYTES
            header = int.from_bytes(self._data[at : at + 4], "little")
            if header & _BUSY:
                return
            record = None if header & _DISCARDED else self._record(at + 8)
            size = header & ~(_BUSY | _DISCARDED)
            self._position += (size + 8 + 7) & ~7
            _POSITION.pack_into(self._consumer, 0, self._position)
            if record is not None:
                yield record

    def _record(self, at: int) -> tuple[int, bytes]:
        length, _, cookie = _RECORD.unpack_from(self._data, at)
        start = at + _RECORD.size
        return cookie, bytes(self._data[start : start + length])


def attach(sock: socket.socket, hold: Hold | None) -> None:
    """Let the socket take no packet from now on; with a `hold` they are kept."""
    if hold is not None:
        sock.setsockopt(socket.SOL_SOCKET, kernel.SO_ATTACH_BPF, hold.program_fd)
    else:
        sock.setsockopt(socket.SOL_SOCKET, kernel.SO_ATTACH_FILTER, _CLASSIC_DROP)


def detach(sock: socket.socket) -> None:
    """Let the socket take packets again; one that was never frozen is left alone."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, kernel.SO_DETACH_FILTER, 0)
    except FileNotFoundError:
        return


# struct sock_fprog of one instruction `ret 0`; both buffers live as long as the module.
_RETURN_ZERO = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0), 8)
_CLASSIC_DROP = struct.pack("=HxxxxxxQ", 1, ctypes.addressof(_RETURN_ZERO))
