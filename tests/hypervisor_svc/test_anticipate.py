# SPDX-License-Identifier: Apache-2.0
"""A server that waits for its client's next request, on real sockets; the whole product: `tests/namespaces/test_anticipate.py`."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from guest_agent.handoff.anticipated import Anticipated, write_anticipated
from guest_agent.handoff.errors import GuestError
from hypervisor_svc import serve
from hypervisor_svc.anticipate import AnticipateWords, Anticipation, read_anticipation, write_anticipation
from hypervisor_svc.connection import Connection
from tests.hypervisor_svc.test_serve import Bench, _bench, _read

SIZE = 300_000
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.fixture
def film(tmp_path: Path) -> Path:
    for number in range(4):
        (tmp_path / str(number)).write_bytes(bytes([number]) * SIZE)
        (tmp_path / str(number)).chmod(0o644)
    tmp_path.chmod(0o755)
    return tmp_path


def ask(number: int) -> bytes:
    return b"GET /%d\r\n\r\n" % number


def told(film: Path, *numbers: int) -> tuple[Anticipated, ...]:
    """These files, whole, as they are now."""
    found = []
    for number in numbers:
        facts = os.stat(film / str(number))
        found.append(Anticipated(ask(number), HEAD, str(number), 0, SIZE, facts.st_size, facts.st_mtime_ns))
    return tuple(found)


class Scene:
    """A connection on which file 0 goes out, and its client."""

    def __init__(self, bench: Bench, film: Path, anticipation: Anticipation) -> None:
        self.bench, self._film = bench, film
        self.connection, self.client = bench.connect(bench.guest(), film / "0")
        self.connection.anticipation = anticipation

    async def begin(self) -> None:
        self.bench.server.add(self.connection)
        assert await _read(self.client, SIZE) == bytes(SIZE)

    async def fetch(self, number: int) -> None:
        self.client.send(ask(number))
        assert await _read(self.client, len(HEAD) + SIZE) == HEAD + bytes([number]) * SIZE

    async def is_left(self, request: bytes) -> None:
        """The server is done with it, and its request is unread."""
        self.client.send(request)
        assert await self.bench.over(self.connection) == 0
        assert self.connection.sock is not None and self.connection.sock.recv(1000) == (request or ask(2))
        assert self.connection.sent == self.connection.job.count and self.connection.reason is None


def play(film: Path, anticipation: Anticipation, part: Callable[[Scene], Awaitable[None]]) -> Connection:
    async def run() -> Connection:
        async with _bench(film) as bench:
            scene = Scene(bench, film, anticipation)
            await scene.begin()
            await part(scene)
            return scene.connection

    return asyncio.run(run())


def test_one_after_another(film: Path) -> None:
    """The last is not waited for: there is nothing left to answer."""

    async def part(scene: Scene) -> None:
        for number in (1, 2, 3):
            await scene.fetch(number)
        assert await scene.bench.over(scene.connection) == 0

    connection = play(film, Anticipation(told(film, 1, 2, 3), everything=False), part)
    assert (connection.answered, connection.job.path, connection.sent) == ([0, 1, 2], "3", SIZE)
    assert connection.before == 3 * (SIZE + len(HEAD))
    assert connection.guest.bytes_sent == 4 * SIZE


def test_something_else(film: Path) -> None:
    async def part(scene: Scene) -> None:
        await scene.fetch(2)
        await scene.is_left(ask(1))

    assert play(film, Anticipation(told(film, 1, 2, 3), everything=False), part).answered == [1]


@pytest.mark.parametrize("change", ["size", "time", "gone", "link", "outside", "folder"])
def test_a_file_that_is_another(film: Path, change: str) -> None:
    (anticipated,) = told(film, 1)
    if change == "size":
        anticipated = replace(anticipated, size=SIZE - 1)
    elif change == "time":
        anticipated = replace(anticipated, mtime_ns=anticipated.mtime_ns + 1)
    elif change == "gone":
        (film / "1").unlink()
    elif change == "link":
        (film / "1").rename(film / "real")
        (film / "1").symlink_to("real")
    else:
        anticipated = replace(anticipated, path="../passwd" if change == "outside" else ".")

    async def part(scene: Scene) -> None:
        await scene.is_left(ask(1))

    assert play(film, Anticipation((anticipated,), everything=True), part).answered == []


@pytest.mark.parametrize("everything", [False, True])
def test_a_file_that_not_everybody_may_read(film: Path, everything: bool) -> None:
    """It is for root's applications alone: there is no descriptor that proves anything."""
    (film / "1").chmod(0o600)

    async def part(scene: Scene) -> None:
        if everything:
            await scene.fetch(1)
        else:
            await scene.is_left(ask(1))

    play(film, Anticipation(told(film, 1), everything=everything), part)


def test_the_client_closes(film: Path) -> None:
    async def part(scene: Scene) -> None:
        scene.client.close()
        assert await scene.bench.over(scene.connection) == 0

    play(film, Anticipation(told(film, 1), everything=False), part)


