# SPDX-License-Identifier: Apache-2.0
"""Whether a connection's segments are signed (TCP MD5, RFC 2385; TCP-AO, RFC 5925). getsockopt tells only of TCP-AO; for
MD5 the kernel is asked through sock_diag(7) (INET_DIAG_MD5SIG, needs CAP_NET_ADMIN)."""

from __future__ import annotations

import socket

from guest_agent.handoff import diag, kernel

_MD5SIG = 18
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
    ends = sock.getsockname()[:2], sock.getpeername()[:2]
    cookie = sock.getsockopt(socket.SOL_SOCKET, kernel.SO_COOKIE, 8)
    found = diag.find(sock.family, ends, cookie=cookie, extensions=_WITH_INFO)
    return found is not None and _MD5SIG in diag.attributes(found)
