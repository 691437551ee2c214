# SPDX-License-Identifier: Apache-2.0
"""The same bytes to many sockets: the extension and its stand-in do the same."""

from __future__ import annotations

import errno
import os
import socket
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hypervisor_svc import fanout

WAYS = {
    "python": (fanout._python_stream, fanout._python_datagrams, fanout._python_burst, fanout._python_file),
    "chosen": (fanout.send_stream, fanout.send_datagrams, fanout.send_burst, fanout.send_file),
}
COUNT = 300
"""More than one call of the extension's ring (`send_ring.h`) takes."""


@pytest.mark.root
def test_it_is_the_extension_that_is_tested() -> None:
    assert fanout.NATIVE


@pytest.fixture
def streams() -> Iterator[tuple[array[int], list[socket.socket]]]:
    """Connected pairs: descriptors that send, sockets that receive."""
    listener = socket.create_server(("127.0.0.1", 0))
    senders, receivers = [], []
    for _ in range(COUNT):
        senders.append(socket.create_connection(listener.getsockname()))
        receivers.append(listener.accept()[0])
        receivers[-1].settimeout(5)
    yield array("i", [sock.fileno() for sock in senders]), receivers
    for sock in [listener, *senders, *receivers]:
        sock.close()


@pytest.fixture
def datagrams() -> Iterator[tuple[array[int], list[socket.socket]]]:
    """The same for UDP."""
    senders, receivers = [], []
    for _ in range(COUNT):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.connect(receiver.getsockname())
        senders.append(sender)
        receivers.append(receiver)
    yield array("i", [sock.fileno() for sock in senders]), receivers
    for sock in [*senders, *receivers]:
        sock.close()


@pytest.mark.parametrize("way", WAYS)
def test_streams_from_any_of_them_on(way: str, streams: tuple[array[int], list[socket.socket]]) -> None:
    fds, receivers = streams
    send = WAYS[way][0]
    assert send(fds, 3, COUNT - 1, [b"abc", b"", memoryview(b"xdefx")[1:4]]) == []
    assert send(fds, 2, 1, [b"ghi"]) == []
    assert [receiver.recv(100) for receiver in receivers] == [b"ghi" if at == 2 else b"abcdef" for at in range(COUNT)]


@pytest.mark.parametrize("way", WAYS)
def test_a_full_and_a_dead_socket(way: str, streams: tuple[array[int], list[socket.socket]]) -> None:
    """The full one takes a part, then nothing; the dead one says so; the others get all."""
    fds, receivers = streams
    receivers[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    receivers[1].close()
    block, send = os.urandom(1 << 20), WAYS[way][0]
    taken = 0
    for _ in range(30):
        misfits = dict(send(array("i", [fds[2]]), 0, 1, [block]))
        if misfits.get(0, 0) < 0:
            break
        taken += misfits.get(0, len(block))
    misfits = dict(send(fds, 0, COUNT, [b"tail"]))
    assert misfits.pop(1) in (-errno.EPIPE, -errno.ECONNRESET)
    assert misfits == {2: -errno.EAGAIN}
    assert taken % len(block), "it took a part of one block"
    assert receivers[0].recv(100) == b"tail"
    received = bytearray()
    while len(received) < taken:
        received += receivers[2].recv(1 << 20)
    assert received == (block * (taken // len(block) + 1))[:taken]


@pytest.mark.parametrize("way", WAYS)
def test_datagrams_keep_their_boundaries(way: str, datagrams: tuple[array[int], list[socket.socket]]) -> None:
    fds, receivers = datagrams
    assert WAYS[way][1](fds, 0, COUNT, [b"one", b"", b"three"]) == []
    assert [[receiver.recv(100) for _ in range(3)] for receiver in receivers] == [[b"one", b"", b"three"]] * COUNT


@pytest.mark.parametrize("way", WAYS)
def test_one_datagram_and_a_dead_socket(way: str, datagrams: tuple[array[int], list[socket.socket]]) -> None:
    """A port where nobody is says so with the second one."""
    fds, receivers = datagrams
    receivers[COUNT - 1].close()
    send = WAYS[way][1]
    assert send(fds, 0, COUNT, [b"one"]) == []
    assert send(fds, 5, COUNT, [b"two"]) == [(COUNT - 1, -errno.ECONNREFUSED)]
    assert [(receiver.recv(100), receiver.recv(100)) for receiver in receivers[:-1]] == [(b"one", b"two")] * (COUNT - 1)


def test_threads_at_once(streams: tuple[array[int], list[socket.socket]]) -> None:
    """There is one ring; who finds it taken sends without."""
    fds, receivers = streams
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda turn: fanout.send_stream(fds, 0, COUNT, [b"%04d" % turn]), range(100))) == [[]] * 100
    for receiver in receivers:
        received = b""
        while len(received) < 400:
            received += receiver.recv(400)
        assert sorted(received[at : at + 4] for at in range(0, 400, 4)) == [b"%04d" % turn for turn in range(100)]


def test_a_child_has_no_ring(streams: tuple[array[int], list[socket.socket]]) -> None:
    """Its parent's is not its own."""
    fds, receivers = streams
    assert fanout.send_stream(fds, 0, COUNT, [b"one"]) == []
    child = os.fork()
    if not child:
        os._exit(fanout.send_stream(fds, 0, COUNT, [b"two"]) != [])
    assert os.waitpid(child, 0)[1] == 0
    assert fanout.send_stream(fds, 0, COUNT, [b"end"]) == []
    assert [receiver.recv(100) for receiver in receivers] == [b"onetwoend"] * COUNT


@pytest.mark.parametrize("way", WAYS)
def test_a_burst_is_many_datagrams(way: str, datagrams: tuple[array[int], list[socket.socket]]) -> None:
    fds, receivers = datagrams
    sent = [os.urandom(1400) for _ in range(9)] + [os.urandom(77)]
    assert WAYS[way][2](fds, 0, COUNT, sent, 1400) == []
    assert [[receiver.recv(2000) for _ in sent] for receiver in receivers] == [sent] * COUNT


@pytest.mark.parametrize("way", WAYS)
def test_a_part_of_a_file(way: str, streams: tuple[array[int], list[socket.socket]], tmp_path: Path) -> None:
    fds, receivers = streams
    blob = os.urandom(20_000)
    path = tmp_path / "blob"
    path.write_bytes(blob)
    with path.open("rb") as file:
        assert WAYS[way][3](fds, 0, COUNT, file.fileno(), 5000, 10_000) == []
        short = WAYS[way][3](fds, 0, 1, file.fileno(), 15_000, 10_000)
    assert short == [(0, 5000)]
    for number, receiver in enumerate(receivers):
        end = 20_000 if number == 0 else 15_000
        received = bytearray()
        while len(received) < end - 5000:
            received += receiver.recv(1 << 16)
        assert received == blob[5000:end]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [(-1, 1), (0, COUNT + 1), (COUNT, 1), (0, -1)])
def test_a_window_that_is_none(way: str, window: tuple[int, int], streams: tuple[array[int], list[socket.socket]]) -> None:
    with pytest.raises(ValueError, match="sockets from"):
        WAYS[way][0](streams[0], *window, [b"x"])


def test_too_many_buffers(streams: tuple[array[int], list[socket.socket]]) -> None:
    with pytest.raises((ValueError, OSError)):
        fanout.send_stream(streams[0], 0, 1, [b"x"] * (fanout.MAX_BUFFERS + 1))