def test_a_pause_that_is_too_long(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def part(scene: Scene) -> None:
        assert await scene.bench.over(scene.connection) == 0
        assert not scene.bench.server.serves(scene.connection)

    acknowledged = serve.Server._acknowledged

    def short(self: serve.Server, connection: Connection) -> None:
        self._next_request = lambda _: 0.05
        acknowledged(self, connection)

    monkeypatch.setattr(serve.Server, "_acknowledged", short)
    play(film, Anticipation(told(film, 1), everything=False), part)


@pytest.mark.parametrize("lost", ["a part", "the agent"])
def test_a_part_that_does_not_come(film: Path, lost: str) -> None:
    """A client that asks for what it may have said waits no longer than that is known."""

    async def part(scene: Scene) -> None:
        connection, server = scene.connection, scene.bench.server
        words = AnticipateWords(serve=server.add, again=server.listen_again)
        connection.guest.connections[connection.token] = connection
        scene.client.send(ask(2))
        await asyncio.sleep(0.05)
        assert server.serves(connection)
        if lost == "a part":
            header = {"type": "anticipate", "token": connection.token, "first": 3, "more": True, "everything": False}
            words.on_anticipate(connection.guest, header, _body(told(film, 3)))
        else:
            words.no_more(connection)
        await scene.is_left(b"")

    play(film, Anticipation(told(film, 1), everything=False, more=True), part)


def test_parts_in_another_order(film: Path) -> None:
    """What follows is answered, and no more waited for."""

    async def part(scene: Scene) -> None:
        connection, server = scene.connection, scene.bench.server
        words = AnticipateWords(serve=server.add, again=server.listen_again)
        connection.guest.connections[connection.token] = connection
        header = {"type": "anticipate", "token": connection.token, "more": True, "everything": False}
        words.on_anticipate(connection.guest, {**header, "first": 2}, _body(told(film, 3)))
        words.on_anticipate(connection.guest, {**header, "first": 1}, _body(told(film, 1, 2)))
        await scene.fetch(2)
        await scene.is_left(ask(3))

    assert play(film, Anticipation(told(film, 1), everything=False, more=True), part).answered == [2]


def _body(anticipated: tuple[Anticipated, ...]) -> bytes:
    return json.dumps(write_anticipated(anticipated)).encode()


def test_said_when_all_was_sent(film: Path) -> None:
    """The guest's word comes after the file: the host waits for its place-holder, and hears this first."""

    async def part(scene: Scene) -> None:
        assert await scene.bench.over(scene.connection) == 0
        connection, server = scene.connection, scene.bench.server
        connection.anticipation, connection.waits_for_guest = None, True
        words = AnticipateWords(serve=server.add, again=server.listen_again)
        connection.guest.connections[connection.token] = connection
        scene.bench._over[connection] = asyncio.get_running_loop().create_future()
        header = {"type": "anticipate", "token": connection.token, "first": 0, "more": True, "everything": False}
        words.on_anticipate(connection.guest, header, _body(told(film, 1)))
        assert not connection.waits_for_guest
        await scene.fetch(1)
        scene.client.send(ask(2))
        await asyncio.sleep(0.05)
        assert server.serves(connection)  # whether it is anticipated is not known yet
        words.on_anticipate(connection.guest, {**header, "first": 1}, _body(told(film, 2)))
        assert await _read(scene.client, len(HEAD) + SIZE) == HEAD + b"\2" * SIZE
        with pytest.raises(GuestError, match="32 of 65536 may be"):
            words.on_anticipate(connection.guest, {**header, "first": 2}, _body(told(film, 3) * 31))
        words.on_anticipate(connection.guest, {**header, "first": 2}, _body(told(film, 3)))
        assert server.serves(connection)
        words.on_anticipate(connection.guest, {**header, "more": False}, b"[]")
        assert await scene.bench.over(connection) == 0

    play(film, Anticipation((), everything=False), part)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"5", b"[{}]", b"[" * 100_000, b"\xff", b" " * 300_000 + b"[]"], ids=lambda body: repr(body[:5])
)
def test_nonsense(film: Path, body: bytes) -> None:
    words = AnticipateWords(serve=lambda _: None, again=lambda _: None)

    async def part(scene: Scene) -> None:
        header = {"type": "anticipate", "token": scene.connection.token, "first": 0, "more": False, "everything": True}
        with pytest.raises(GuestError):
            words.on_anticipate(scene.connection.guest, header, body)
        with pytest.raises(GuestError):
            words.on_anticipate(scene.connection.guest, {**header, "everything": 1}, b"[]")
        with pytest.raises(GuestError):
            words.on_anticipate(scene.connection.guest, {**header, "first": "0"}, b"[]")

    play(film, Anticipation((), everything=False), part)


def test_told_to_the_next_host(film: Path) -> None:
    anticipation = Anticipation(told(film, 1, 2, 3), everything=True, answered=[0, 2])
    assert read_anticipation(json.loads(json.dumps(write_anticipation(anticipation)))) == anticipation
    assert read_anticipation(write_anticipation(None)) is None
    row = write_anticipation(anticipation) or {}
    wrong: tuple[object, ...] = (5, [], {**row, "answered": [3]}, {**row, "answered": [0, 0]}, {**row, "everything": 1})
    for one in wrong:
        with pytest.raises((GuestError, ValueError)):
            read_anticipation(one)
