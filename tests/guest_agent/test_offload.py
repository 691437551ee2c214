# SPDX-License-Identifier: Apache-2.0
"""The API against an agent that speaks the protocol and really sends on the descriptors it gets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from guest_agent import offload, offload_asyncio
from guest_agent.offload import Transfer
from guest_agent.offload_wire import here
from tests.guest_agent.protocol_agent import Message, ProtocolAgent, deliver, reply, send_bytes

BLOB = os.urandom(1_500_000)
Pair = tuple[socket.socket, "Client"]


class Client:
    """Reads all that comes, in its own thread."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.received = sock, bytearray()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while data := self.sock.recv(1 << 16):
                self.received += data
        except OSError:
            pass

    def wait(self, count: int) -> bytes:
        until = time.monotonic() + 5
        while len(self.received) < count and time.monotonic() < until:
            time.sleep(0.002)
        return bytes(self.received)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self.sock.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    client = Client(theirs)
    yield ours, client
    client.close()
    ours.close()


@pytest.fixture
def share(tmp_path: Path) -> Path:
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "blob").write_bytes(BLOB)
    (tmp_path / "share" / "small").write_bytes(BLOB[:1000])
    (tmp_path / "elsewhere").write_bytes(BLOB)
    return tmp_path / "share"


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test's own agent path, and no connection or memory of an absent agent from the test before."""
    monkeypatch.setenv("STREAMLIFT_AGENT", str(tmp_path / "agent.sock"))
    offload._after_fork()
    yield
    offload._after_fork()


@pytest.fixture
def agent(tmp_path: Path, share: Path) -> Iterator[ProtocolAgent]:
    with ProtocolAgent(str(tmp_path / "agent.sock"), shares=[str(share)]) as running:
        yield running


@pytest.fixture
def blob(share: Path) -> Iterator[IO[bytes]]:
    with open(share / "blob", "rb") as file:
        yield file


Call = Callable[..., Transfer]


def _blocking(sock: socket.socket, file: IO[bytes], *rest: int) -> Transfer:
    sock.setblocking(True)
    return offload.sendfile(sock, file, *rest)


def _on_socket(sock: socket.socket, file: IO[bytes], *rest: int) -> Transfer:
    sock.setblocking(False)
    return asyncio.run(_within(offload.sendfile_async(sock, file, *rest)))


def _on_writer(sock: socket.socket, file: IO[bytes], *rest: int) -> Transfer:
    """On a duplicate, so that one test may call twice."""

    async def run() -> Transfer:
        _, writer = await asyncio.open_connection(sock=sock.dup())
        try:
            return await _within(offload.sendfile_async(writer, file, *rest))
        finally:
            writer.close()

    return asyncio.run(run())


async def _within(sending: Awaitable[Transfer]) -> Transfer:
    return await asyncio.wait_for(sending, 10)


@pytest.fixture(params=[_blocking, _on_socket, _on_writer], ids=["blocking", "socket", "writer"])
def call(request: pytest.FixtureRequest) -> Call:
    function: Call = request.param
    return function


# Every way of calling, every outcome.


def test_offloaded(agent: ProtocolAgent, pair: Pair, blob: IO[bytes], call: Call) -> None:
    assert call(pair[0], blob) == Transfer(len(BLOB), "offloaded", None, "test: None")
    assert pair[1].wait(len(BLOB)) == BLOB
    request = agent.requests[0]
    assert {key: request[key] for key in ("v", "op", "offset", "count", "priority")} == {
        "v": 1,
        "op": "sendfile",
        "offset": 0,
        "count": len(BLOB),
        "priority": "normal",
    }
    assert len(request["token"]) == 32 and int(request["token"], 16)
    assert offload.status()["agent"]["threshold"] == 65536


def test_a_part_of_the_file(agent: ProtocolAgent, pair: Pair, blob: IO[bytes], call: Call) -> None:
    assert call(pair[0], blob, 1000, 100_000).sent == 100_000
    assert pair[1].wait(100_000) == BLOB[1000:101_000]


