# SPDX-License-Identifier: Apache-2.0
"""The host's service died, and the client's connection with it: a client that only waits would wait for ever.

When a process dies, its kernel closes its sockets and tells the peers; a frozen copy closes silently. So we ask the client
to speak: one segment below its window, as a keepalive is (RFC 9293 section 3.8.4), which it must answer with one of its own.
That meets no socket, and the kernel resets the connection with the one sequence number that the client believes (RFC 9293
section 3.10.7.1, RFC 5961 section 3.2). The segment has the garbage octet of the same section, in a place that the client has
acknowledged: without data, the answer is subject to the client's rate limit (Linux's tcp_invalid_ratelimit, 500 ms), and one
that has just been asked by somebody else would stay silent."""

from __future__ import annotations

import socket
import struct

from guest_agent.handoff.segment import ones_sum, pseudo_sum
from guest_agent.handoff.snapshot import Snapshot

_ACK = 0x10
_TIMESTAMPS = b"\x01\x01\x08\x0a"
_GARBAGE = b"\0"
_STEP = 2
_U32 = 0xFFFFFFFF


def provoke(snapshot: Snapshot, age: float) -> None:
    """Let the client of a connection that was `snapshot` `age` seconds ago, and has no socket any more, find out. Raises
    OSError (no CAP_NET_RAW)."""
    segment = build_probe(snapshot, age)
    family = socket.AF_INET6 if snapshot.is_ipv6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, snapshot.options.mark)
        raw.bind((snapshot.local.address, 0))
        raw.sendto(segment, (snapshot.peer.address, 0))


def build_probe(snapshot: Snapshot, age: float) -> bytes:
    """The TCP segment. Its timestamp is the connection's clock after `age` seconds: it never goes back (RFC 7323, section 5)."""
    options = b""
    if snapshot.timestamps:
        ticks = int(age * (1_000_000 if snapshot.timestamp_usec else 1000)) + _STEP
        options = _TIMESTAMPS + struct.pack("!II", (snapshot.timestamp + ticks) & _U32, 0)
    window = min(65535, snapshot.window.rcv_wnd >> (snapshot.receive_scale or 0))
    sequence = (snapshot.send_sequence - 1) & _U32
    head = struct.pack("!HHII", snapshot.local.port, snapshot.peer.port, sequence, snapshot.receive_next)
    head += struct.pack("!BBH", (20 + len(options)) << 2, _ACK, window)
    tail = options + _GARBAGE
    pseudo = pseudo_sum(snapshot.local.address, snapshot.peer.address, 20 + len(tail))
    checksum = ~ones_sum(pseudo.to_bytes(2, "big") + head + bytes(4) + tail) & 0xFFFF
    return head + struct.pack("!HH", checksum, 0) + tail
