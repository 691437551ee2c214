# SPDX-License-Identifier: Apache-2.0
"""`offload.publish` where there is no agent: this process relays, by the same rules."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from guest_agent import offload
from guest_agent.offload_relay import Relay

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("STREAMLIFT_AGENT", str(tmp_path / "nobody.sock"))
    yield
    offload.close()


def _pair() -> Pair:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far = listener.accept()[0]
    near.setblocking(False)
    far.setblocking(False)
    return near, far


async def _read(sock: socket.socket, count: int) -> bytes:
    got = bytearray()
    while len(got) < count:
        data = await asyncio.get_running_loop().sock_recv(sock, 1 << 16)
        if not data:
            break
        got += data
    return bytes(got)


def _run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def test_every_byte_to_every_sink() -> None:
    data = os.urandom(2_000_000)

    async def test() -> None:
        loop = asyncio.get_running_loop()
        source, encoder = _pair()
        clients = [_pair() for _ in range(5)]
        relay = await offload.publish(source)
        assert (relay.path, relay.reason) == ("local", "no_agent")
        sinks = [await relay.add_sink(near) for near, _ in clients]
        reading = [loop.create_task(_read(far, len(data))) for _, far in clients]
        await loop.sock_sendall(encoder, data)
        encoder.close()
        assert await relay.over == "the source closed its connection"
        endings = [await sink.wait() for sink in sinks]
        assert [(e.sent, e.reason, e.alive) for e in endings] == [(len(data), None, True)] * 5
        assert [await task for task in reading] == [data] * 5
        for sock in (source, *(sock for pair in clients for sock in pair)):
            sock.close()

    _run(test)


def test_one_leaves_and_comes_back_without_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "live"
    path.write_bytes(b"")

    async def test() -> None:
        near, far = _pair()
        with path.open("rb") as file, path.open("ab", buffering=0) as writer:
            relay = await offload.publish(file)
            assert relay.reason == "no_agent"
            first = await relay.add_sink(near)
            writer.write(b"one,")
            assert await _read(far, 4) == b"one,"
            ending = await relay.remove_sink(first)
            assert ending.alive and ending.cursor == 4
            writer.write(b"two,")
            near.send(b"(mine)")
            await asyncio.sleep(0.1)
            second = await relay.add_sink(near, begin=ending.cursor)
            writer.write(b"three")
            assert await _read(far, 15) == b"(mine)two,three"
            status = await relay.status()
            assert status is not None and status["sink_count"] == 1
            await relay.close()
            assert second.over and relay.over.result() == "closed"
        near.close()
        far.close()

    _run(test)


def test_a_ring_s_file_is_not_held(tmp_path: Path) -> None:
    """Its share goes and comes back while the relay goes on; and one that leaves goes on at any relay of it."""
    path = tmp_path / "share" / "ring"
    path.parent.mkdir()

    async def test() -> None:
        (near, far), (second_near, second_far) = _pair(), _pair()
        with offload.Ring(path, size=65536) as ring:
            relay = await offload.publish(ring)
            assert (relay.path, relay.reason) == ("local", "no_agent")
            sink = await relay.add_sink(near)
            ring.write(b"one,")
            assert await _read(far, 4) == b"one,"
            ring.close()
            for _ in range(20):
                assert str(path) not in [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
                await asyncio.sleep(0.003)
            path.parent.rename(tmp_path / "away")
            await asyncio.sleep(0.1)
            assert not relay.over.done()
            (tmp_path / "away").rename(path.parent)
            ring.write(b"two,")
            assert await _read(far, 4) == b"two,"
            ending = await relay.remove_sink(sink)
            assert ending.alive and ending.cursor == 8
            ring.write(b"three")
            other = await offload.publish(offload.Ring(path), offset=2)
            await other.add_sink(near, begin=ending.cursor)
            late = await other.add_sink(second_near, begin=11)
            assert await _read(far, 5) == b"three" and await _read(second_far, 2) == b"ee"
            ring.end()
            assert await relay.over == await other.over == "the source's ring was ended"
            assert (await late.wait()).cursor == 13
        for sock in (near, far, second_near, second_far):
            sock.close()

    _run(test)


def test_a_dead_client_and_a_slow_one_harm_nobody() -> None:
    data = os.urandom(20_000_000)

    async def test() -> None:
        loop = asyncio.get_running_loop()
        source, encoder = _pair()
        pairs = [_pair() for _ in range(3)]
        (dead, gone), (slow, stalled), (good, reader) = pairs
        relay = await offload.publish(source, ring_entries=16)
        sinks = [await relay.add_sink(near) for near in (dead, slow, good)]
        gone.close()
        reading = loop.create_task(_read(reader, len(data)))
        for at in range(0, len(data), 50_000):
            await loop.sock_sendall(encoder, data[at : at + 50_000])
            await asyncio.sleep(0)
        ending = await sinks[0].wait()
        assert (ending.reason, ending.alive) == ("peer_gone", False)
        encoder.close()
        got = await reading
        assert data.startswith(got[:100_000]), "in order; what it lost are whole entries"
        assert (await sinks[2].wait()).sent == len(got)
        assert not sinks[1].over
        stalled.close()
        assert not (await sinks[1].wait()).alive
        for sock in (source, dead, slow, good, reader):
            sock.close()

    _run(test)


@pytest.mark.parametrize("option", [{"join": "first"}, {"on_lag": "wait"}, {"priority": "top"}])
def test_bad_arguments(option: dict[str, str]) -> None:
    async def test() -> None:
        source, encoder = _pair()
        relay: Relay = await offload.publish(source)
        with pytest.raises(ValueError, match="is none of"):
            await relay.add_sink(source, **option)  # type: ignore[arg-type]
        await relay.close()
        source.close()
        encoder.close()

    _run(test)


def test_what_can_be_no_source() -> None:
    async def test() -> None:
        with pytest.raises(ValueError, match="framing"):
            await offload.publish(7000, framing="mp4")
        with pytest.raises(OSError, match="UDP port"):
            await offload.publish(7000)
        blocking, other = socket.socketpair()
        with blocking, other, pytest.raises(ValueError, match="non-blocking"):
            await offload.publish(blocking)

    _run(test)