def test_a_count_beyond_the_end(agent: ProtocolAgent, pair: Pair, blob: IO[bytes], call: Call) -> None:
    assert call(pair[0], blob, 1_000_000, 1 << 40).sent == 500_000
    assert agent.requests[0]["count"] == 500_000
    assert pair[1].wait(500_000) == BLOB[1_000_000:]


def test_the_agent_declines(agent: ProtocolAgent, pair: Pair, blob: IO[bytes], call: Call) -> None:
    agent.behaviour = lambda request, fds: reply("local", reason="host_away")
    assert call(pair[0], blob) == Transfer(len(BLOB), "local", "host_away", "test: host_away")
    assert pair[1].wait(len(BLOB)) == BLOB


def test_the_host_sent_a_part(agent: ProtocolAgent, pair: Pair, blob: IO[bytes], call: Call) -> None:
    def behave(request: Message, fds: list[int]) -> Message:
        return reply("local", send_bytes(fds, request["offset"], 70_001), reason="draining")

    agent.behaviour = behave
    assert call(pair[0], blob, 5) == Transfer(len(BLOB) - 5, "local", "draining", "test: draining")
    assert pair[1].wait(len(BLOB) - 5) == BLOB[5:]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ECONNRESET, ConnectionResetError), (errno.EPIPE, BrokenPipeError), (errno.ETIMEDOUT, TimeoutError)],
)
def test_failures_are_the_kernels(
    agent: ProtocolAgent, pair: Pair, blob: IO[bytes], call: Call, number: int, kind: type[OSError]
) -> None:
    agent.behaviour = lambda request, fds: reply("failed", 17, reason="peer_gone", errno=number)
    with pytest.raises(kind, match="after 17 bytes") as caught:
        call(pair[0], blob)
    assert caught.value.errno == number


def test_no_agent(pair: Pair, blob: IO[bytes], call: Call) -> None:
    assert call(pair[0], blob).reason == "no_agent"
    assert pair[1].wait(len(BLOB)) == BLOB


def test_the_agent_refuses_the_user(agent: ProtocolAgent, pair: Pair, blob: IO[bytes], call: Call) -> None:
    agent.greeting = {"v": 1, "error": "user 7 may not use the agent"}
    assert call(pair[0], blob).reason == "not_allowed"
    assert pair[1].wait(len(BLOB)) == BLOB


def test_an_agent_that_says_nonsense(agent: ProtocolAgent, pair: Pair, blob: IO[bytes], call: Call) -> None:
    agent.greeting = {"hello": ["?"]}
    assert call(pair[0], blob).reason == "no_agent"
    assert pair[1].wait(len(BLOB)) == BLOB


def test_small_files_cost_no_request(agent: ProtocolAgent, pair: Pair, share: Path, call: Call) -> None:
    with open(share / "small", "rb") as file:
        assert call(pair[0], file) == Transfer(1000, "local", "too_small", here("too_small").message)
    assert pair[1].wait(1000) == BLOB[:1000]
    assert not agent.requests


def test_files_elsewhere_cost_no_request(agent: ProtocolAgent, pair: Pair, share: Path, call: Call) -> None:
    with open(share.parent / "elsewhere", "rb") as file:
        assert call(pair[0], file).reason == "not_on_share"
    assert pair[1].wait(len(BLOB)) == BLOB
    assert not agent.requests


def test_nothing_to_send(agent: ProtocolAgent, pair: Pair, blob: IO[bytes], call: Call) -> None:
    assert call(pair[0], blob, 0, 0).sent == 0
    assert call(pair[0], blob, len(BLOB) + 1).sent == 0
    assert not agent.requests


def test_not_tcp(agent: ProtocolAgent, blob: IO[bytes], call: Call) -> None:
    ours, theirs = socket.socketpair()
    client = Client(theirs)
    with ours:
        assert call(ours, blob).reason == "not_tcp"
        assert client.wait(len(BLOB)) == BLOB
        client.close()


@pytest.mark.parametrize("arguments", [(-1,), (0, -1)])
def test_bad_arguments(pair: Pair, blob: IO[bytes], call: Call, arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="negative"):
        call(pair[0], blob, *arguments)


