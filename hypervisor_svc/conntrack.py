# SPDX-License-Identifier: Apache-2.0
"""Connection tracking entries over ctnetlink, on a plain netlink socket: a few microseconds each.

The messages are those of include/uapi/linux/netfilter/nfnetlink_conntrack.h. Several go out in one sendto(2); every one is
acknowledged by the kernel, and its errno is read."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

from guest_agent.handoff.snapshot import Endpoint

MARK = 0x534C0000
MARK_MASK = 0xFFFF0000
"""Every entry of ours carries MARK in the upper half of its connection mark."""
TIMEOUT = 432000
"""Seconds: nf_conntrack_tcp_timeout_established."""

_NETLINK_NETFILTER = 12
_NEW, _GET, _DELETE = 0x100, 0x101, 0x102
_REQUEST, _ACK, _EXCL, _CREATE, _DUMP = 0x1, 0x4, 0x200, 0x400, 0x300
_NESTED = 0x8000
_ORIG, _REPLY, _STATUS, _PROTOINFO, _TIMEOUT, _MARK, _NAT_DST, _MARK_MASK = 1, 2, 3, 4, 7, 8, 13, 21
_SEEN_REPLY_ASSURED_CONFIRMED = 0x0E
_TCP, _ESTABLISHED, _BE_LIBERAL = 6, 3, 0x08
_MESSAGE_ERROR, _MESSAGE_DONE = 2, 3


def attribute(kind: int, payload: bytes) -> bytes:
    """struct nlattr and its payload, padded."""
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _nest(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(attributes))


def packed(address: str) -> bytes:
    """4 or 16 bytes, network order."""
    return socket.inet_pton(family_of(address), address)


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET or AF_INET6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _tuple(kind: int, source: Endpoint, to: Endpoint) -> bytes:
    first = 3 if ":" in source.address else 1
    addresses = _nest(1, attribute(first, packed(source.address)), attribute(first + 1, packed(to.address)))
    ports = struct.pack("!H", source.port), struct.pack("!H", to.port)
    protocol = _nest(2, attribute(1, bytes([_TCP])), attribute(2, ports[0]), attribute(3, ports[1]))
    return _nest(kind, addresses, protocol)


_LIBERAL = bytes([_BE_LIBERAL, _BE_LIBERAL])
_STATE = (
    attribute(_STATUS, struct.pack("!I", _SEEN_REPLY_ASSURED_CONFIRMED))
    + attribute(_TIMEOUT, struct.pack("!I", TIMEOUT))
    + _nest(
        _PROTOINFO,
        _nest(1, attribute(1, bytes([_ESTABLISHED])), attribute(4, _LIBERAL), attribute(5, _LIBERAL)),
    )
)


def _message(kind: int, flags: int, sequence: int, family: int, attributes: bytes) -> bytes:
    body = struct.pack("!BBH", family, 0, 0) + attributes
    return struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | flags, sequence, 0) + body


def encode_delete(client: Endpoint, server: Endpoint, sequence: int) -> bytes:
    """Delete the entry of which client -> server is one direction."""
    return _message(_DELETE, _ACK, sequence, family_of(client.address), _tuple(_ORIG, client, server))


def encode_create(client: Endpoint, server: Endpoint, to: Endpoint | None, sequence: int) -> bytes:
    """Create an established entry client -> server, whose packets go to `to` instead, if given (DNAT)."""
    attributes = _tuple(_ORIG, client, server) + _tuple(_REPLY, server, client) + _STATE
    if to is not None:
        address = packed(to.address)
        first = 4 if len(address) == 16 else 1
        port = struct.pack("!H", to.port)
        attributes += attribute(_MARK, struct.pack("!I", MARK)) + _nest(
            _NAT_DST,
            attribute(first, address),
            attribute(first + 1, address),
            _nest(3, attribute(1, port), attribute(2, port)),
        )
    return _message(_NEW, _ACK | _CREATE | _EXCL, sequence, family_of(client.address), attributes)


class Conntrack:
    """One netlink socket. Methods raise OSError with the kernel's errno."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.settimeout(5)
        self._sequence = 1

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._socket.close()

    def _next(self, count: int) -> int:
        first = self._sequence
        self._sequence = (self._sequence + count) & 0x7FFFFFFF or 1
        return first

    def replace(self, client: Endpoint, server: Endpoint, to: Endpoint | None) -> bool:
        """Delete the flow's entry and create a new one, in one message to the kernel. Returns whether there was one.

        On EEXIST a packet came in between and made an entry of its own: once more."""
        for _ in range(8):
            first = self._next(2)
            self._socket.send(encode_delete(client, server, first) + encode_create(client, server, to, first + 1))
            deleted, created = self._acknowledgements(2)
            if deleted not in (0, errno.ENOENT):
                raise OSError(deleted, f"conntrack delete: {os.strerror(deleted)}")
            if created == 0:
                return deleted == 0
            if created != errno.EEXIST:
                raise OSError(created, f"conntrack create: {os.strerror(created)}")
        raise OSError(errno.EEXIST, "conntrack create: the flow's entry keeps coming back")

    def delete(self, client: Endpoint, server: Endpoint) -> bool:
        """Delete the flow's entry; False if there is none."""
        self._socket.send(encode_delete(client, server, self._next(1)))
        (result,) = self._acknowledgements(1)
        if result not in (0, errno.ENOENT):
            raise OSError(result, f"conntrack delete: {os.strerror(result)}")
        return result == 0

    def _acknowledgements(self, count: int) -> list[int]:
        results: list[int] = []
        while len(results) < count:
            for kind, payload in _messages(self._socket.recv(65536)):
                if kind == _MESSAGE_ERROR:
                    results.append(-struct.unpack_from("=i", payload)[0])
        return results

    def flush_marked(self) -> int:
        """Delete every entry that carries our mark; returns how many."""
        found: list[tuple[socket.AddressFamily, bytes]] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            found += ((family, original) for original in self._marked(family))
        for family, original in found:
            self._socket.send(_message(_DELETE, _ACK, self._next(1), family, original))
            self._acknowledgements(1)
        return len(found)

    def _marked(self, family: socket.AddressFamily) -> Iterator[bytes]:
        """The original tuples of our entries, as attributes."""
        mark = attribute(_MARK, struct.pack("!I", MARK)) + attribute(_MARK_MASK, struct.pack("!I", MARK_MASK))
        self._socket.send(_message(_GET, _DUMP, self._next(1), family, mark))
        while True:
            for kind, payload in _messages(self._socket.recv(1 << 18)):
                if kind == _MESSAGE_DONE:
                    return
                if kind == _MESSAGE_ERROR:
                    raise OSError(-struct.unpack_from("=i", payload)[0], "conntrack dump")
                yield from (raw for number, raw in _attributes(payload[4:]) if number == _ORIG)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        yield kind, data[at + 16 : at + length]
        at += (length + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        padded = (length + 3) & ~3
        yield kind & ~_NESTED, data[at : at + padded]
        at += padded
