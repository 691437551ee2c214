# SPDX-License-Identifier: Apache-2.0
"""A client may have spoken to nobody while its VM moved: that its window is open again, that it has everything, is lost, and it
would be asked by a timer only, after three seconds where a connection begins cold (TCP_TIMEOUT_FALLBACK). So it is asked at once
(`freeze.probe`), and again until it is heard: the network may still lead to the last host, and Linux answers such a question at
most every half second (tcp_invalid_ratelimit)."""

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
_SEGMENTS_IN = 140
"""The offset of tcpi_segs_in (linux/tcp.h, struct tcp_info)."""


def ask(connection: Connection, *, after: float) -> None:
    """See above; for one that was thawed a moment ago, and is heard, perhaps, within the next seconds (`after`) anyway."""
    sock = connection.sock
    if sock is not None and after:
        asyncio.get_running_loop().call_later(after, _ask, connection, sock, _heard(sock), TIMES)
    elif sock is not None:
        _ask(connection, sock, _heard(sock), TIMES)


def _ask(connection: Connection, sock: socket.socket, before: int, times: int) -> None:
    if connection.sock is not sock or connection.state is not Host.SERVING or _heard(sock) != before:
        return
    with contextlib.suppress(OSError):
        probe(sock)
    if times > 1:
        asyncio.get_running_loop().call_later(INTERVAL, _ask, connection, sock, before, times - 1)


def _heard(sock: socket.socket) -> int:
    """Segments that have come to this socket."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SEGMENTS_IN + 4)
    return int.from_bytes(info[_SEGMENTS_IN:], "little")
