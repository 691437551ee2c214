# SPDX-License-Identifier: Apache-2.0
"""A snapshot to test with, and what no kernel would have written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from guest_agent.handoff.snapshot import (
    CLOSE_WAIT,
    CLOSING,
    FIN_WAIT1,
    FIN_WAIT2,
    LAST_ACK,
    Endpoint,
    Options,
    Segment,
    Snapshot,
    Window,
)

SNAPSHOT = Snapshot(
    local=Endpoint("192.0.2.10", 80),
    peer=Endpoint("198.51.100.7", 40000),
    send_sequence=0xFFFFFFF0,
    receive_sequence=1000,
    mss=1460,
    send_scale=7,
    receive_scale=10,
    sack=True,
    timestamps=True,
    timestamp=123456,
    timestamp_usec=False,
    window=Window(1000, 65535, 65535, 64000, 1005),
    options=Options(nodelay=True, send_buffer=87040, receive_buffer=131072, congestion="cubic"),
    receive_queue=b"GET /",
    unacked=b"HTTP/1.1 200 OK\r\n" * 2,
    unsent=b"\r\n",
)


def contradictions(good: Snapshot) -> list[dict[str, Any]]:
    """Changes to a snapshot with data in its receive queue alone. Python and the kernel refuse each, and neither relies on the
    other."""
    window, options, beyond = good.window, good.options, good.receive_next + 5 & 0xFFFFFFFF
    late = (Segment(good.receive_next + 10 & 0xFFFFFFFF, b"x"),)
    return [
        {"state": 2}, {"state": 10}, {"state": 255}, {"mss": 1}, {"send_scale": 15}, {"receive_scale": 200},
        {"local": good.local._replace(port=0)}, {"peer": good.peer._replace(port=0)},
        {"fin_unsent": True}, {"fin_unsent": True, "state": FIN_WAIT2}, {"fin_read": True}, {"fin_read": True, "state": CLOSE_WAIT},
        *({"state": state, "unsent": b"x"} for state in (FIN_WAIT1, FIN_WAIT2, CLOSING, LAST_ACK)),
        *({"state": state, "segments": late} for state in (CLOSE_WAIT, CLOSING, LAST_ACK)),
        {"state": FIN_WAIT2, "unacked": b"x"}, {"v4_mapped": True, "local": _SIX, "peer": _SIX},
        {"window": replace(window, snd_wnd=1 << 29, max_window=1)}, {"window": replace(window, max_window=1 << 31)},
        {"window": replace(window, rcv_wnd=1 << 31)}, {"window": replace(window, rcv_wup=beyond)},
        {"window": replace(window, snd_wl1=beyond + window.rcv_wnd & 0xFFFFFFFF)},
        {"options": replace(options, send_buffer=1 << 30)}, {"options": replace(options, receive_buffer=1 << 31)},
    ]  # fmt: skip


_SIX = Endpoint("2001:db8::1", 80)
