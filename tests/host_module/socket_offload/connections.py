# SPDX-License-Identifier: Apache-2.0
"""Connections in any state that a server can meet, over loopback."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from guest_agent.handoff import hold, kernel
from guest_agent.handoff.segment import ones_sum, packed, pseudo_sum
from guest_agent.handoff.snapshot import Snapshot
from tests.guest_agent.handoff.loopback import established

_CLONE_NEWNET = 0x40000000
EARLY_AT, EARLY = 1000, 500
"""An out-of-order segment begins so many bytes after what was received, and is so long."""


@dataclass
class Pair:
    """Both ends of a connection; what each end has written, and the other not read yet."""

    server: socket.socket
    client: socket.socket
    to_client: bytes = b""
    to_server: bytes = b""

    def state(self) -> int:
        """The server's TCP state."""
        return self.server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]

    def deafen(self) -> None:
        """The client hears nothing from now on."""
        hold.attach(self.client, None)

    def cure(self) -> None:
        """It hears again."""
        hold.detach(self.client)

    def say(self, blob: bytes) -> None:
        """The server writes what its buffer takes."""
        self.server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while blob:
                sent = self.server.send(blob)
                self.to_client, blob = self.to_client + blob[:sent], blob[sent:]
        self.server.settimeout(20)

    def hear(self, blob: bytes) -> None:
        """The client writes."""
        self.client.sendall(blob)
        self.to_server += blob


@contextlib.contextmanager
def connected(kind: str) -> Iterator[Pair]:
    """An established connection."""
    with established(kind, receive_buffer=1 << 16) as (server, client):
        pair = Pair(server, client)
        try:
            yield pair
        finally:
            pair.server.close()  # which may be another one by now


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Poll for at most 10 s."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def send_early(pair: Pair, blob: bytes) -> None:
    """Forge a segment of the client's that overtakes EARLY_AT bytes that it has not sent yet."""
    server = pair.server.getsockname()[:2], pair.server.getpeername()[:2]
    (local, local_port), (peer, peer_port) = ((a.removeprefix("::ffff:"), port) for a, port in server)
    received, sent = sequences(pair.server)
    ports = struct.pack("!HH", peer_port, local_port)
    segment = ports + struct.pack("!IIBBHHH", received + EARLY_AT & 0xFFFFFFFF, sent, 5 << 4, 0x18, 512, 0, 0) + blob
    checksum = ~ones_sum(struct.pack("!H", pseudo_sum(peer, local, len(segment))) + segment) & 0xFFFF
    segment = segment[:16] + struct.pack("!H", checksum) + segment[18:]
    family = socket.AF_INET6 if len(packed(local)) == 16 else socket.AF_INET
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.bind((peer, 0))
        raw.sendto(segment, (local, 0))
    time.sleep(0.02)


def sequences(sock: socket.socket) -> tuple[int, int]:
    """RCV.NXT and SND.NXT of a live socket, as TCP_REPAIR tells them."""
    sock.setsockopt(socket.IPPROTO_TCP, kernel.TCP_REPAIR, kernel.REPAIR_ON)
    found = next_of(sock, kernel.RECEIVE_QUEUE), next_of(sock, kernel.SEND_QUEUE)
    sock.setsockopt(socket.IPPROTO_TCP, kernel.TCP_REPAIR, kernel.REPAIR_OFF_NO_PROBE)
    return found


def next_of(sock: socket.socket, queue: int) -> int:
    """The sequence number after the last of one queue of a frozen socket."""
    sock.setsockopt(socket.IPPROTO_TCP, kernel.TCP_REPAIR_QUEUE, queue)
    found = sock.getsockopt(socket.IPPROTO_TCP, kernel.TCP_QUEUE_SEQ) & 0xFFFFFFFF
    sock.setsockopt(socket.IPPROTO_TCP, kernel.TCP_REPAIR_QUEUE, kernel.NO_QUEUE)
    return found


