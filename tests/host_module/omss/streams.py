# SPDX-License-Identifier: Apache-2.0
"""Sockets, and what goes through them: sources that are fed, sinks that are read."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hypervisor_svc import omss

KINDS = ("tcp4", "tcp6", "udp4", "udp6")
PIECE = 1000
"""Bytes of one numbered piece."""
_RANDOM = os.urandom(PIECE)


@dataclass
class Link:
    """`near` is the module's end: it receives as a source, or sends as a sink."""

    kind: str
    near: socket.socket
    far: socket.socket
    got: bytearray = field(default_factory=bytearray)
    pieces: list[bytes] = field(default_factory=list)
    over: bool = False

    @property
    def stream(self) -> bool:
        """TCP."""
        return self.kind.startswith("tcp")

    def read(self) -> None:
        """What is there now."""
        with contextlib.suppress(BlockingIOError):
            while not self.over:
                data = self.far.recv(1 << 18)
                if not data and self.stream:
                    self.over = True
                    return
                self.got += data
                self.pieces.append(data)

    def reset(self) -> None:
        """The far end sends RST."""
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.far.close()

    def close(self) -> None:
        """Both ends."""
        self.near.close()
        self.far.close()


def link(kind: str, *, buffer: int = 0) -> Link:
    """A connected pair; `buffer`: small ones at both ends of a TCP connection."""
    family, host = (socket.AF_INET, "127.0.0.1") if kind.endswith("4") else (socket.AF_INET6, "::1")
    made = _tcp(family, host, buffer) if kind.startswith("tcp") else _udp(family, host)
    made[1].setblocking(False)
    return Link(kind, *made)


def _tcp(family: socket.AddressFamily, host: str, buffer: int) -> tuple[socket.socket, socket.socket]:
    with socket.create_server((host, 0), family=family) as server:
        if buffer:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        far = socket.socket(family)
        if buffer:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        far.connect(server.getsockname())
        near, _ = server.accept()
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def _udp(family: socket.AddressFamily, host: str) -> tuple[socket.socket, socket.socket]:
    near, far = socket.socket(family, socket.SOCK_DGRAM), socket.socket(family, socket.SOCK_DGRAM)
    for sock in (near, far):
        sock.bind((host, 0))
        sock.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
    near.connect(far.getsockname())
    far.connect(near.getsockname())
    return near, far


@contextlib.contextmanager
def links(kinds: Iterable[str], *, buffer: int = 0) -> Iterator[list[Link]]:
    """Several, closed in the end."""
    made: list[Link] = []
    try:
        for kind in kinds:
            made.append(link(kind, buffer=buffer))
        yield made
    finally:
        for one in made:
            one.close()


def piece(number: int) -> bytes:
    """A recognisable one."""
    return struct.pack("!I", number) + _RANDOM[4:]


def number_of(data: bytes) -> int:
    """Which one it is; an AssertionError if it is none."""
    (number,) = struct.unpack_from("!I", data)
    assert data == piece(number), "not a whole piece"
    return int(number)


def numbers(stream: bytes | bytearray) -> list[int]:
    """The pieces of a byte stream: whole ones only."""
    assert len(stream) % PIECE == 0
    return [number_of(bytes(stream[at : at + PIECE])) for at in range(0, len(stream), PIECE)]


def feed(source: Link, first: int, count: int, *, pause: float = 0) -> None:
    """Numbered pieces; waits till the module has them, so that none is lost on the way."""
    for number in range(first, first + count):
        send(source, piece(number))
        if pause:
            time.sleep(pause)
        elif not source.stream and number % 100 == 99:
            settled(source)
    settled(source)


def received(sink: Link) -> list[int]:
    """The pieces that a sink got. Loopback may let datagrams overtake each other when their sender, a worker, moves from one
    processor to another: of those it is what counts, not the order."""
    found = numbers(sink.got)
    return found if sink.stream else sorted(found)


def send(source: Link, data: bytes) -> None:
    """All of it."""
    source.far.settimeout(20)
    source.far.sendall(data)


def settled(source: Link) -> None:
    """The module has taken all that the source has received."""
    wait_for(lambda: pending(source.near) == 0, "the module reads its source")


def pending(sock: socket.socket) -> int:
    """Bytes in the receive queue."""
    with select.epoll() as poll:
        poll.register(sock, select.EPOLLIN)
        return len(poll.poll(0))


def read_all(sinks: Iterable[Link], done: Callable[[Link], bool], *, timeout: float = 30) -> None:
    """Read every sink until all are done."""
    waiting = {one.far.fileno(): one for one in sinks if not done(one)}
    deadline = time.monotonic() + timeout
    with select.epoll() as poll:
        for fd in waiting:
            poll.register(fd, select.EPOLLIN)
        while waiting:
            left = deadline - time.monotonic()
            assert left > 0, f"{len(waiting)} sinks are not done: {[len(one.got) for one in waiting.values()][:9]}"
            for fd, _ in poll.poll(left, 512):
                one = waiting.get(fd)
                if one is None:
                    continue
                one.read()
                if done(one) or one.over:
                    poll.unregister(fd)
                    del waiting[fd]


def read_bytes(sinks: Iterable[Link], count: int) -> None:
    """Until each has so many in all."""
    read_all(sinks, lambda sink: len(sink.got) >= count)


def catch_up(sink: Link) -> None:
    """Read a slow sink until nothing is left for it."""

    def done() -> bool:
        sink.read()
        status = outcome(sink)
        return status.lag == status.left == 0 and status.sent.bytes == len(sink.got)

    wait_for(done, "it has caught up")


def wait_for(condition: Callable[[], object], what: str, *, timeout: float = 10) -> None:
    """Poll for it."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def references() -> int:
    """To the module: sockets in sessions."""
    return int(Path("/sys/module/omss/refcnt").read_text())


def parameter(name: str) -> Path:
    """Of the module."""
    return Path("/sys/module/omss/parameters") / name


@contextlib.contextmanager
def set_to(name: str, value: int) -> Iterator[None]:
    """A module parameter for a while."""
    path = parameter(name)
    before = path.read_text()
    path.write_text(str(value))
    try:
        yield
    finally:
        path.write_text(before)


def outcome(sink: Link) -> omss.SinkStatus:
    """Its status."""
    return omss.sink_status(sink.near)
