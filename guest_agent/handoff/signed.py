# SPDX-License-Identifier: Apache-2.0
"""Whether a connection's segments are signed (TCP MD5, RFC 2385; TCP-AO, RFC 5925). getsockopt tells only of TCP-AO; for
MD5 the kernel is asked through sock_diag(7) (INET_DIAG_MD5SIG, needs CAP_NET_ADMIN)."""

from __future__ import annotations

import socket
import struct

from guest_agent.handoff import kernel

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, _NLMSG_ERROR = 4, 20, 1, 2
_INET_DIAG_MD5SIG = 18
_INET_DIAG_MESSAGE = 72
_WITH_INFO = 2  # the kernel adds the key only to a reply that carries INET_DIAG_INFO (tcp_diag_get_aux)


def is_signed(sock: socket.socket) -> bool:
    """True if the connection has an MD5 or AO key."""
    return _has_ao(sock) or _has_md5(sock)


def _has_ao(sock: socket.socket) -> bool:
    try:
        sock.getsockopt(socket.IPPROTO_TCP, kernel.TCP_AO_INFO, 64)
    except OSError:
        return False
    return True


def _has_md5(sock: socket.socket) -> bool:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.send(_request(sock))
        reply = netlink.recv(8192)
    kind = struct.unpack_from("=H", reply, 4)[0]
    return kind != _NLMSG_ERROR and _INET_DIAG_MD5SIG in _attributes(reply[16 + _INET_DIAG_MESSAGE :])


def _request(sock: socket.socket) -> bytes:
    """struct nlmsghdr + struct inet_diag_req_v2 for exactly this socket."""
    local, peer = sock.getsockname(), sock.getpeername()
    cookie = sock.getsockopt(socket.SOL_SOCKET, kernel.SO_COOKIE, 8)
    ends = struct.pack("!HH16s16s", local[1], peer[1], _packed(sock, local[0]), _packed(sock, peer[0]))
    request = struct.pack("=BBBxI", sock.family, socket.IPPROTO_TCP, _WITH_INFO, 0xFFFFFFFF) + ends + b"\0\0\0\0" + cookie
    return struct.pack("=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request


def _packed(sock: socket.socket, address: str) -> bytes:
    return socket.inet_pton(sock.family, address).ljust(16, b"\0")


def _attributes(data: bytes) -> set[int]:
    found, at = set(), 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        found.add(kind)
        at += (length + 3) & ~3
    return found