def send_icmp_error(snapshot: Snapshot, kind: int, code: int, mtu: int = 0) -> None:
    """What a router says of the first unacknowledged segment of the connection (RFC 792, RFC 4443): `kind` is ICMP's type."""
    segment = struct.pack("!HHIIBBHHH", snapshot.local.port, snapshot.peer.port, snapshot.send_sequence, 0, 5 << 4, 0x10, 0, 0, 0)
    local, peer = packed(snapshot.local.address), packed(snapshot.peer.address)
    if snapshot.is_ipv6:
        header = struct.pack("!IHBB", 6 << 28, len(segment), socket.IPPROTO_TCP, 64) + local + peer
        message = struct.pack("!BBHI", kind, code, 0, mtu) + header + segment
    else:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0x4000, 64, socket.IPPROTO_TCP, 0) + local + peer
        header = header[:10] + struct.pack("!H", ~ones_sum(header) & 0xFFFF) + header[12:]
        message = struct.pack("!BBHHH", kind, code, 0, 0, mtu) + header + segment
        message = message[:2] + struct.pack("!H", ~ones_sum(message) & 0xFFFF) + message[4:]
    family = socket.AF_INET6 if snapshot.is_ipv6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_ICMPV6 if snapshot.is_ipv6 else socket.IPPROTO_ICMP) as raw:
        raw.sendto(message, (snapshot.local.address, 0))


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """This thread, and what it starts, in a new network namespace with a loopback device."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare(2)")
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            libc.setns(before, _CLONE_NEWNET)
    finally:
        os.close(before)


def exchange(pair: Pair, size: int = 200_000) -> None:
    """Random bytes in both directions."""
    for one, other in ((pair.server, pair.client), (pair.client, pair.server)):
        blob, got = os.urandom(size), b""
        thread = threading.Thread(target=one.sendall, args=(blob,))
        thread.start()
        while len(got) < size:
            got += other.recv(1 << 16)
        thread.join()
        assert got == blob


def receive_all(pair: Pair) -> None:
    """The client hears all that the server has written, and the server what the client has."""
    for sock, expected in ((pair.client, pair.to_client), (pair.server, pair.to_server)):
        got = b""
        while len(got) < len(expected):
            piece = sock.recv(1 << 16)
            assert piece, f"the end after {len(got)} of {len(expected)} bytes"
            got += piece
        assert got == expected


def put(pair: Pair, state: int, data: str) -> None:
    """Bring the server's end into a state, with data in one of its queues."""
    if data == "receive":
        pair.hear(os.urandom(5000))
        time.sleep(0.01)
    elif data == "out-of-order":
        pair.to_server = os.urandom(EARLY_AT + EARLY)
        send_early(pair, pair.to_server[EARLY_AT:])
    if state in (kernel.CLOSE_WAIT, kernel.LAST_ACK):
        pair.client.shutdown(socket.SHUT_WR)
        wait_for(lambda: pair.state() == kernel.CLOSE_WAIT, "the client's FIN")
    if data == "unacked" or state in (kernel.FIN_WAIT1, kernel.CLOSING, kernel.LAST_ACK):
        pair.deafen()
    if data == "unacked":
        pair.say(os.urandom(9000))
    elif data == "unsent":
        pair.say(os.urandom(400_000))
    if state in (kernel.FIN_WAIT1, kernel.FIN_WAIT2, kernel.CLOSING, kernel.LAST_ACK):
        pair.server.shutdown(socket.SHUT_WR)
    if state == kernel.CLOSING:
        pair.client.shutdown(socket.SHUT_WR)
    wait_for(lambda: pair.state() == state, f"state {state}, it is {pair.state()}")


def timestamps(on: bool) -> None:
    """For connections that begin from now on."""
    Path("/proc/sys/net/ipv4/tcp_timestamps").write_text(str(int(on)))


def round_trip(sock: socket.socket) -> float:
    """Seconds (tcpi_rtt)."""
    return int.from_bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 72)[68:], "little") / 1e6


def segment_size(sock: socket.socket) -> int:
    """tcpi_snd_mss, bytes."""
    return int.from_bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 20)[16:], "little")
