# SPDX-License-Identifier: Apache-2.0
"""Freeze, extract and restore on real connections over loopback; every proof is bytes in both directions."""

from __future__ import annotations

import hashlib
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from guest_agent.handoff import kernel
from guest_agent.handoff.errors import NotMovable, Reason
from guest_agent.handoff.extract import check_movable, extract
from guest_agent.handoff.freeze import freeze, probe, thaw
from guest_agent.handoff.hold import Hold
from guest_agent.handoff.restore import arrive, arrives_at, restore_fresh, restore_in_place, send_unsent
from guest_agent.handoff.snapshot import Snapshot, after, before_fin
from tests.guest_agent.handoff.loopback import KINDS, established, signed

pytestmark = pytest.mark.root

@pytest.fixture
def keep() -> Iterator[Hold]:
    with Hold() as hold:
        yield hold


@pytest.fixture(params=sorted(KINDS))
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(server's end, client's end) of an established connection."""
    with established(request.param) as ends:
        yield ends


def move(server: socket.socket, keep: Hold, *, fresh: bool) -> socket.socket:
    """The whole way: the connection ends up in a new socket, or in the same one."""
    freeze(server, keep)
    snapshot = extract(server)
    if fresh:
        server.close()
        server = restore_fresh(snapshot, keep)
        server.setblocking(True)
    else:
        restore_in_place(server, snapshot)
    thaw(server)
    send_unsent(server, snapshot)
    server.settimeout(10)
    return server


def exchange(server: socket.socket, client: socket.socket, size: int = 300_000) -> None:
    """Random bytes both ways at once, compared by hash."""
    for sender, receiver in ((server, client), (client, server)):
        blob = os.urandom(size)
        thread = threading.Thread(target=sender.sendall, args=(blob,))
        thread.start()
        got = b""
        while len(got) < size:
            got += receiver.recv(1 << 16)
        thread.join()
        assert hashlib.sha256(got).digest() == hashlib.sha256(blob).digest()


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "in_place"])
def test_five_moves_in_a_row(pair: tuple[socket.socket, socket.socket], keep: Hold, fresh: bool) -> None:
    server, client = pair
    for _ in range(5):
        server = move(server, keep, fresh=fresh)
        exchange(server, client)
    server.close()


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "in_place"])
def test_queues_travel(pair: tuple[socket.socket, socket.socket], keep: Hold, fresh: bool) -> None:
    server, client = pair
    request, answer = os.urandom(70_000), os.urandom(3_000_000)
    client.sendall(request)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    server.setblocking(False)
    queued = server.send(answer)
    time.sleep(0.05)
    freeze(server, keep)
    snapshot = extract(server)
    thaw(server)
    assert snapshot.receive_queue == request
    assert snapshot.unacked + snapshot.unsent == answer[queued - len(snapshot.unacked) - len(snapshot.unsent) : queued]
    assert snapshot.unsent
    server = move(server, keep, fresh=fresh)
    received = b""
    while len(received) < queued:
        received += client.recv(1 << 16)
    assert received == answer[:queued]
    got = b""
    while len(got) < len(request):
        got += server.recv(1 << 17)
    assert got == request
    exchange(server, client)
    server.close()


def test_a_frozen_socket_keeps_packets_for_its_successor(
    pair: tuple[socket.socket, socket.socket], keep: Hold
) -> None:
    server, client = pair
    cookie = int.from_bytes(server.getsockopt(socket.SOL_SOCKET, kernel.SO_COOKIE, 8), "little")
    freeze(server, keep)
    for blob in (b"first", os.urandom(30_000)):
        client.sendall(blob)
    time.sleep(0.05)
    held = list(keep.drain())
    assert held and {found for found, _ in held} == {cookie}
    assert held[0][1].endswith(b"first")
    assert sum(len(segment) for _, segment in held) > 30_000
    thaw(server)
    exchange_after_loss(server, client)


def exchange_after_loss(server: socket.socket, client: socket.socket) -> None:
    server.settimeout(10)
    assert server.recv(5) == b"first"
    got = 0
    while got < 30_000:
        got += len(server.recv(1 << 16))
    exchange(server, client)


def test_without_a_hold_packets_are_only_dropped(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    freeze(server, None)
    client.sendall(b"first" + bytes(30_000))
    time.sleep(0.02)
    assert not select.select([server], [], [], 0)[0]
    thaw(server)
    exchange_after_loss(server, client)


def may_send(server: socket.socket) -> int:
    """Bytes, as far as the server's end has heard."""
    freeze(server, None)
    snapshot = extract(server)
    thaw(server)
    return snapshot.window.snd_wnd - len(snapshot.unacked)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_the_client_said_to_nobody_is_asked_for(kind: str) -> None:
    """Its window was shut, and that it opened was lost."""
    with established(kind, receive_buffer=8192) as (server, client):
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sent = 0
        while room := may_send(server):
            sent += server.send(bytes(min(room, 1024)))
        freeze(server, None)
        assert len(client.recv(sent, socket.MSG_WAITALL)) == sent
        thaw(server)
        assert may_send(server) == 0
        probe(server)
        assert may_send(server) >= 1024
        server.sendall(b"more")
        assert client.recv(4, socket.MSG_WAITALL) == b"more"