def test_bad_priority_and_bad_blocking_mode(pair: Pair, blob: IO[bytes]) -> None:
    with pytest.raises(ValueError, match="low, normal, high"):
        offload.sendfile(pair[0], blob, priority="urgent")
    with pytest.raises(ValueError, match="must be non-blocking"):
        asyncio.run(offload.sendfile_async(pair[0], blob))
    pair[0].setblocking(False)
    with pytest.raises(ValueError, match="sendfile_async"):
        offload.sendfile(pair[0], blob)


# The agent goes away.


def test_reclaim_from_the_agents_next_life(agent: ProtocolAgent, pair: Pair, blob: IO[bytes], call: Call) -> None:
    """The first life takes the request and dies; the second is given the same token and socket, and sends."""

    def first_life(request: Message, fds: list[int]) -> Message | None:
        agent.behaviour = second_life
        return None

    def second_life(request: Message, fds: list[int]) -> Message:
        assert request["op"] == "reclaim" and len(fds) == 1
        assert request["token"] == agent.requests[0]["token"]
        with socket.socket(fileno=os.dup(fds[0])) as sock:
            assert sock.getpeername() == pair[1].sock.getsockname()
            os.set_blocking(fds[0], True)
            sock.sendall(BLOB)
            os.set_blocking(fds[0], False)
        return reply("offloaded", len(BLOB))

    agent.behaviour = first_life
    assert call(pair[0], blob).path == "offloaded"
    assert pair[1].wait(len(BLOB)) == BLOB


