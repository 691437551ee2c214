# SPDX-License-Identifier: Apache-2.0
"""Connections over loopback, of every kind of address."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

KINDS = {"ipv4": (socket.AF_INET, "127.0.0.1"), "ipv6": (socket.AF_INET6, "::1"), "mapped": (socket.AF_INET6, "::")}
TCP_MD5SIG = 14
_KEY = b"secret"


@contextlib.contextmanager
def established(kind: str, *, receive_buffer: int = 0) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(server's end, client's end); `receive_buffer` is the client's, bytes (0: as the kernel likes)."""
    family, address = KINDS[kind]
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        if kind == "mapped":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address, 0))
        listener.listen()
        target = "127.0.0.1" if kind == "mapped" else address
        client = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET)
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(10)
        client.connect((target, listener.getsockname()[1]))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server, _ = listener.accept()
    with server, client:
        yield server, client


@contextlib.contextmanager
def signed() -> Iterator[socket.socket]:
    """The server's end of a connection whose segments are signed (RFC 2385; struct tcp_md5sig of include/uapi/linux/tcp.h)."""
    peer = socket.AF_INET.to_bytes(2, "little") + bytes(2) + socket.inet_aton("127.0.0.1")
    option = peer.ljust(128, b"\0") + bytes(2) + len(_KEY).to_bytes(2, "little") + bytes(4) + _KEY.ljust(80, b"\0")
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        for sock in (listener, client):
            sock.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, option)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            yield server
