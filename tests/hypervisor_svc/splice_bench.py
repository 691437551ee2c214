# SPDX-License-Identifier: Apache-2.0
"""A `user` engine on loopback: one session, its source's far end, and listeners."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from hypervisor_svc.schedule import Schedule
from hypervisor_svc.splice import FileSource, Left, Parting, SessionOptions, SinkOptions, Source
from hypervisor_svc.splice_user import UserEngine, UserSession

LOOPBACKS = {4: "127.0.0.1", 6: "::1"}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


@dataclass(eq=False)
class Listener:
    """One sink's far end; reads all the time unless it is `stalled`."""

    near: socket.socket
    far: socket.socket
    number: int = 0
    got: bytearray = field(default_factory=bytearray)
    datagrams: list[bytes] = field(default_factory=list)
    ended: bool = False
    left: tuple[Left, int] | None = None
    parting: Parting | None = None
    _reading: bool = False

    def read(self, loop: asyncio.AbstractEventLoop) -> None:
        self._reading = True
        loop.add_reader(self.far, self._readable)

    def stall(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._reading:
            loop.remove_reader(self.far)
        self._reading = False

    def _readable(self) -> None:
        for _ in range(64):
            try:
                data = self.far.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if self.far.type == socket.SOCK_DGRAM:
                self.datagrams.append(data)
                continue
            if not data:
                self.ended = True
                self.stall(asyncio.get_running_loop())
                return
            self.got += data

    def close(self, *, reset: bool = False) -> None:
        self.stall(asyncio.get_running_loop())
        if reset:
            self.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.far.close()


@dataclass
class Bench:
    """An engine, one session, its source's far end and its listeners."""

    session: UserSession
    source: Any
    loop: asyncio.AbstractEventLoop
    listeners: list[Listener] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def listen(self, options: SinkOptions | None = None, *, udp: bool = False, family: int = 4, buffer: int = 0) -> Listener:
        near, far = pair(udp=udp, family=family, buffer=buffer)
        listener = Listener(near, far)

        def on_left(sink: int, why: Left, number: int, parting: Parting) -> None:
            assert sink == listener.number
            listener.left, listener.parting = (why, number), parting

        listener.number = self.session.add_sink(near, options or SinkOptions(), on_left)
        listener.read(self.loop)
        self.listeners.append(listener)
        return listener

    async def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = self.loop.time() + 20
        while not condition():
            assert self.loop.time() < deadline, what
            await asyncio.sleep(0.005)

    def sink(self, listener: Listener) -> Any:
        return next(one for one in self.session.sinks() if one.sink == listener.number)

    async def caught_up(self, *listeners: Listener) -> None:
        head = self.session.ring.head
        numbers = {one.number for one in listeners or self.listeners}
        await self.until(
            lambda: all((s.cursor or 0) >= head for s in self.session.sinks() if s.sink in numbers), "all sinks have everything"
        )


def pair(*, udp: bool = False, family: int = 4, buffer: int = 0) -> tuple[socket.socket, socket.socket]:
    """Connected sockets: the near end is ours, the far end the client's. `buffer`: bytes that each side keeps."""
    address = LOOPBACKS[family]
    if udp:
        far = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        far.bind((address, 0))
        near = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
        near.connect(far.getsockname())
    else:
        with socket.socket(FAMILIES[family]) as listener:
            if buffer:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            listener.bind((address, 0))
            listener.listen()
            near = socket.create_connection(listener.getsockname()[:2])
            far = listener.accept()[0]
        if buffer:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    far.setblocking(False)
    return near, far


@contextlib.asynccontextmanager
async def bench(source: str | FileSource = "tcp", **options: Any) -> AsyncIterator[Bench]:
    """`source`: "tcp", "udp" or a file. Afterwards nothing is left in the engine."""
    schedule = Schedule()
    engine = UserEngine(schedule)
    near: Source
    if isinstance(source, FileSource):
        near, far = source, None
    else:
        far, near = pair(udp=source == "udp", buffer=0)
        if source == "udp":
            near, far = near, far
    ended: list[str] = []
    session = engine.begin(near, SessionOptions(**options), owner="vm", level=1, on_end=ended.append)
    made = Bench(session, far, asyncio.get_running_loop(), ended=ended)
    try:
        yield made
    finally:
        session.close()
        assert not engine._watched and not session.stragglers and not session.waiting
        engine.close()
        schedule.close()
        for listener in made.listeners:
            listener.close()
            listener.near.close()
        for sock in (near, far):
            if isinstance(sock, socket.socket):
                sock.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def feed(made: Bench, data: bytes, *, piece: int = 10_000, pause: float = 0.0) -> None:
    """Into a TCP source."""
    made.source.setblocking(False)
    for at in range(0, len(data), piece):
        await made.loop.sock_sendall(made.source, data[at : at + piece])
        await asyncio.sleep(pause)
    await made.until(lambda: made.session.status().bytes_in >= len(data), "the source's bytes arrive")
