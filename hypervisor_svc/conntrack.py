# SPDX-License-Identifier: Apache-2.0
"""Connection tracking entries over ctnetlink: the NAT of one flow is one entry and no rule; a few microseconds each.

An entry knows its flow by two tuples, and a mapping makes them differ::

    original   client -> server, what the client sends        reply   endpoint -> client, what our socket sends

Whatever is deleted can be named by either. A tracked flow keeps the mapping that its first packet got, so its entry is
deleted before the new one is created, both in one message to the kernel. A packet in between makes an entry of its own:
EEXIST, and another try. Layout: include/uapi/linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_common.h,
nf_conntrack_tcp.h; rules: net/netfilter/nf_conntrack_netlink.c (ctnetlink_create_conntrack)."""

from __future__ import annotations

import errno
import socket
import struct

from guest_agent.handoff.segment import packed
from guest_agent.handoff.snapshot import Endpoint
from hypervisor_svc import netlink
from hypervisor_svc.netlink import NESTED, Netlink, attribute, attributes, nest

MARK = 0x534C0000
MARK_MASK = 0xFFFF0000
"""Every entry of ours that has a mapping carries MARK in the upper half of its connection mark."""
TIMEOUT = 432000
"""Seconds: nf_conntrack_tcp_timeout_established."""

_NEW, _GET, _DELETE = 0x100, 0x101, 0x102
_ORIG, _REPLY, _STATUS, _PROTOINFO, _TIMEOUT, _MARK, _NAT_DST, _MARK_MASK = 1, 2, 3, 4, 7, 8, 13, 21
_SEEN_REPLY_ASSURED_CONFIRMED = 0x0E
_TCP, _ESTABLISHED, _BE_LIBERAL = 6, 3, 0x08
_ATTEMPTS = 8


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET or AF_INET6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


# CTA_TUPLE_*: {CTA_TUPLE_IP: {source, destination}, CTA_TUPLE_PROTO: {TCP, source port, destination port}} as one struct.
_TUPLES = {
    size: struct.Struct(f"=HH HH HH{size}s HH{size}s HH HHB3x HH2s2x HH2s2x".replace(" ", "")) for size in (4, 16)
}


def _tuple(kind: int, source: Endpoint, to: Endpoint) -> bytes:
    first, second = packed(source.address), packed(to.address)
    size, number = len(first), 3 if len(first) == 16 else 1
    address = 4 + size
    layout = _TUPLES[size]
    return layout.pack(
        *(layout.size, kind | NESTED, 4 + 2 * address, 1 | NESTED),
        *(address, number, first, address, number + 1, second),
        *(28, 2 | NESTED, 5, 1, _TCP),
        *(6, 2, source.port.to_bytes(2, "big"), 6, 3, to.port.to_bytes(2, "big")),
    )


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("!I", value))


_LIBERAL = bytes([_BE_LIBERAL, _BE_LIBERAL])
_STATE = (
    _number(_STATUS, _SEEN_REPLY_ASSURED_CONFIRMED)
    + _number(_TIMEOUT, TIMEOUT)
    + nest(
        _PROTOINFO,
        nest(1, attribute(1, bytes([_ESTABLISHED])), attribute(4, _LIBERAL), attribute(5, _LIBERAL)),
    )
)
_OUR_MARK = _number(_MARK, MARK)
_OURS = _OUR_MARK + _number(_MARK_MASK, MARK_MASK)


def _mapping(to: Endpoint) -> bytes:
    """CTA_NAT_DST: one address, one port."""
    address, port = packed(to.address), to.port.to_bytes(2, "big")
    least, most = (4, 5) if len(address) == 16 else (1, 2)
    return nest(
        _NAT_DST, attribute(least, address), attribute(most, address), nest(3, attribute(1, port), attribute(2, port))
    )


def _message(kind: int, flags: int, sequence: int, family: int, body: bytes) -> bytes:
    return netlink.message(kind, flags, sequence, family=family, body=body)


def encode_delete(client: Endpoint, server: Endpoint, sequence: int, *, flags: int = netlink.ACK) -> bytes:
    """Delete the entry of which client -> server is one direction."""
    return _message(_DELETE, flags, sequence, family_of(client.address), _tuple(_ORIG, client, server))


def encode_create(client: Endpoint, server: Endpoint, to: Endpoint | None, sequence: int) -> bytes:
    """Create an established entry client -> server, whose packets go to `to` instead, if given (DNAT)."""
    body = _tuple(_ORIG, client, server) + _tuple(_REPLY, server, client) + _STATE
    if to is not None:
        body += _OUR_MARK + _mapping(to)
    flags = netlink.ACK | netlink.CREATE | netlink.EXCL
    return _message(_NEW, flags, sequence, family_of(client.address), body)


class Conntrack:
    """The table of the network namespace in which this was made. Methods raise OSError with the kernel's errno."""

    def __init__(self) -> None:
        self._netlink = Netlink()

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._netlink.close()

    def replace(self, client: Endpoint, server: Endpoint, to: Endpoint | None) -> bool:
        """Delete the flow's entry and create a new one; returns whether there was one before."""
        existed = False
        for _ in range(_ATTEMPTS):
            first, second = self._netlink.next(), self._netlink.next()
            both = encode_delete(client, server, first, flags=0) + encode_create(client, server, to, second)
            deleted, created = self._netlink.transact(both, first, second)
            existed |= netlink.check(deleted, "conntrack delete")
            if netlink.check(created, "conntrack create", fine=(errno.EEXIST,)):
                return existed
            if to is not None:  # perhaps a stale entry of an earlier socket with our local end is in the way
                self.delete(to, client)
        raise OSError(errno.EEXIST, "conntrack create: the flow's entry keeps coming back")

    def delete(self, client: Endpoint, server: Endpoint) -> bool:
        """Delete the flow's entry; False if there is none."""
        sequence = self._netlink.next()
        (result,) = self._netlink.transact(encode_delete(client, server, sequence), sequence)
        return netlink.check(result, "conntrack delete")

    def probe(self) -> None:
        """Ask, to see whether the kernel answers. Raises OSError."""
        self._marked(socket.AF_INET)

    def flush_marked(self) -> int:
        """Delete every entry that carries our mark; returns how many."""
        count = 0
        for family in (socket.AF_INET, socket.AF_INET6):
            for original in self._marked(family):
                sequence = self._netlink.next()
                request = _message(_DELETE, netlink.ACK, sequence, family, attribute(_ORIG | NESTED, original))
                count += netlink.check(self._netlink.transact(request, sequence)[0], "conntrack delete")
        return count

    def _marked(self, family: socket.AddressFamily) -> list[bytes]:
        """The original tuples of our entries."""
        sequence = self._netlink.next()
        request = _message(_GET, netlink.DUMP, sequence, family, _OURS)
        found = [dict(attributes(answer)) for answer in self._netlink.dump(request, sequence)]
        return [entry[_ORIG] for entry in found if _ORIG in entry]