def test_in_place_keeps_descriptor_duplicates_and_epoll(
    pair: tuple[socket.socket, socket.socket], keep: Hold
) -> None:
    server, client = pair
    duplicate = server.dup()
    with select.epoll() as epoll:
        epoll.register(duplicate, select.EPOLLIN)
        move(server, keep, fresh=False)
        epoll.poll(0)
        client.sendall(b"hello")
        assert epoll.poll(5) == [(duplicate.fileno(), select.EPOLLIN)]
    assert duplicate.recv(10) == b"hello"
    assert server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    duplicate.close()


def test_a_place_holder_needs_only_what_the_peer_said(pair: tuple[socket.socket, socket.socket], keep: Hold) -> None:
    """It stands where the connection will arrive; whoever watches the socket learns that there is something to read."""
    server, client = pair
    exchange(server, client, 5000)
    freeze(server, keep)
    before = extract(server)
    expected = after(before, 0)
    restore_in_place(server, expected)
    client.sendall(b"the next request")
    returned = replace(before, receive_queue=b"the next request", timestamp=before.timestamp + 1000)
    assert arrives_at(returned, expected)
    assert not arrives_at(replace(returned, unsent=b"x"), expected)
    assert not arrives_at(replace(returned, send_sequence=returned.send_next + 1 & 0xFFFFFFFF), expected)
    with select.epoll() as watch:
        watch.register(server, select.EPOLLIN)
        assert watch.poll(0) == []
        arrive(server, returned)
        assert [events for _, events in watch.poll(1)] == [select.EPOLLIN]
    thaw(server)
    assert server.recv(100) == b"the next request"
    exchange(server, client)


def test_options_travel(pair: tuple[socket.socket, socket.socket], keep: Hold) -> None:
    server, _ = pair
    wanted = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 11),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 31_000),
        (socket.SOL_SOCKET, socket.SO_PRIORITY, 4),
        (socket.SOL_SOCKET, socket.SO_MARK, 99),
    ]
    for level, name, value in wanted:
        server.setsockopt(level, name, value)
    moved = move(server, keep, fresh=False)
    assert [moved.getsockopt(level, name) for level, name, _ in wanted] == [value for _, _, value in wanted]
    freeze(moved, keep)
    snapshot = extract(moved)
    moved.close()
    fresh = restore_fresh(snapshot, keep, mark=99)
    thaw(fresh)
    assert [fresh.getsockopt(level, name) for level, name, _ in wanted] == [value for _, _, value in wanted]
    fresh.close()


def test_closing_a_frozen_socket_is_silent(pair: tuple[socket.socket, socket.socket], keep: Hold) -> None:
    server, client = pair
    freeze(server, keep)
    server.close()
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.recv(1)


def refusal(sock: socket.socket, keep: Hold) -> Reason:
    with pytest.raises(NotMovable) as error:
        check_movable(sock)
        freeze(sock, keep)
        try:
            extract(sock)
        finally:
            thaw(sock)
    return error.value.reason


def test_refusals(keep: Hold) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        assert refusal(datagram, keep) is Reason.NOT_TCP
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unix:
        assert refusal(unix, keep) is Reason.NOT_TCP
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert refusal(listener, keep) is Reason.LISTENING
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as closed:
        assert refusal(closed, keep) is Reason.NOT_ESTABLISHED
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, kernel.IPPROTO_MPTCP) as multipath:
        assert refusal(multipath, keep) is Reason.MPTCP


def test_half_closed_is_refused(pair: tuple[socket.socket, socket.socket], keep: Hold) -> None:
    server, client = pair
    client.shutdown(socket.SHUT_WR)
    time.sleep(0.02)
    assert refusal(server, keep) is Reason.HALF_CLOSED


def test_the_fin_of_a_peer_can_be_left_out(pair: tuple[socket.socket, socket.socket], keep: Hold) -> None:
    server, client = pair
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    time.sleep(0.02)
    freeze(server, keep)
    snapshot: Snapshot = before_fin(extract(server))
    assert snapshot.receive_queue == b"last words"
    restore_in_place(server, snapshot)
    thaw(server)
    server.sendall(b"still open")
    client.settimeout(5)
    assert client.recv(20) == b"still open"


def test_a_filter_of_the_application_is_not_replaced(pair: tuple[socket.socket, socket.socket], keep: Hold) -> None:
    server, _ = pair
    server.setsockopt(socket.SOL_SOCKET, kernel.SO_ATTACH_BPF, keep.program_fd)
    with pytest.raises(NotMovable) as error:
        freeze(server, keep)
    assert error.value.reason is Reason.SOCKET_FILTER


def test_a_signed_connection_is_refused(keep: Hold) -> None:
    with signed() as server:
        assert refusal(server, keep) is Reason.AUTHENTICATED
