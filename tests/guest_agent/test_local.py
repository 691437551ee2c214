# SPDX-License-Identifier: Apache-2.0
"""The local transfer: every byte, timeouts by progress, short files, and what transports have buffered."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agent import local


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


def read(sock: socket.socket, count: int, into: bytearray) -> threading.Thread:
    def run() -> None:
        while len(into) < count and (data := sock.recv(1 << 16)):
            into.extend(data)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_sends_every_byte(pair: tuple[socket.socket, socket.socket], tmp_path: Path, timeout: float | None) -> None:
    blob = os.urandom(5_000_000)
    (tmp_path / "file").write_bytes(blob)
    pair[0].settimeout(timeout)
    received = bytearray()
    reader = read(pair[1], len(blob) - 1000, received)
    with open(tmp_path / "file", "rb") as file:
        assert local.send(pair[0], file, 1000, len(blob) - 1000) == len(blob) - 1000
        assert file.tell() == 0
    reader.join(5)
    assert received == blob[1000:]


def test_a_short_file_ends_the_transfer(pair: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    with open(tmp_path / "file", "rb") as file:
        assert local.send(pair[0], file, 40, 1000) == 60


def test_offsets_beyond_four_gigabytes(pair: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        file.truncate(5 << 30)
        os.pwrite(file.fileno(), b"tail", (5 << 30) - 4)
        assert local.send(pair[0], file, (5 << 30) - 4, 4) == 4
    assert pair[1].recv(10) == b"tail"


def test_a_timeout_is_for_progress(pair: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    """A client that reads a little now and then keeps the transfer alive; one that stops ends it."""
    with open(tmp_path / "file", "w+b") as file:
        file.truncate(128 << 20)
        pair[0].settimeout(0.2)
        pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        stop = time.monotonic() + 0.5

        def read_slowly() -> None:
            while time.monotonic() < stop:
                pair[1].recv(1 << 16)
                time.sleep(0.02)

        reader = threading.Thread(target=read_slowly, daemon=True)
        reader.start()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            local.send(pair[0], file, 0, 128 << 20)
        assert time.monotonic() - began > 0.5
        reader.join()


def test_a_file_system_without_sendfile(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "sendfile", refuse)
    (tmp_path / "file").write_bytes(b"abcdef")
    with open(tmp_path / "file", "rb") as file:
        assert local.send(pair[0], file, 1, 10) == 5
    assert pair[1].recv(10) == b"bcdef"


def test_a_client_that_left(pair: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    pair[1].close()
    with open(tmp_path / "file", "w+b") as file:
        file.truncate(1 << 20)
        with pytest.raises(ConnectionError):
            local.send(pair[0], file, 0, 1 << 20)


class Recorder(asyncio.Protocol):
    """An application's protocol: hears pause and resume in turns, whoever listens in."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def pause_writing(self) -> None:
        self.events.append("pause")

    def resume_writing(self) -> None:
        self.events.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(None)


@pytest.mark.parametrize("high", [1 << 16, 1 << 30], ids=["protocol paused", "protocol not paused"])
def test_drain_waits_and_the_protocol_hears_all(pair: tuple[socket.socket, socket.socket], high: int) -> None:
    written = 20_000_000

    async def scenario() -> None:
        transport, protocol = await asyncio.get_running_loop().create_connection(Recorder, sock=pair[0])
        transport.set_write_buffer_limits(high=high)
        limits = transport.get_write_buffer_limits()
        transport.write(bytes(written))
        assert transport.get_write_buffer_size()
        received = bytearray()
        reader = read(pair[1], written, received)
        await local.drain(transport)
        assert not transport.get_write_buffer_size()
        assert transport.get_protocol() is protocol
        assert transport.get_write_buffer_limits() == limits
        assert protocol.events == ["pause", "resume"]
        reader.join(5)
        transport.close()
        await protocol.lost

    asyncio.run(scenario())


def test_drain_ends_when_the_client_leaves(pair: tuple[socket.socket, socket.socket]) -> None:
    async def scenario() -> None:
        transport, protocol = await asyncio.get_running_loop().create_connection(Recorder, sock=pair[0])
        transport.write(bytes(20_000_000))
        pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        asyncio.get_running_loop().call_later(0.05, pair[1].close)
        with pytest.raises(ConnectionError):
            await local.drain(transport)
        await protocol.lost

    asyncio.run(scenario())


def test_event_loops_without_sendfile(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(blob)

    async def refuse(*_: object, **__: object) -> int:
        raise NotImplementedError

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "sendfile", refuse)
        transport, protocol = await loop.create_connection(Recorder, sock=pair[0])
        received = bytearray()
        reader = read(pair[1], len(blob), received)
        assert await local.send_on_transport(transport, file, 0, len(blob)) == len(blob)
        transport.close()
        await protocol.lost
        reader.join(5)
        assert received == blob

    with open(tmp_path / "file", "rb") as file:
        asyncio.run(scenario())
