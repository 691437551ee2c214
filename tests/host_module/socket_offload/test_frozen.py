# SPDX-License-Identifier: Apache-2.0
"""What frozen means: not a packet leaves, nothing is lost, and afterwards it is as if no time had passed."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from guest_agent.handoff import freeze, hold, kernel
from guest_agent.handoff.hold import Hold
from guest_agent.handoff.socket_offload import Device
from tests.host_module.socket_offload.connections import (
    Pair,
    connected,
    exchange,
    next_of,
    own_network,
    put,
    receive_all,
    round_trip,
    segment_size,
    send_icmp_error,
    wait_for,
)
from tests.namespaces import capture

TOO_BIG, UNREACHABLE = {"ipv4": (3, 4), "mapped": (3, 4), "ipv6": (2, 0)}, {"ipv4": (3, 1), "mapped": (3, 1), "ipv6": (1, 3)}
"""Type and code of ICMP: fragmentation needed or packet too big; host or address unreachable."""
SMALLER = 1280
"""Bytes of the path that a router knows of: the least of IPv6."""


@contextlib.contextmanager
def silent(pair: Pair, file: Path) -> Iterator[None]:
    """Not a packet leaves the server's end meanwhile."""
    port = pair.server.getsockname()[1]
    with capture.captured(None, file, "lo"):
        yield
    assert [packet for packet in capture.read(file) if packet.source[1] == port] == []


def test_frozen_says_nothing_and_then_goes_on(device: Device, tmp_path: Path) -> None:
    """Unacknowledged data, a keepalive every second, a client that speaks: not one packet while it is frozen."""
    with connected("ipv4") as pair:
        exchange(pair)
        for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1)):
            pair.server.setsockopt(socket.IPPROTO_TCP, option, value)
        pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        pair.deafen()
        pair.say(os.urandom(100_000))
        device.freeze_export(pair.server)
        hold.attach(pair.server, None)
        pair.cure()
        time.sleep(0.05)
        with capture.captured(None, tmp_path / "frozen.pcap", "lo"):
            pair.hear(b"is anybody there?")
            time.sleep(4)
        port = pair.server.getsockname()[1]
        assert [p for p in capture.read(tmp_path / "frozen.pcap") if p.source[1] == port] == []
        with pytest.raises(OSError, match="Invalid argument"):
            pair.server.send(b"x")
        hold.detach(pair.server)
        device.thaw(pair.server)
        got = b""
        while len(got) < len(pair.to_client):
            got += pair.client.recv(1 << 16)
        assert got == pair.to_client
        assert pair.server.recv(100) == b"is anybody there?"
        exchange(pair)
        assert round_trip(pair.server) < 1.0, "the time in which it was frozen is no round trip"


def test_what_came_meanwhile_is_told_to_whoever_waits(device: Device, pair: Pair) -> None:
    """epoll sees what the import put into the receive queue."""
    pair.hear(b"the next request")
    time.sleep(0.02)
    snapshot = device.freeze_export(pair.server)
    empty = replace(snapshot, receive_queue=b"", receive_sequence=snapshot.receive_next)
    device.import_into(pair.server, empty)
    with select.epoll() as watch:
        watch.register(pair.server, select.EPOLLIN | select.EPOLLET)
        watch.poll(0)
        device.import_into(pair.server, snapshot)
        assert watch.poll(1)
    device.thaw(pair.server)
    assert pair.server.recv(100) == b"the next request"
    exchange(pair)


def test_closing_a_frozen_socket_is_silent(device: Device, pair: Pair) -> None:
    device.freeze_export(pair.server)
    pair.server.close()
    pair.client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        pair.client.recv(1)


def test_a_holder_that_dies_leaves_it_frozen(pair: Pair) -> None:
    """It belongs to whoever has the descriptor: another process thaws it."""
    os.set_inheritable(pair.server.fileno(), True)
    code = f"""
import socket
from guest_agent.handoff.socket_offload import Device
Device().freeze_export(socket.socket(fileno={pair.server.fileno()}))
"""
    subprocess.run([sys.executable, "-c", code], close_fds=False, check=True)
    assert freeze.is_frozen(pair.server)
    device = Device()
    device.thaw(pair.server)
    device.close()
    exchange(pair)


