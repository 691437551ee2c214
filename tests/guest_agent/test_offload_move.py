# SPDX-License-Identifier: Apache-2.0
"""Applications whose VM leaves its host, against an agent's door without the host behind it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from guest_agent import offload, offload_asyncio
from tests.guest_agent.protocol_agent import Message, ProtocolAgent, deliver, reply, send_bytes

SIZE = 400_000


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProtocolAgent]:
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "file").write_bytes(os.urandom(SIZE))
    path = str(tmp_path / "agent.sock")
    monkeypatch.setenv("STREAMLIFT_AGENT", path)
    with ProtocolAgent(path, shares=[str(tmp_path / "share")], threshold=1000) as made:
        yield made
    offload.close()


def pair() -> tuple[socket.socket, socket.socket]:
    """Connected TCP sockets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        return here, listener.accept()[0]


def received(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (piece := sock.recv(1 << 16)):
        data += piece
    return data


def _stops(agent: ProtocolAgent, request: Message, fds: list[int]) -> Message:
    """The first time the VM leaves after a part; then it goes on."""
    if len(agent.requests) > 1:
        return deliver(request, fds)
    sent = send_bytes(fds, request["offset"], 50_000)
    agent.tell("leaving")
    return {**reply("local", sent, reason="draining"), "away": True}


def _return_soon(agent: ProtocolAgent) -> None:
    """As an agent does, when everybody has heard how it went, and has let go."""
    agent.answered.wait(10)
    agent.let_go.wait(10)
    agent.tell("here")


def test_a_transfer_waits_and_goes_on(agent: ProtocolAgent, tmp_path: Path) -> None:
    agent.behaviour = lambda request, fds: _stops(agent, request, fds)
    here, there = pair()

    async def test() -> offload.Transfer:
        here.setblocking(False)
        back = threading.Thread(target=_return_soon, args=(agent,))
        with (tmp_path / "share" / "file").open("rb") as file:
            back.start()
            transfer = await offload.sendfile_async(here, file)
        back.join()
        return transfer

    with here, there:
        reader: list[bytes] = []
        reading = threading.Thread(target=lambda: reader.append(received(there, SIZE)))
        reading.start()
        transfer = asyncio.run(test())
        reading.join(10)
    assert (transfer.sent, transfer.path, transfer.reason) == (SIZE, "offloaded", None)
    assert reader == [(tmp_path / "share" / "file").read_bytes()]
    assert [request["offset"] for request in agent.requests] == [0, 50_000]


def test_a_blocking_transfer_waits_too(agent: ProtocolAgent, tmp_path: Path) -> None:
    agent.behaviour = lambda request, fds: _stops(agent, request, fds)
    here, there = pair()
    back = threading.Thread(target=_return_soon, args=(agent,))
    with here, there, (tmp_path / "share" / "file").open("rb") as file:
        reader: list[bytes] = []
        reading = threading.Thread(target=lambda: reader.append(received(there, SIZE)))
        reading.start()
        back.start()
        transfer = offload.sendfile(here, file)
        back.join()
        reading.join(10)
    assert (transfer.sent, transfer.path) == (SIZE, "offloaded")
    assert reader == [(tmp_path / "share" / "file").read_bytes()]


def test_one_that_does_not_want_to_wait(agent: ProtocolAgent, tmp_path: Path) -> None:
    """The rest is sent from here, though the share is wanted back."""
    agent.behaviour = lambda request, fds: _stops(agent, request, fds)
    here, there = pair()

    async def test() -> offload.Transfer:
        here.setblocking(False)
        with (tmp_path / "share" / "file").open("rb") as file:
            return await offload.sendfile_async(here, file, on_move="local")

    with here, there:
        reader: list[bytes] = []
        reading = threading.Thread(target=lambda: reader.append(received(there, SIZE)))
        reading.start()
        transfer = asyncio.run(test())
        reading.join(10)
    assert (transfer.sent, transfer.path, transfer.reason) == (SIZE, "local", "draining")
    assert reader == [(tmp_path / "share" / "file").read_bytes()]


def test_a_local_transfer_to_a_client_that_does_not_read(agent: ProtocolAgent, tmp_path: Path) -> None:
    """It stands at a byte boundary while the share is away, and goes on afterwards."""
    agent.behaviour = lambda request, fds: reply("local", reason="table_full")
    big = tmp_path / "share" / "big"
    big.write_bytes(os.urandom(20_000_000))
    here, there = pair()

    async def test() -> offload.Transfer:
        here.setblocking(False)
        with big.open("rb") as file:
            sending = asyncio.ensure_future(offload.sendfile_async(here, file))
            await asyncio.sleep(0.2)
            agent.tell("leaving")
            await asyncio.to_thread(agent.let_go.wait, 5)
            assert agent.let_go.is_set() and os.readlink(f"/proc/self/fd/{file.fileno()}").startswith("/memfd:")
            reading = asyncio.get_running_loop().run_in_executor(None, received, there, 20_000_000)
            await asyncio.sleep(0.2)
            assert not sending.done()
            agent.tell("here")
            transfer = await sending
            assert await reading == big.read_bytes()
            return transfer

    with here, there:
        transfer = asyncio.run(test())
    assert (transfer.sent, transfer.path) == (20_000_000, "local")


def test_an_application_hears_of_it(agent: ProtocolAgent) -> None:
    heard: list[str] = []

    async def test() -> None:
        async def leave() -> None:
            heard.append("leave")

        async def come_back() -> None:
            heard.append("return")

        offload.attend(leave, come_back)
        async with asyncio.timeout(10):
            while not agent._attending:
                await asyncio.sleep(0.01)
            agent.tell("leaving")
            await asyncio.to_thread(agent.let_go.wait)
            waiting = asyncio.ensure_future(offload.present())
            await asyncio.sleep(0.05)
            assert not waiting.done()
            agent.tell("here")
            await waiting
            while heard != ["leave", "return"]:
                await asyncio.sleep(0.01)

    asyncio.run(test())


def test_an_application_that_comes_while_the_vm_leaves(agent: ProtocolAgent) -> None:
    """It is told at once, answers, and hears that the share is here."""
    agent.presence = "leaving"

    async def test() -> None:
        offload.attend()
        async with asyncio.timeout(10):
            await asyncio.to_thread(agent.let_go.wait)
            agent.tell("here")
            await offload.present()

    asyncio.run(test())


def test_an_agent_that_does_not_come_back(agent: ProtocolAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is left who could say that the share is here: whoever waits goes on."""
    monkeypatch.setattr("guest_agent.offload_asyncio.RECLAIM_LIMIT", 0.3)

    async def test() -> None:
        offload.attend()
        async with asyncio.timeout(10):
            while not agent._attending:
                await asyncio.sleep(0.01)
            agent.tell("leaving")
            await asyncio.to_thread(agent.let_go.wait)
            await asyncio.to_thread(agent.stop)
            await offload.present()

    asyncio.run(test())


# Files that are opened while the share is away.


@contextlib.asynccontextmanager
async def away(agent: ProtocolAgent, tmp_path: Path) -> AsyncIterator[Path]:
    """The share leaves for the block: its files are elsewhere, and the host knows them. Then it is back."""
    share, elsewhere = tmp_path / "share", tmp_path / "elsewhere"
    offload.attend()
    async with asyncio.timeout(20):
        while not agent._attending:
            await asyncio.sleep(0.01)
        agent.seen = {str(share / "file"): SIZE}
        agent.tell("leaving")
        await asyncio.to_thread(agent.let_go.wait)
        share.rename(elsewhere)
        share.mkdir()
        yield elsewhere
        share.rmdir()
        elsewhere.rename(share)
        agent.tell("here")
        await offload.present()


def _by_path(agent: ProtocolAgent, file: Path, *, refuses: bool = False) -> None:
    """The host sends what stands for a file, or refuses it; the file itself it sends in any case."""

    def serve(request: Message, fds: list[int]) -> Message:
        if not os.readlink(f"/proc/self/fd/{fds[1]}").startswith("/memfd:seen"):
            return deliver(request, fds)
        if refuses:
            return {**reply("local", reason="table_full"), "away": True}
        with file.open("rb") as meant:
            return deliver(request, [fds[0], meant.fileno()])

    agent.behaviour = serve


def test_a_file_of_a_share_that_is_away(agent: ProtocolAgent, tmp_path: Path) -> None:
    """It has a size, is sent by the host, cannot be read, and is an ordinary file when the share is back."""
    path, body = str(tmp_path / "share" / "file"), (tmp_path / "share" / "file").read_bytes()
    here, there = pair()

    async def test() -> None:
        here.setblocking(False)
        async with away(agent, tmp_path) as elsewhere:
            _by_path(agent, elsewhere / "file")
            file = await offload.open(path)
            assert (os.fstat(file.fileno()).st_size, file.hold.away) == (SIZE, True)
            with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
                file.read(1)
            reading = asyncio.get_running_loop().run_in_executor(None, received, there, 100)
            transfer = await offload.sendfile_async(here, file, 50, 100)  # below the threshold: what is away has no other way
            assert (transfer.path, transfer.sent) == ("offloaded", 100)
            assert await reading == body[50:150]
            with pytest.raises(FileNotFoundError):
                await offload.open(path + "s")
            with pytest.raises(FileNotFoundError):
                await offload.open(path, beneath=str(tmp_path / "elsewhere"))
        with file:
            assert (file.read(), file.hold.away) == (body, False)

    with here, there:
        asyncio.run(test())


def test_what_was_open_before_is_sent_too(agent: ProtocolAgent, tmp_path: Path) -> None:
    here, there = pair()

    async def test() -> None:
        here.setblocking(False)
        with await offload.open(str(tmp_path / "share" / "file")) as file:
            body = file.read()
            async with away(agent, tmp_path) as elsewhere:
                _by_path(agent, elsewhere / "file")
                reading = asyncio.get_running_loop().run_in_executor(None, received, there, SIZE)
                transfer = await offload.sendfile_async(here, file)
                assert (transfer.path, transfer.sent, await reading) == ("offloaded", SIZE, body)

    with here, there:
        asyncio.run(test())


def test_what_the_host_refuses_waits_for_the_share(agent: ProtocolAgent, tmp_path: Path) -> None:
    """It is asked once, and again when the share is back."""
    here, there = pair()

    async def test() -> None:
        here.setblocking(False)
        async with away(agent, tmp_path) as elsewhere:
            _by_path(agent, elsewhere / "file", refuses=True)
            file = await offload.open(str(tmp_path / "share" / "file"))
            sending = asyncio.ensure_future(offload.sendfile_async(here, file))
            await asyncio.sleep(0.2)
            assert not sending.done() and len(agent.requests) == 1
        reading = asyncio.get_running_loop().run_in_executor(None, received, there, SIZE)
        assert (await sending).sent == len(await reading) == SIZE
        file.close()

    with here, there:
        asyncio.run(test())


def test_a_host_that_goes_while_it_is_asked(agent: ProtocolAgent, tmp_path: Path) -> None:
    """The next one is asked, and not only when the share is back: both words come at once."""
    body = (tmp_path / "share" / "file").read_bytes()
    here, there = pair()

    async def test() -> None:
        here.setblocking(False)
        with await offload.open(str(tmp_path / "share" / "file")) as before:
            async with away(agent, tmp_path) as elsewhere:
                _by_path(agent, elsewhere / "file")
                agent.unheard = 3
                (await offload.open(str(tmp_path / "share" / "file"))).close()
                assert agent.unheard == 0
                agent.unheard = 3
                reading = asyncio.get_running_loop().run_in_executor(None, received, there, SIZE)
                transfer = await offload.sendfile_async(here, before)
                assert (transfer.path, await reading) == ("offloaded", body)

    with here, there:
        asyncio.run(test())


def test_an_agent_that_cannot_be_asked(agent: ProtocolAgent, tmp_path: Path) -> None:
    """One of an earlier release: whoever opens a file waits, and one that is elsewhere is opened at once."""

    async def test() -> None:
        async with away(agent, tmp_path) as elsewhere:
            agent.seen = {}
            agent.tell("leaving")
            while offload_asyncio.link().attendance.may_look:
                await asyncio.sleep(0.01)
            opening = asyncio.ensure_future(offload.open(str(tmp_path / "share" / "file")))
            (await offload.open(str(elsewhere / "file"))).close()
            await asyncio.sleep(0.1)
            assert not opening.done()
        with await opening as file:
            assert len(file.read()) == SIZE

    asyncio.run(test())
