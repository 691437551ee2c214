# SPDX-License-Identifier: Apache-2.0
"""The server on real sockets (loopback) and real files: bytes, turns, and what a bad file or a lost client does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from guest_agent.handoff.errors import Reason
from guest_agent.handoff.snapshot import Endpoint
from guest_agent.handoff.state import Host
from hypervisor_svc import serve
from hypervisor_svc.connection import Connection, Guest
from hypervisor_svc.domains import Machine
from hypervisor_svc.policy import Job
from hypervisor_svc.redirect import Flow
from hypervisor_svc.schedule import Schedule
from tests.guest_agent.handoff.samples import SNAPSHOT

QUANTUM = 1 << 16


class Bench:
    """A server, and the connections that it serves."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._over: dict[Connection, asyncio.Future[int]] = {}
        self._stack = contextlib.ExitStack()
        self.order: list[Guest] = []
        self.server = serve.Server(
            Schedule(), quantum=QUANTUM, next_request=lambda _: 15.0, on_finished=self._finished, on_gone=self._gone
        )

    def close(self) -> None:
        self.server.close()
        for connection in self._over:
            connection.close()
        self._stack.close()

    def _finished(self, connection: Connection) -> None:
        self._over[connection].set_result(0)

    def _gone(self, connection: Connection, number: int) -> None:
        self._over[connection].set_result(number)

    def guest(self, name: str = "guest") -> Guest:
        return Guest(Machine(name=name, uuid=name, channel_path="", share=str(self._folder), addresses=()))

    def connect(
        self, guest: Guest, file: Path, *, offset: int = 0, count: int | None = None, priority: str = "normal"
    ) -> tuple[Connection, socket.socket]:
        """A connection that is about to be served, and its client."""
        client, sock = _pair(self._stack)
        fd = os.open(file, os.O_RDONLY)
        size = os.fstat(fd).st_size
        job = Job("0" * 32, file.name, 0, offset, size - offset if count is None else count, priority, SNAPSHOT)
        flow = Flow(client=Endpoint("127.0.0.1", 1), server=Endpoint("127.0.0.1", 2))
        connection = Connection(guest, job, flow, state=Host.SERVING, sock=sock, file=fd)
        self._over[connection] = asyncio.get_running_loop().create_future()
        return connection, client

    async def over(self, connection: Connection) -> int:
        """Wait until the server is done with it; the error number."""
        return await asyncio.wait_for(self._over[connection], 20)