def test_a_fin_that_waits_goes_on_waiting(device: Device, pair: Pair, tmp_path: Path) -> None:
    """Linux 6.1 lets a FIN pass where the congestion window is full (tcp_cwnd_test())."""
    snapshot = device.freeze_export(pair.server)
    waiting = replace(snapshot, state=kernel.FIN_WAIT1, unsent=b"the last words", fin_unsent=True)
    with silent(pair, tmp_path / "fin.pcap"):
        device.import_into(pair.server, waiting)
        time.sleep(0.3)
    device.thaw(pair.server)
    assert pair.client.recv(100, socket.MSG_WAITALL) == b"the last words", "and then the end"


def test_a_gap_is_told_at_once(device: Device, tmp_path: Path) -> None:
    """A new owner with something out of order says so: the peer need not find out by its timer."""
    with connected("ipv4") as pair:
        put(pair, kernel.ESTABLISHED, "out-of-order")
        snapshot = device.freeze_export(pair.server)
        device.import_into(pair.server, snapshot)
        with capture.captured(None, tmp_path / "gap.pcap", "lo"):
            device.thaw(pair.server)
            time.sleep(0.3)
        said = [packet for packet in capture.read(tmp_path / "gap.pcap") if packet.source[1] == snapshot.local.port]
        assert [packet.acknowledge for packet in said] == [snapshot.receive_next]
        pair.client.sendall(pair.to_server)
        receive_all(pair)


@pytest.mark.parametrize("kind", ["ipv4", "ipv6", "mapped"])
def test_a_smaller_path_is_noted_and_nothing_said(kind: str, device: Device, tmp_path: Path) -> None:
    """ICMP passes the filter of a frozen socket. What was too large is sent again after the thaw, in pieces that fit."""
    with own_network(), connected(kind) as pair:
        pair.deafen()
        pair.say(os.urandom(60_000))
        snapshot = device.freeze_export(pair.server, Hold().program_fd)
        before = segment_size(pair.server)
        pair.cure()
        with silent(pair, tmp_path / "icmp.pcap"):
            send_icmp_error(snapshot, *TOO_BIG[kind], mtu=SMALLER)
            time.sleep(0.7)
        assert segment_size(pair.server) < SMALLER < before
        device.abort(pair.server)
        receive_all(pair)
        exchange(pair)


@pytest.mark.parametrize("kind", ["ipv4", "ipv6", "mapped"])
def test_an_unreachable_host_makes_it_not_speak(kind: str, device: Device, tmp_path: Path) -> None:
    """That takes a backoff back, and sends at once (RFC 6069; tcp_ld_RTO_revert()): not if it is frozen."""
    with own_network(), connected(kind) as pair:
        pair.deafen()
        pair.say(os.urandom(1000))
        wait_for(lambda: backoff(pair.server) >= 2, "two retransmissions")
        snapshot = device.freeze_export(pair.server, Hold().program_fd)
        pair.cure()
        with silent(pair, tmp_path / "icmp.pcap"):
            send_icmp_error(snapshot, *UNREACHABLE[kind])
            time.sleep(1)
        device.abort(pair.server)
        receive_all(pair)
        exchange(pair)


def backoff(sock: socket.socket) -> int:
    """tcpi_backoff."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 5)[4]


def test_what_passed_just_before_is_in_the_snapshot(device: Device) -> None:
    """A packet that had passed while the filter was attached waits for the lock: it belongs into the blob, not behind it."""
    with connected("ipv4") as pair, Hold() as keep:
        over = threading.Event()

        def speak() -> None:
            while not over.is_set():
                pair.client.sendall(bytes(300))

        speaker = threading.Thread(target=speak)
        speaker.start()
        try:
            for _ in range(300):
                snapshot = device.freeze_export(pair.server, keep.program_fd)
                assert next_of(pair.server, kernel.RECEIVE_QUEUE) == snapshot.receive_next
                device.abort(pair.server)
                pair.server.recv(1 << 20)
                list(keep.drain())
        finally:
            over.set()
            pair.server.setblocking(False)
            while speaker.is_alive():
                with contextlib.suppress(BlockingIOError):
                    pair.server.recv(1 << 20)
                speaker.join(0.01)