def test_an_agent_that_stays_away(
    agent: ProtocolAgent, pair: Pair, blob: IO[bytes], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guest_agent.offload_blocking.RECLAIM_LIMIT", 0.3)
    monkeypatch.setattr("guest_agent.offload_asyncio.RECLAIM_LIMIT", 0.3)

    def vanish(request: Message, fds: list[int]) -> None:
        agent.stop()

    agent.behaviour = vanish
    with pytest.raises(ConnectionResetError, match="did not come back"):
        call(pair[0], blob)


def test_an_idle_connection_that_died(agent: ProtocolAgent, pair: Pair, blob: IO[bytes]) -> None:
    assert offload.sendfile(pair[0], blob).path == "offloaded"
    agent.stop()
    agent.start()
    assert offload.sendfile(pair[0], blob).path == "offloaded"
    assert pair[1].wait(2 * len(BLOB)) == BLOB * 2
    assert agent.connections == 2


def test_an_absent_agent_is_looked_for_once_a_second(
    tmp_path: Path, share: Path, pair: Pair, blob: IO[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guest_agent.offload_blocking.RETRY_INTERVAL", 0.3)
    assert offload.sendfile(pair[0], blob).reason == "no_agent"
    with ProtocolAgent(str(tmp_path / "agent.sock"), shares=[str(share)]) as agent:
        assert offload.sendfile(pair[0], blob).reason == "no_agent"
        assert not agent.connections
        time.sleep(0.3)
        assert offload.sendfile(pair[0], blob).path == "offloaded"


def test_a_share_that_is_mounted_later(
    agent: ProtocolAgent, pair: Pair, share: Path, blob: IO[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.shares = []
    assert offload.sendfile(pair[0], blob).reason == "not_on_share"
    agent.shares = [str(share)]
    assert offload.sendfile(pair[0], blob).reason == "not_on_share"
    monkeypatch.setattr("guest_agent.offload_wire.REFRESH_INTERVAL", 0.0)
    assert offload.sendfile(pair[0], blob).path == "offloaded"


def test_a_host_that_comes_later(agent: ProtocolAgent, pair: Pair, blob: IO[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threshold counts, not that of an agent that was alone."""
    agent.threshold = 1 << 40
    assert offload.sendfile(pair[0], blob).reason == "too_small"
    agent.threshold = 1
    assert offload.sendfile(pair[0], blob).reason == "too_small"
    monkeypatch.setattr("guest_agent.offload_wire.REFRESH_INTERVAL", 0.0)
    assert offload.sendfile(pair[0], blob).path == "offloaded"


# Many at once.


def test_threads(agent: ProtocolAgent, share: Path) -> None:
    """Each thread its own connection to the agent, all reused: no answer reaches another thread."""
    failures: list[str] = []

    def transfer(number: int) -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            open(share / "blob", "rb") as file,
            socket.create_connection(listener.getsockname()) as ours,
        ):
            client = Client(listener.accept()[0])
            for turn in range(5):
                size = 70_000 + number * 1000 + turn
                if offload.sendfile(ours, file, number, size) != Transfer(size, "offloaded", None, "test: None"):
                    failures.append(f"{number}/{turn}")
            expected = b"".join(BLOB[number : number + 70_000 + number * 1000 + turn] for turn in range(5))
            if client.wait(len(expected)) != expected:
                failures.append(f"bytes of {number}")
            client.close()

    threads = [threading.Thread(target=transfer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failures
    assert agent.connections <= 8
    assert len({request["token"] for request in agent.requests}) == 40


def test_a_forked_child_has_its_own_connection(agent: ProtocolAgent, pair: Pair, blob: IO[bytes]) -> None:
    assert offload.sendfile(pair[0], blob).path == "offloaded"
    child = os.fork()
    if not child:
        os._exit(0 if offload.sendfile(pair[0], blob).path == "offloaded" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert offload.sendfile(pair[0], blob).path == "offloaded"
    assert pair[1].wait(3 * len(BLOB)) == BLOB * 3
    assert agent.connections == 2


def test_an_agent_that_is_behind(agent: ProtocolAgent, pair: Pair, blob: IO[bytes]) -> None:
    """More requests than the agent's queue holds: those wait their turn, and all are answered."""
    gate = threading.Event()

    def behave(request: Message, fds: list[int]) -> Message:
        gate.wait(10)
        return reply("local", reason="draining")

    agent.behaviour = behave

    async def scenario() -> None:
        link = offload_asyncio.link()
        assert await link.refusal(blob.fileno(), len(BLOB)) is None
        asking = [link.request(pair[0], blob.fileno(), 0, 100_000, "normal") for _ in range(900)]
        requests = [asyncio.ensure_future(request) for request in asking]
        await asyncio.sleep(0.05)
        assert link._unsent
        requests[-1].cancel()  # never sent: its descriptors may be closed by then
        gate.set()
        replies = await asyncio.wait_for(asyncio.gather(*requests[:-1]), 20)
        assert {found.reason for found in replies} <= {"draining", "agent_busy"}
        assert not link._unsent and not link._pending
        offload.close()

    asyncio.run(scenario())


# What is particular to transports.


def test_what_was_written_goes_first(agent: ProtocolAgent, pair: Pair, blob: IO[bytes]) -> None:
    head = os.urandom(40_000_000)

    async def scenario() -> None:
        _, writer = await asyncio.open_connection(sock=pair[0])
        writer.write(head)
        assert writer.transport.get_write_buffer_size()
        assert (await offload.sendfile_async(writer, blob)).path == "offloaded"
        writer.write(b"tail")
        await writer.drain()
        writer.close()

    asyncio.run(scenario())
    assert pair[1].wait(len(head) + len(BLOB) + 4) == head + BLOB + b"tail"


async def is_reading(transport: asyncio.Transport) -> bool:
    return transport.is_reading()


@pytest.mark.parametrize("was_reading", [True, False])
def test_reading_is_paused_meanwhile(agent: ProtocolAgent, pair: Pair, blob: IO[bytes], was_reading: bool) -> None:
    """What the client says during the transfer is there afterwards, and nobody read it before."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        reader, writer = await asyncio.open_connection(sock=pair[0])
        transport = writer.transport
        assert isinstance(transport, asyncio.Transport)
        if not was_reading:
            transport.pause_reading()
        seen: list[bool] = []

        def behave(request: Message, fds: list[int]) -> Message:
            pair[1].sock.send(b"next request")
            asked = asyncio.run_coroutine_threadsafe(is_reading(transport), loop)
            seen.append(asked.result(5))
            return deliver(request, fds)

        agent.behaviour = behave
        await offload.sendfile_async(writer, blob)
        assert seen == [False] and transport.is_reading() == was_reading
        if was_reading:
            assert await reader.readexactly(12) == b"next request"
        writer.close()

    asyncio.run(scenario())


def test_a_cancelled_call(agent: ProtocolAgent, pair: Pair, blob: IO[bytes]) -> None:
    """The request stays under way; its reply is consumed, reading resumes, and the next call gets its own reply."""
    began, gate = threading.Event(), threading.Event()

    def behave(request: Message, fds: list[int]) -> Message:
        began.set()
        gate.wait(5)
        return deliver(request, fds)

    agent.behaviour = behave

    async def scenario() -> None:
        _, writer = await asyncio.open_connection(sock=pair[0])
        transport = writer.transport
        assert isinstance(transport, asyncio.Transport)
        first = asyncio.ensure_future(offload.sendfile_async(writer, blob, 0, 200_000))
        await asyncio.to_thread(began.wait, 5)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not transport.is_reading()
        gate.set()
        until = time.monotonic() + 5
        while not transport.is_reading() and time.monotonic() < until:
            await asyncio.sleep(0.005)
        assert transport.is_reading()
        assert (await offload.sendfile_async(writer, blob, 200_000, 300_000)).sent == 300_000
        writer.close()

    asyncio.run(scenario())
    assert pair[1].wait(500_000) == BLOB[:500_000]


def test_closed_before_the_call(agent: ProtocolAgent, pair: Pair, blob: IO[bytes]) -> None:
    async def scenario() -> None:
        _, writer = await asyncio.open_connection(sock=pair[0])
        writer.close()
        with pytest.raises(ConnectionResetError):
            await offload.sendfile_async(writer, blob)

    asyncio.run(scenario())


# What the client asks next.


def ahead(share: Path) -> list[offload.Anticipated]:
    """Twice the same file; the second time without its first byte."""
    facts = os.stat(share / "blob")
    return [
        offload.Anticipated(b"%d" % first, b"head", str(share / "blob"), first, len(BLOB) - first, len(BLOB), facts.st_mtime_ns)
        for first in (0, 1)
    ]


def send_ahead(pair: Pair, blob: IO[bytes], anticipate: Callable[[], list[offload.Anticipated]]) -> Transfer:
    pair[0].setblocking(False)
    return asyncio.run(_within(offload.sendfile_async(pair[0], blob, anticipate=anticipate)))


def test_what_was_answered(agent: ProtocolAgent, share: Path, pair: Pair, blob: IO[bytes]) -> None:
    agent.anticipates = True
    agent.behaviour = lambda *_: {**reply("offloaded", len(BLOB) - 1), "answered": [1]}
    transfer = send_ahead(pair, blob, lambda: ahead(share))
    assert (transfer.sent, transfer.path, transfer.answered) == (len(BLOB), "offloaded", (ahead(share)[1],))
    request, *then = agent.requests
    assert request["anticipates"] is True and all(one["token"] == request["token"] for one in then)
    parts = [(one["first"], one["more"], [told["request"] for told in one["anticipated"]]) for one in then]
    assert parts == [(0, True, ["0"]), (1, False, ["1"])][: len(parts)]


def test_an_agent_that_is_behind_hears_all_parts_in_order(
    agent: ProtocolAgent, share: Path, pair: Pair, blob: IO[bytes]
) -> None:
    """More than its queue holds."""
    agent.anticipates = True
    gate, entries = threading.Event(), ahead(share) * 16

    def behave(request: Message, fds: list[int]) -> Message:
        gate.wait(10)
        return reply("local", reason="draining")

    async def scenario() -> None:
        link = offload_asyncio.link()
        assert await link.refusal(blob.fileno(), len(BLOB)) is None
        asking = [
            asyncio.ensure_future(link.request(pair[0], blob.fileno(), 0, 100_000, "normal", anticipate=lambda: iter(entries)))
            for _ in range(100)
        ]
        await asyncio.sleep(0.1)
        assert link._untold
        gate.set()
        await asyncio.wait_for(asyncio.gather(*asking), 20)
        while link._untold:
            await asyncio.sleep(0.01)
        offload.close()

    agent.behaviour = behave
    asyncio.run(asyncio.wait_for(scenario(), 30))
    parts: dict[str, list[int]] = {}
    for request in agent.requests:
        if request["op"] == "anticipate":
            parts.setdefault(request["token"], []).append(request["first"])
    assert len(parts) == 100 and all(firsts == [0, 1, 4, 13][: len(firsts)] for firsts in parts.values())


def test_an_answer_that_came_home_in_part(agent: ProtocolAgent, share: Path, pair: Pair, blob: IO[bytes]) -> None:
    """Its rest is asked for like any other file's, and sent from here if need be."""
    replies = [
        {**reply("local", 1000, reason="handed_back_by_operator"), "answered": [0, 1]},
        reply("local", 500, reason="handed_back_by_operator"),
    ]
    agent.anticipates = True
    agent.behaviour = lambda *_: replies.pop(0)
    transfer = send_ahead(pair, blob, lambda: ahead(share))
    assert (transfer.sent, transfer.answered) == (len(BLOB), tuple(ahead(share)))
    assert pair[1].wait(len(BLOB) - 1501) == BLOB[1501:]
    rest = agent.requests[-1]
    assert (rest["op"], rest["offset"], rest["count"]) == ("sendfile", 1001, len(BLOB) - 1001)
    assert "anticipates" not in rest


def test_an_answer_whose_file_was_changed(agent: ProtocolAgent, share: Path, pair: Pair, blob: IO[bytes]) -> None:
    agent.anticipates = True
    told = ahead(share)

    def behave(request: Message, fds: list[int]) -> Message:
        os.utime(share / "blob", (1, 1))
        return {**reply("local", 1000, reason="draining"), "answered": [0]}

    agent.behaviour = behave
    with pytest.raises(OSError, match="was changed while it was sent") as caught:
        send_ahead(pair, blob, lambda: told)
    assert caught.value.errno == errno.ESTALE


def test_an_agent_that_answers_what_was_not_anticipated(agent: ProtocolAgent, share: Path, pair: Pair, blob: IO[bytes]) -> None:
    agent.anticipates = True
    agent.behaviour = lambda *_: {**reply("offloaded", 1), "answered": [2]}
    with pytest.raises(ConnectionResetError, match="number 2 of 2"):
        send_ahead(pair, blob, lambda: ahead(share))


def test_a_host_that_does_not_anticipate(agent: ProtocolAgent, share: Path, pair: Pair, blob: IO[bytes]) -> None:
    """Nobody is asked what he anticipates."""
    assert send_ahead(pair, blob, lambda: pytest.fail("asked")).path == "offloaded"
    assert [request["op"] for request in agent.requests] == ["sendfile"]


def test_an_application_that_fails_to_anticipate(agent: ProtocolAgent, pair: Pair, blob: IO[bytes]) -> None:
    """The file is on its way all the same, and the agent hears that there is nothing."""
    agent.anticipates = True
    assert send_ahead(pair, blob, lambda: [][0]).path == "offloaded"
    until = time.monotonic() + 5
    while len(agent.requests) < 2 and time.monotonic() < until:
        time.sleep(0.002)
    assert [(one["anticipated"], one["more"]) for one in agent.requests[1:]] == [([], False)]


def test_a_server_that_stops(agent: ProtocolAgent, share: Path, pair: Pair, blob: IO[bytes]) -> None:
    """It says so of what is out."""
    agent.anticipates = True
    stopped = threading.Event()

    def behave(request: Message, fds: list[int]) -> Message:
        stopped.wait(5)
        return reply("offloaded", len(BLOB))

    async def run() -> Transfer:
        pair[0].setblocking(False)
        sending = asyncio.create_task(offload.sendfile_async(pair[0], blob, anticipate=lambda: ahead(share)))
        while not agent.requests:
            await asyncio.sleep(0.001)
        offload.anticipate_nothing()
        stopped.set()
        return await _within(sending)

    agent.behaviour = behave
    assert asyncio.run(run()).answered == ()
    told = [request for request in agent.requests if request["op"] == "anticipate"]
    assert [len(one["anticipated"]) for one in told][-1] == 0


def test_the_status_without_an_agent() -> None:
    told = offload.status()
    assert told["agent"] is None
    assert set(told) == {"agent_socket", "agent", "offloaded", "failed", "bytes_offloaded", "bytes_local", "local"}
