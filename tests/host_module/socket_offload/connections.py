# SPDX-License-Identifier: Apache-2.0
"""Connections in any state that a server can meet, over loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from guest_agent.handoff import hold, kernel
from guest_agent.handoff.segment import ones_sum, packed, pseudo_sum
from tests.guest_agent.handoff.loopback import established

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
    received, sent = _sequences(pair.server)
    ports = struct.pack("!HH", peer_port, local_port)
    segment = ports + struct.pack("!IIBBHHH", received + EARLY_AT & 0xFFFFFFFF, sent, 5 << 4, 0x18, 512, 0, 0) + blob
    checksum = ~ones_sum(struct.pack("!H", pseudo_sum(peer, local, len(segment))) + segment) & 0xFFFF
    segment = segment[:16] + struct.pack("!H", checksum) + segment[18:]
    family = socket.AF_INET6 if len(packed(local)) == 16 else socket.AF_INET
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.bind((peer, 0))
        raw.sendto(segment, (local, 0))
    time.sleep(0.02)


def _sequences(sock: socket.socket) -> tuple[int, int]:
    """RCV.NXT and SND.NXT, as TCP_REPAIR tells them."""
    found = []
    sock.setsockopt(socket.IPPROTO_TCP, kernel.TCP_REPAIR, kernel.REPAIR_ON)
    for queue in (kernel.RECEIVE_QUEUE, kernel.SEND_QUEUE):
        sock.setsockopt(socket.IPPROTO_TCP, kernel.TCP_REPAIR_QUEUE, queue)
        found.append(sock.getsockopt(socket.IPPROTO_TCP, kernel.TCP_QUEUE_SEQ) & 0xFFFFFFFF)
    sock.setsockopt(socket.IPPROTO_TCP, kernel.TCP_REPAIR, kernel.REPAIR_OFF_NO_PROBE)
    return found[0], found[1]


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
