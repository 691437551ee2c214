# SPDX-License-Identifier: Apache-2.0
"""Step 1: freeze. The connection stops reacting to packets and stops sending; `thaw` is the opposite.

Two locks, in this order: a socket filter that takes nothing in (`hold.py`), then TCP_REPAIR, which sends nothing out and
opens the socket's state for reading. No firewall rule is needed.
"""

from __future__ import annotations

import socket

from guest_agent.handoff import hold, kernel
from guest_agent.handoff.errors import NotMovable, Reason
from guest_agent.handoff.hold import Hold

_setsockopt = socket.socket.setsockopt


def freeze(sock: socket.socket, keep: Hold | None, *, own: bool = False) -> None:
    """Freeze an established TCP socket. Needs CAP_NET_ADMIN in the socket's network namespace. `own`: no application has it.

    Raises NotMovable(SOCKET_FILTER) if the application has a filter of its own on it, OSError if the kernel refuses."""
    shut(sock, keep, own=own)
    try:
        _setsockopt(sock, socket.IPPROTO_TCP, kernel.TCP_REPAIR, kernel.REPAIR_ON)
    except OSError:
        hold.detach(sock)
        raise


def shut(sock: socket.socket, keep: Hold | None, *, own: bool = False) -> None:
    """The first of the two locks alone. Raises NotMovable(SOCKET_FILTER), OSError."""
    if not own and kernel.has_filter(sock.fileno()):
        raise NotMovable(Reason.SOCKET_FILTER, "the application attached a filter of its own to this socket")
    hold.attach(sock, keep)


def is_frozen(sock: socket.socket) -> bool:
    """Whether the socket is in repair mode."""
    return sock.getsockopt(socket.IPPROTO_TCP, kernel.TCP_REPAIR) != 0


def thaw(sock: socket.socket) -> None:
    """Undo `freeze`: no window probe is sent."""
    _leave_repair(sock, kernel.REPAIR_OFF_NO_PROBE)
    hold.detach(sock)


def probe(sock: socket.socket) -> None:
    """Ask the peer how far it is and how much it takes: what it said of that may be lost, while nobody had the connection, and it
    would be asked by a timer only, a fifth of a second later at the least (RFC 9293 section 3.8.6.1). It answers what lies before
    its window with an ACK (section 3.10.7.4); leaving repair mode sends that (tcp_send_window_probe). Raises OSError."""
    _setsockopt(sock, socket.IPPROTO_TCP, kernel.TCP_REPAIR, kernel.REPAIR_ON)
    _leave_repair(sock, kernel.REPAIR_OFF)


def _leave_repair(sock: socket.socket, how: int) -> None:
    """SO_REUSEADDR is set because leaving repair mode resets it, and a server that starts anew could not bind its port beside such
    a connection (do_tcp_setsockopt, SK_NO_REUSE)."""
    _setsockopt(sock, socket.IPPROTO_TCP, kernel.TCP_REPAIR, how)
    _setsockopt(sock, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
