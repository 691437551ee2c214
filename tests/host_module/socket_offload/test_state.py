# SPDX-License-Identifier: Apache-2.0
"""The state matrix: every state, kind of address and queue, moved to a new socket and in place; proved by bytes in both
directions, and by a capture in which the server's end is one honest endpoint."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from guest_agent.handoff import hold, kernel
from guest_agent.handoff.snapshot import FIN_RECEIVED, FIN_SENT, Snapshot
from guest_agent.handoff.socket_offload import Device
from tests.guest_agent.handoff.loopback import KINDS
from tests.host_module.socket_offload.connections import EARLY, EARLY_AT, Pair, connected, put, timestamps
from tests.namespaces import capture

STATES = {
    "ESTABLISHED": kernel.ESTABLISHED,
    "FIN_WAIT1": kernel.FIN_WAIT1,
    "FIN_WAIT2": kernel.FIN_WAIT2,
    "CLOSE_WAIT": kernel.CLOSE_WAIT,
    "CLOSING": kernel.CLOSING,
    "LAST_ACK": kernel.LAST_ACK,
}
DATA = ("receive", "unacked", "unsent", "out-of-order")
IMPOSSIBLE = {
    *itertools.product(("FIN_WAIT2",), ("unacked", "unsent")),  # everything was acknowledged
    *itertools.product(("CLOSE_WAIT", "CLOSING", "LAST_ACK"), ("out-of-order",)),  # nothing is missing before a FIN
}
CELLS = [
    (state, kind, data, stamps)
    for state, kind, data, stamps in itertools.product(STATES, sorted(KINDS), DATA, (True, False))
    if (state, data) not in IMPOSSIBLE
]
PART, PARTS = map(int, os.environ.get("STREAMLIFT_CELLS", "0/1").split("/"))
"""Which part of the matrix is run: each cell goes to a new socket in one of them, and in place in the next."""
CASES = [(*cell, fresh) for at, cell in enumerate(CELLS) for fresh in (True, False) if (at + fresh) % PARTS == PART]


def name(case: tuple[object, ...]) -> str:
    """For people."""
    return "-".join(map(str, case[:-1])) + ("-fresh" if case[-1] else "-in_place")


def test_the_matrix_is_whole() -> None:
    """6 states, 3 kinds of addresses, 4 queues, timestamps or none: but for what cannot be."""
    assert len(CELLS) == 6 * 3 * 4 * 2 - len(IMPOSSIBLE) * 3 * 2 == 114


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    opened = Device()
    yield opened
    opened.close()


@pytest.fixture(scope="module", autouse=True)
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[tuple[str, int]]]:
    """All packets of this file's tests, judged in the end; each test adds its server's end."""
    file = tmp_path_factory.mktemp("link") / "lo.pcap"
    servers: set[tuple[str, int]] = set()
    with capture.captured(None, file, "lo"):
        yield servers
    assert servers
    ours = (packet for packet in capture.read(file) if packet.source in servers or packet.to in servers)  # others may still close
    assert capture.judge(ours, servers) == []


@contextlib.contextmanager
def silent(sock: socket.socket, device: Device) -> Iterator[None]:
    """It says nothing meanwhile. Between the old socket and the new one the connection has none, and the kernel would answer the
    client with a RST: in the product the redirection covers that moment."""
    device.freeze_export(sock)
    try:
        yield
    finally:
        device.abort(sock)


def move(pair: Pair, device: Device, *, fresh: bool) -> tuple[Snapshot, Snapshot]:
    """Out of the socket and into another, or into the same; what was taken out, and what can be taken out there. All the while it
    is deaf, as every frozen socket has to be (`freeze.py`)."""
    with silent(pair.client, device):
        hold.attach(pair.server, None)
        before = device.freeze_export(pair.server)
        if fresh:
            family = pair.server.family
            pair.server.close()
            pair.server = socket.socket(family, socket.SOCK_STREAM)
            pair.server.settimeout(20)
            hold.attach(pair.server, None)
        device.import_into(pair.server, before, options=fresh)
    device.thaw(pair.server)
    after = device.freeze_export(pair.server)
    device.abort(pair.server)
    hold.detach(pair.server)
    return before, after


def plain(snapshot: Snapshot) -> Snapshot:
    """What neither time nor a timer changes."""
    window = replace(snapshot.window, rcv_wnd=0, rcv_wup=0)  # what was received may have been acknowledged
    options = replace(snapshot.options, send_buffer=0, receive_buffer=0)
    snapshot = replace(snapshot, timestamp=0, warm=None, options=options, window=window)
    if not snapshot.unsent:
        return snapshot
    # More may have been sent, and an acknowledgement that had passed the filter before it was there may have come late.
    queued, window = snapshot.unacked + snapshot.unsent, replace(window, snd_wl1=0, snd_wnd=0, max_window=0)
    end = (snapshot.send_sequence + len(queued)) & 0xFFFFFFFF
    return replace(snapshot, send_sequence=end, unacked=b"", unsent=queued[-1000:], window=window)


def assert_same(before: Snapshot, after: Snapshot) -> None:
    """What has no clock in it is what it was."""
    assert 0 <= (after.timestamp - before.timestamp) & 0xFFFFFFFF < 10_000
    assert before.warm is not None and after.warm is not None
    same = dict.fromkeys(("ca_clock_us", "ca_jiffies", "ca_private", "pacing_rate", "rcv_ssthresh", "window_clamp"))
    same |= dict.fromkeys(("ts_recent_age", "rate_app_limited", "rcvq_space", "ca_state"))
    assert plain(before) == plain(after)
    if (before.send_sequence, before.unacked) != (after.send_sequence, after.unacked):
        return  # it has learnt something since
    for name, old, new in zip(before.warm._fields, before.warm, after.warm, strict=True):
        assert name in same or old == new, f"{name}: {old}, and {new} afterwards"


def check_bytes(pair: Pair, state: int) -> None:
    """Everything that was on its way arrives, and what may still be said is heard."""
    pair.cure()
    if state not in FIN_SENT | {kernel.FIN_WAIT2}:
        pair.say(bytes(range(256)) * 40)
    expected = len(pair.to_client)
    got = b""
    while len(got) < expected:
        got += pair.client.recv(1 << 16) or pytest.fail(f"the end after {len(got)} of {expected} bytes")
    assert got == pair.to_client
    if state in FIN_SENT | {kernel.FIN_WAIT2}:
        assert pair.client.recv(1) == b"", "the FIN comes after the last byte"
    if state not in FIN_RECEIVED:
        early = pair.to_server if len(pair.to_server) == EARLY_AT + EARLY else b""
        pair.client.sendall(early)
        pair.hear(b"the next request")
    heard = b""
    while len(heard) < len(pair.to_server):
        heard += pair.server.recv(1 << 16) or pytest.fail(f"the end after {len(heard)} of {len(pair.to_server)} bytes")
    assert heard == pair.to_server
    if state in FIN_RECEIVED:
        assert pair.server.recv(1) == b"", "the client had closed"


@pytest.mark.parametrize(("state", "kind", "data", "stamps", "fresh"), CASES, ids=list(map(name, CASES)))
def test_state(state: str, kind: str, data: str, stamps: bool, fresh: bool, device: Device, link: set[tuple[str, int]]) -> None:
    timestamps(stamps)
    try:
        with connected(kind) as pair:
            put(pair, STATES[state], data)
            address, port = pair.server.getsockname()[:2]
            link.add((address.removeprefix("::ffff:"), port))
            before, after = move(pair, device, fresh=fresh)
            assert before.state == STATES[state]
            queues = {"receive": before.receive_queue, "unacked": before.unacked, "unsent": before.unsent}
            assert queues.get(data, before.segments), "nothing to move in this queue"
            assert_same(before, after)
            check_bytes(pair, STATES[state])
    finally:
        timestamps(True)
