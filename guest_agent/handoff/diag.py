# SPDX-License-Identifier: Apache-2.0
"""What the kernel knows of one TCP socket, whoever holds it (sock_diag(7), include/uapi/linux/inet_diag.h)."""

from __future__ import annotations

import socket
import struct

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _REQUEST, _ERROR = 4, 20, 1, 2
_HEADER, _MESSAGE = 16, 72
_ANY = b"\xff" * 8

Ends = tuple[tuple[str, int], tuple[str, int]]
"""Local and peer address and port, as the socket has them."""


def find(family: int, ends: Ends, *, cookie: bytes = _ANY, extensions: int = 0) -> bytes | None:
    """struct inet_diag_msg of exactly this socket and its attributes; None if there is none. `extensions`: bit N - 1 asks for
    attribute N. Raises OSError where sock_diag is not to be had."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.send(_request(family, ends, cookie, extensions))
        reply = netlink.recv(8192)
    if struct.unpack_from("=H", reply, 4)[0] == _ERROR:
        return None
    return reply[_HEADER:]


def tcp_state(family: int, ends: Ends) -> int | None:
    """Its state, also of a socket that no process has any more; None if there is none."""
    found = find(family, ends)
    return found[1] if found else None


def attributes(found: bytes) -> set[int]:
    """The types of the attributes behind the message."""
    kinds, at = set(), _MESSAGE
    while at + 4 <= len(found):
        length, kind = struct.unpack_from("=HH", found, at)
        if length < 4:
            break
        kinds.add(kind)
        at += (length + 3) & ~3
    return kinds


def _request(family: int, ends: Ends, cookie: bytes, extensions: int) -> bytes:
    """struct nlmsghdr and struct inet_diag_req_v2."""
    (local, local_port), (peer, peer_port) = ends
    addresses = (socket.inet_pton(family, address).ljust(16, b"\0") for address in (local, peer))
    identity = struct.pack("!HH16s16s", local_port, peer_port, *addresses) + b"\0\0\0\0" + cookie
    request = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, extensions, 0xFFFFFFFF) + identity
    return struct.pack("=IHHII", _HEADER + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST, 1, 0) + request
