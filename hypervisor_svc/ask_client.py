# SPDX-License-Identifier: Apache-2.0
"""A client may have spoken to nobody while its VM moved: that its window is open again, that it has everything, is lost, and it
would be asked by a timer only, after three seconds where a connection begins cold (TCP_TIMEOUT_FALLBACK). So it is asked at once
(`freeze.probe`), and again until it takes something: the network may still lead to the last host, what it said there may come late,
and Linux answers such a question at most every half second (tcp_invalid_ratelimit)."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from guest_agent.handoff.freeze import probe
from guest_agent.handoff.state import Host
from hypervisor_svc.connection import Connection

INTERVAL = 0.05
TIMES = 14
"""Until then every Linux client has answered, whenever it did before."""
_BYTES_ACKED = slice(120, 128)
"""Of tcpi_bytes_acked (linux/tcp.h, struct tcp_info)."""


def ask(connection: Connection, *, after: float) -> None:
    """See above; for one that was thawed a moment ago, and is heard, perhaps, within so many seconds (`after`) anyway."""
    sock = connection.sock
    if sock is not None and after:
        asyncio.get_running_loop().call_later(after, _ask, connection, sock, _taken(sock), TIMES)
    elif sock is not None:
        _ask(connection, sock, _taken(sock), TIMES)


def _ask(connection: Connection, sock: socket.socket, before: int, times: int) -> None:
    if connection.sock is not sock or connection.state is not Host.SERVING or _taken(sock) != before:
        return
    with contextlib.suppress(OSError):
        probe(sock)
    if times > 1:
        asyncio.get_running_loop().call_later(INTERVAL, _ask, connection, sock, before, times - 1)


def _taken(sock: socket.socket) -> int:
    """Bytes that the client has acknowledged."""
    return int.from_bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.stop)[_BYTES_ACKED], "little")
