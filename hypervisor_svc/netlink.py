# SPDX-License-Identifier: Apache-2.0
"""A plain netlink socket to the kernel's netfilter: several messages out in one sendto(2), their acknowledgements back.

The kernel works the messages off before sendto returns, so reading the acknowledgements never waits. Layout:
include/uapi/linux/netlink.h, include/uapi/linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

REQUEST, ACK, EXCL, CREATE, DUMP = 0x1, 0x4, 0x200, 0x400, 0x300
NESTED = 0x8000

_NETLINK_NETFILTER, _SOL_NETLINK, _CAP_ACK = 12, 270, 10
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_GENERIC = struct.Struct("!BBH")  # family, version, resource
_ATTRIBUTE = struct.Struct("=HH")
_NUMBER = struct.Struct("=i")
_PATIENCE = struct.pack("=qq", 5, 0)  # struct timeval
_BUFFER = 1 << 18


def attribute(kind: int, payload: bytes) -> bytes:
    """struct nlattr and its payload, padded to four bytes."""
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nest(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NESTED, b"".join(attributes))


def message(kind: int, flags: int, sequence: int, *, family: int, body: bytes, resource: int = 0) -> bytes:
    """One message: nlmsghdr, nfgenmsg, attributes."""
    length = _HEADER.size + _GENERIC.size + len(body)
    return _HEADER.pack(length, kind, flags | REQUEST, sequence, 0) + _GENERIC.pack(family, 0, resource) + body


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each attribute's type (without flags) and payload."""
    at = 0
    while at + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4:
            return
        yield kind & ~NESTED, data[at + 4 : at + length]
        at += (length + 3) & ~3


class Netlink:
    """One socket in the network namespace in which it was made. Methods raise OSError."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._socket.bind((0, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)  # settimeout() would poll each time
        self._buffer = bytearray(_BUFFER)
        self._sequence = 0

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._socket.close()

    def next(self) -> int:
        """A sequence number: acknowledgements are told apart by it, so a late one is never taken for another's."""
        self._sequence = self._sequence % 0x7FFFFFFF + 1
        return self._sequence

    def transact(self, messages: bytes, *sequences: int) -> list[int]:
        """Send messages; the errno (0: done) of those with these sequence numbers. Only the last one need ask for an
        acknowledgement: they are answered in order, and errors always."""
        self._socket.send(messages)
        results: dict[int, int] = {}
        while sequences[-1] not in results:
            for kind, sequence, payload in self._receive():
                if kind == _ERROR and sequence in sequences:
                    results.setdefault(sequence, -_NUMBER.unpack_from(payload)[0])
        return [results.get(sequence, 0) for sequence in sequences]

    def dump(self, request: bytes, sequence: int) -> Iterator[bytes]:
        """Send a dump request; the attributes of each answer."""
        self._socket.send(request)
        while True:
            for kind, number, payload in self._receive():
                if number != sequence:
                    continue
                if kind == _ERROR:
                    check(-_NUMBER.unpack_from(payload)[0], "netlink dump")
                if kind in (_ERROR, _DONE):
                    return
                yield payload[_GENERIC.size :]

    def _receive(self) -> list[tuple[int, int, bytes]]:
        size, at = self._socket.recv_into(self._buffer), 0
        found = []
        while at + _HEADER.size <= size:
            length, kind, _, sequence, _ = _HEADER.unpack_from(self._buffer, at)
            if length < _HEADER.size:
                break
            found.append((kind, sequence, bytes(self._buffer[at + _HEADER.size : at + length])))
            at += (length + 3) & ~3
        return found


def check(code: int, what: str, *, fine: tuple[int, ...] = (errno.ENOENT,)) -> bool:
    """Whether an acknowledgement says that it was done; False for `fine` errors, OSError for others."""
    if code and code not in fine:
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return code == 0