def _pair(stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """Both ends of a loopback connection with small buffers: client, server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = stack.enter_context(socket.socket())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUANTUM)
        client.connect(listener.getsockname())
        sock, _ = listener.accept()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QUANTUM)
    sock.setblocking(False)
    client.setblocking(False)
    return client, sock


@contextlib.asynccontextmanager
async def _bench(folder: Path) -> AsyncIterator[Bench]:
    with contextlib.closing(Bench(folder)) as bench:
        yield bench


async def _read(client: socket.socket, count: int) -> bytes:
    """That many bytes, or what came before the end."""
    data = bytearray()
    while len(data) < count:
        piece = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, min(1 << 16, count - len(data))), 20)
        if not piece:
            break
        data += piece
    return bytes(data)


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[[str, int], Path]:
    def make(name: str, size: int) -> Path:
        file = tmp_path / name
        file.write_bytes(random.Random(name).randbytes(size))
        return file

    return make


@pytest.mark.parametrize("offset,count", [(0, 1), (0, 3_000_000), (1, QUANTUM), (2_999_999, 1), (QUANTUM - 1, QUANTUM + 2)])
def test_ranges(make_file: Callable[[str, int], Path], tmp_path: Path, offset: int, count: int) -> None:
    file = make_file("a", 3_000_000)

    async def run() -> None:
        async with _bench(tmp_path) as bench:
            connection, client = bench.connect(bench.guest(), file, offset=offset, count=count)
            bench.server.add(connection)
            assert await _read(client, count) == file.read_bytes()[offset : offset + count]
            assert await bench.over(connection) == 0
            assert (connection.sent, connection.reason, connection.guest.bytes_sent) == (count, None, count)

    asyncio.run(run())


@contextlib.contextmanager
def _cold(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No part of any file is in the page cache, and the disk is held up until the event is set."""
    disk = threading.Event()
    read_in = serve._read_in

    def slow(file: int, offset: int, length: int) -> None:
        disk.wait(20)
        read_in(file, offset, length)

    monkeypatch.setattr(serve, "_resident", lambda *_: False)
    monkeypatch.setattr(serve, "_read_in", slow)
    try:
        yield disk
    finally:
        disk.set()


def test_cold_file_is_sent_once(make_file: Callable[[str, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client has room while the disk reads: the part is fetched once, and sent once."""
    file = make_file("cold", 10 * QUANTUM + 3)

    async def run() -> None:
        async with _bench(tmp_path) as bench:
            with _cold(monkeypatch) as disk:
                connection, client = bench.connect(bench.guest(), file)
                bench.server.add(connection)
                for _ in range(20):
                    bench.server._enqueue(connection)
                    await asyncio.sleep(0.001)
                disk.set()
                assert await _read(client, 10 * QUANTUM + 3) == file.read_bytes()
                assert await bench.over(connection) == 0

    asyncio.run(run())


def test_cold_file_does_not_stop_others(
    make_file: Callable[[str, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold, warm = make_file("cold", QUANTUM), make_file("warm", 5 * QUANTUM)
    inode, resident = cold.stat().st_ino, serve._resident

    async def run() -> None:
        async with _bench(tmp_path) as bench:
            with _cold(monkeypatch) as disk:
                monkeypatch.setattr(serve, "_resident", lambda fd, *rest: os.fstat(fd).st_ino != inode and resident(fd, *rest))
                waits, _ = bench.connect(bench.guest(), cold)
                runs, client = bench.connect(bench.guest(), warm)
                bench.server.add(waits)
                bench.server.add(runs)
                assert await _read(client, 5 * QUANTUM) == warm.read_bytes()
                assert await bench.over(runs) == 0
                assert waits.sent == 0
                disk.set()
                assert await bench.over(waits) == 0

    asyncio.run(run())


def test_removed_while_the_disk_reads(
    make_file: Callable[[str, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator takes it home: nothing is sent any more."""
    file = make_file("cold", QUANTUM)

    async def run() -> None:
        async with _bench(tmp_path) as bench:
            with _cold(monkeypatch) as disk:
                connection, client = bench.connect(bench.guest(), file)
                bench.server.add(connection)
                bench.server.remove(connection)
                disk.set()
                await asyncio.sleep(0.1)
                assert connection.sent == 0
                with pytest.raises(BlockingIOError):
                    client.recv(1)

    asyncio.run(run())


def test_file_shorter_than_asked(make_file: Callable[[str, int], Path], tmp_path: Path) -> None:
    file = make_file("short", QUANTUM + 5)

    async def run() -> None:
        async with _bench(tmp_path) as bench:
            connection, client = bench.connect(bench.guest(), file, count=QUANTUM + 100)
            bench.server.add(connection)
            assert await _read(client, QUANTUM + 5) == file.read_bytes()
            assert await bench.over(connection) == 0
            assert (connection.reason, connection.sent) == (Reason.FILE_SHORT, QUANTUM + 5)

    asyncio.run(run())


def test_client_resets(make_file: Callable[[str, int], Path], tmp_path: Path) -> None:
    file = make_file("large", 100 * QUANTUM)

    async def run() -> None:
        async with _bench(tmp_path) as bench:
            connection, client = bench.connect(bench.guest(), file)
            bench.server.add(connection)
            await _read(client, QUANTUM)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            assert await bench.over(connection) in (errno.ECONNRESET, errno.EPIPE)

    asyncio.run(run())


def test_finished_means_acknowledged(make_file: Callable[[str, int], Path], tmp_path: Path) -> None:
    """What fits into both buffers is sent at once; it is over when the client's kernel has it all."""
    file = make_file("large", 4 * QUANTUM)

    async def run() -> None:
        async with _bench(tmp_path) as bench:
            connection, client = bench.connect(bench.guest(), file)
            bench.server.add(connection)
            await asyncio.sleep(0.05)
            assert not bench._over[connection].done()
            await _read(client, 4 * QUANTUM)
            await bench.over(connection)
            assert connection.sock is not None
            assert serve._unacknowledged(connection.sock) == 0

    asyncio.run(run())


def _make_ready(bench: Bench, connection: Connection) -> None:
    """Its socket has room."""
    assert connection.sock is not None
    bench.server._by_fd[connection.sock.fileno()] = serve._Sending(connection, bench.server._advance)
    bench.server._enqueue(connection)


def test_machines_take_turns(make_file: Callable[[str, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM with one client gets as many turns as one with twenty."""
    file = make_file("large", 40 * QUANTUM)

    async def run() -> list[str]:
        async with _bench(tmp_path) as bench:
            turns: list[str] = []
            monkeypatch.setattr(bench.server, "_advance", lambda connection: turns.append(connection.guest.machine.name))
            many, one = bench.guest("many"), bench.guest("one")
            for guest, connections in ((many, 20), (one, 1)):
                for _ in range(connections):
                    _make_ready(bench, bench.connect(guest, file)[0])
            for _ in range(3):
                await asyncio.sleep(0)
            return turns

    turns = asyncio.run(run())
    assert turns[:2] == ["many", "one"]
    assert turns.count("many") == 20


@pytest.mark.parametrize("order", [("low", "normal", "high"), ("high", "low", "normal")])
def test_priorities(
    make_file: Callable[[str, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...]
) -> None:
    file = make_file("file", QUANTUM)

    async def run() -> list[str]:
        async with _bench(tmp_path) as bench:
            turns: list[str] = []
            monkeypatch.setattr(bench.server, "_advance", lambda connection: turns.append(connection.job.priority))
            guest = bench.guest()
            for priority in order:
                _make_ready(bench, bench.connect(guest, file, priority=priority)[0])
            for _ in range(2):
                await asyncio.sleep(0)
            return turns

    assert asyncio.run(run()) == ["high", "normal", "low"]


@pytest.mark.parametrize("name,expected", [("bbr", True), ("bbr3", True), ("cubic", False), ("reno", False), ("", False)])
def test_paces(name: str, expected: bool) -> None:
    assert serve.paces(name) is expected


def test_unreadable_part(make_file: Callable[[str, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO of the disk ends the transfer where it stands, with the disk's error; the connection is fine."""
    file = make_file("bad", QUANTUM)

    def broken(fd: int, offset: int, length: int) -> None:
        os.close(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def run() -> None:
        async with _bench(tmp_path) as bench:
            monkeypatch.setattr(serve, "_resident", lambda *_: False)
            monkeypatch.setattr(serve, "_read_in", broken)
            connection, _ = bench.connect(bench.guest(), file)
            bench.server.add(connection)
            assert await bench.over(connection) == 0
            assert (connection.reason, connection.errno, connection.sent) == (Reason.READ_ERROR, errno.EIO, 0)
            assert dataclasses.asdict(connection.job)["path"] in connection.message

    asyncio.run(run())


def test_a_vm_of_a_higher_class_comes_first(
    make_file: Callable[[str, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the other says of its own transfers."""
    file = make_file("file", QUANTUM)

    async def run() -> list[str]:
        async with _bench(tmp_path) as bench:
            turns: list[str] = []
            monkeypatch.setattr(bench.server, "_advance", lambda connection: turns.append(connection.guest.machine.name))
            cheap, dear = bench.guest("cheap"), bench.guest("dear")
            dear.machine = dataclasses.replace(dear.machine, priority="high")
            for guest, priority in ((cheap, "high"), (dear, "low"), (cheap, "high"), (dear, "low")):
                _make_ready(bench, bench.connect(guest, file, priority=priority)[0])
            for _ in range(2):
                await asyncio.sleep(0)
            return turns

    assert asyncio.run(run()) == ["dear", "dear", "cheap", "cheap"]
