# SPDX-License-Identifier: Apache-2.0
"""A snapshot to test with."""

from __future__ import annotations

from guest_agent.handoff.snapshot import Endpoint, Options, Snapshot, Window

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
