# SPDX-License-Identifier: Apache-2.0
"""Listeners of a live stream that join, leave, stall and reset at random, through the whole product: no other listener's stream
changes by one byte, and what a slow one lost are whole pieces of it.

The stream is a row of numbers, so every byte says where it belongs."""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.namespaces.deployment import LIVE_PORT, Deployment, deployed, wait_for
from tests.namespaces.test_relay import encoder, mounts, relay
from tests.namespaces.topology import routed

pytestmark = pytest.mark.root

WORD, BLOCK = 8, 8000
"""Bytes of a number, and of what the encoder sends at once."""
PAUSE = 0.02
STEADY, MOST = 12, 60
RESET = struct.pack("ii", 1, 0)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Deployment]:
    """A live server in the guest."""
    (tmp_path / "share").mkdir()
    with routed() as network, deployed(network, tmp_path, tmp_path / "share", live=True) as deployment:
        wait_for(lambda: mounts(deployment) is not None, "the live server")
        yield deployment


def numbers(first: int, count: int) -> bytes:
    """So many of them."""
    return struct.pack(f">{count}Q", *range(first, first + count))


class Listener:
    """Looks at every byte that comes. `expected`: the number that comes next, once the first has come."""

    def __init__(self, live: Deployment, *, buffer: int = 0) -> None:
        with live.network.client.entered():
            self.sock = socket.socket()
            if buffer:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            self.sock.settimeout(20)
            self.sock.connect((live.network.guest_address[4], LIVE_PORT))
        self.sock.sendall(b"GET /numbers HTTP/1.0\r\n\r\n")
        self.sock.setblocking(False)
        self.answered = self.over = False
        self.rest = b""
        self.expected: int | None = None
        self.gaps = self.taken = 0

    def read(self) -> None:
        """What is there, but not for ever."""
        for _ in range(8):
            try:
                data = self.sock.recv(1 << 16)
            except BlockingIOError:
                return
            if not data:
                self.over = True
                return
            self._take(data)

    def _take(self, data: bytes) -> None:
        self.rest += data
        if not self.answered:
            head, found, body = self.rest.partition(b"\r\n\r\n")
            if not found:
                return
            assert b" 200 " in head
            self.answered, self.rest = True, body
        whole = len(self.rest) // WORD
        row = struct.unpack_from(f">{whole}Q", self.rest)
        self.rest = self.rest[whole * WORD :]
        at = 0
        while at < whole:
            assert self.expected is None or row[at] >= self.expected, "nothing comes twice, or in another order"
            self.gaps += self.expected not in (None, row[at])
            end = self._end_of_run(row, at)
            self.expected, at = row[end - 1] + 1, end
        self.taken += whole

    @staticmethod
    def _end_of_run(row: tuple[int, ...], begin: int) -> int:
        """Where the numbers that rise by one from `begin` on end."""
        if row[-1] - row[begin] == len(row) - 1 - begin:
            return len(row)
        return next(at for at in range(begin + 1, len(row) + 1) if at == len(row) or row[at] != row[at - 1] + 1)


class Crowd:
    """The listeners, and what happens to them."""

    def __init__(self, live: Deployment, seed: int) -> None:
        self.live, self.chance = live, random.Random(seed)
        self.steady: list[Listener] = []
        self.others: list[Listener] = []
        self._selector = selectors.DefaultSelector()
        self.seen = 0

    def join(self, *, steady: bool = False) -> None:
        one = Listener(self.live, buffer=0 if steady else self.chance.choice([0, 0, 4096]))
        (self.steady if steady else self.others).append(one)
        self._selector.register(one.sock, selectors.EVENT_READ, one)

    def disturb(self) -> None:
        """One thing that a listener may do."""
        act = self.chance.choice(["join", "join", "stall", "resume", "close", "reset"])
        if act == "join" and len(self.others) < MOST:
            self.join()
        elif self.others:
            one = self.chance.choice(self.others)
            stalled = one.sock not in self._selector.get_map()
            if act == "stall" and not stalled:
                self._selector.unregister(one.sock)
            elif act == "resume" and stalled:
                self._selector.register(one.sock, selectors.EVENT_READ, one)
            elif act in ("close", "reset"):
                self.leave(one, reset=act == "reset")

    def leave(self, one: Listener, *, reset: bool) -> None:
        if one.sock in self._selector.get_map():
            self._selector.unregister(one.sock)
        if reset:
            one.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        one.sock.close()
        self.others.remove(one)
        self.seen += one.taken

    def all_leave(self) -> None:
        """But the steady."""
        while self.others:
            self.leave(self.others[0], reset=self.chance.random() < 0.5)

    def read(self, seconds: float) -> None:
        """Everybody who does not stall."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                key.data.read()
                if key.data.over:
                    self._selector.unregister(key.fileobj)

    def close(self) -> None:
        for one in [*self.steady, *self.others]:
            one.sock.close()
        self._selector.close()


def disturbed(live: Deployment, seconds: float, seed: int) -> None:
    """The whole of it."""
    with encoder(live.network, "/numbers") as source, contextlib.closing(Crowd(live, seed)) as crowd:
        wait_for(lambda: mounts(live), "the mount")
        for _ in range(STEADY):
            crowd.join(steady=True)
        wait_for(lambda: relay(live)["sink_count"] == STEADY, "the steady are sinks")
        sent, end = 0, time.monotonic() + seconds
        while time.monotonic() < end or relay(live)["sink_count"] > STEADY:
            assert time.monotonic() < end + 30, "those that left are gone"
            source.sendall(numbers(sent, BLOCK // WORD))  # a client that is gone is noticed when something is sent to it
            sent += BLOCK // WORD
            if time.monotonic() < end:
                crowd.disturb()
            else:
                crowd.all_leave()
            crowd.read(PAUSE)
        source.shutdown(socket.SHUT_WR)
        patience = time.monotonic() + 30
        while not all(one.over for one in crowd.steady):
            assert time.monotonic() < patience, "the steady see the end"
            crowd.read(0.05)
        assert [(one.expected, one.taken, one.gaps, one.rest) for one in crowd.steady] == [(sent, sent, 0, b"")] * STEADY
        assert crowd.seen > sent, "the others saw something too"
    wait_for(lambda: live.call("relays")["relays"] == [] and not live.call("connections")["connections"], "nothing is left")


def test_disturbances_change_nobody_else_s_stream(live: Deployment) -> None:
    disturbed(live, seconds=6, seed=4)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_five_minutes_of_disturbances(live: Deployment) -> None:
    disturbed(live, seconds=300, seed=5)
