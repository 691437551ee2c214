# SPDX-License-Identifier: Apache-2.0
"""What each sink gets: every byte of the source, but for whole entries that are accounted for. In a VM with the module."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from hypervisor_svc import omss
from hypervisor_svc.omss import Framing, Join, OnLag, SinkState, State
from tests.host_module.omss.streams import (
    KINDS,
    PIECE,
    Link,
    catch_up,
    feed,
    link,
    links,
    number_of,
    numbers,
    outcome,
    piece,
    read_all,
    read_bytes,
    received,
    references,
    send,
    set_to,
    settled,
    wait_for,
)
from tests.transport_stream import PACKET, group

SMALL = 4096
"""Bytes of a socket buffer that stalls soon."""


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """After each test the module is as idle as before it. The sources' sender stays on one processor: see `streams.received`."""
    os.sched_setaffinity(0, {0})
    yield
    wait_for(lambda: references() == 0, f"{references()} references to the module are left")


def shared_datagrams(source: Link) -> bool:
    return bool(omss.hello(source.near).features & omss.SHARED_DATAGRAMS)


def test_hello() -> None:
    with socket.socket() as sock:
        hello = omss.hello(sock)
        assert (hello.version, hello.classes, hello.max_ring) == (omss.VERSION, omss.CLASSES, omss.MAX_RING)
        assert hello.workers == os.cpu_count()
        with pytest.raises(OSError) as caught:
            omss._get(sock, omss.HELLO, bytearray(struct.pack("=I", omss.VERSION + 1)))
        assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize("kind", KINDS)
def test_every_sink_gets_every_byte(kind: str) -> None:
    with links([kind, *KINDS, *KINDS]) as (source, *sinks):
        omss.set_source(source.near, ring=1000, copy_below=1)
        for sink in sinks:
            omss.add_sink(source.near, sink.near)
        total = 600
        for first in range(0, total, 50):  # loopback's receivers must keep up
            feed(source, first, 50)
            read_bytes(sinks, (first + 50) * PIECE)
        sent = b"".join(map(piece, range(total)))
        for sink in sinks:
            assert received(sink) == list(range(total)), sink.kind
            assert bytes(sink.got) == sent or not sink.stream
            status = outcome(sink)
            assert (status.state, status.lag, status.sent.bytes) == (SinkState.STREAMING, 0, len(sent))
            assert status.sent.drops.total == 0 and status.sent.shared + status.sent.copied == len(sent)
            shared = sink.stream or shared_datagrams(source)
            assert status.sent.shared == (len(sent) if shared else 0), sink.kind
            assert (status.sent.pages > 0) == shared
        status_all = omss.status(source.near)
        assert status_all.received == len(sent) and status_all.sent.bytes == len(sent) * len(sinks)
        if not source.stream:
            assert status_all.head == total
            assert sorted(map(number_of, sinks[2].pieces)) == list(range(total))


def test_three_hundred_sinks() -> None:
    blob = os.urandom(300_000)
    kinds = list(itertools.islice(itertools.cycle(("tcp4", "tcp6")), 300))
    with links(["tcp4", *kinds]) as (source, *sinks):
        omss.set_source(source.near, entry=8192, ring=64)
        added = [omss.add_sink(source.near, sink.near, service_class=at % 8) for at, sink in enumerate(sinks)]
        for at in range(0, len(blob), 30_000):
            send(source, blob[at : at + 30_000])
            read_bytes(sinks, min(at + 30_000, len(blob)))
        want = hashlib.sha256(blob).digest()
        assert all(hashlib.sha256(sink.got).digest() == want for sink in sinks)
        found = omss.sinks(source.near)
        assert [sink.id for sink in found] == sorted(added)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(omss, "PAGE", 10 * omss._SINK.size + 5)
            assert [sink.id for sink in omss.sinks(source.near)] == sorted(added)
        assert sum(sink.sent.bytes for sink in found) == omss.status(source.near).sent.bytes == 300 * len(blob)
        assert all(sink.sent.copied == 0 for sink in found)


def test_large_and_empty_datagrams() -> None:
    with links(["udp4", "udp4", "udp6", "tcp4"]) as (source, *sinks):
        omss.set_source(source.near)
        for sink in sinks:
            omss.add_sink(source.near, sink.near)
        sizes = [1, 0, 65_000, 188, 40_000, 65_507, 2]
        blobs = [os.urandom(size) for size in sizes]
        for blob in blobs:
            send(source, blob)
        settled(source)
        wait_for(lambda: all(one.cursor == len(sizes) for one in omss.sinks(source.near)), "everything is sent")
        time.sleep(0.05)
        for sink in sinks:
            sink.read()
        # An IPv6 header leaves as much room as an IPv4 one: 65,507 fit both.
        for sink in sinks[:2]:
            assert sorted(sink.pieces) == sorted(blobs)
        assert bytes(sinks[2].got) == b"".join(blobs)
    with links(["udp4", "udp4"]) as (source, sink):
        omss.set_source(source.near, entry=1000)
        omss.add_sink(source.near, sink.near)
        for size in (1001, 1000):
            send(source, bytes(size))
        settled(source)
        read_bytes([sink], 1000)
        assert omss.status(source.near).dropped.size == 1 and [len(data) for data in sink.pieces] == [1000]


def test_datagrams_of_unusual_sockets() -> None:
    """What a socket was told of its datagrams holds for those that the module sends on it; and one of IPv6 may speak IPv4."""
    with links(["udp4", "udp4", "udp4", "udp6", "udp4"]) as (source, *sinks):
        sinks[0].near.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\1\1\1\0")
        sinks[1].near.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x28)
        sinks[1].near.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 7)
        sinks[1].far.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        sinks[2].near.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 0x28)
        sinks[2].far.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
        mapped = sinks[3]
        mapped.near.close()
        mapped.near = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        mapped.near.bind(("::ffff:127.0.0.1", 0))
        mapped.near.connect(("::ffff:127.0.0.1", mapped.far.getsockname()[1]))
        mapped.far.connect(("127.0.0.1", mapped.near.getsockname()[1]))
        omss.set_source(source.near)
        for sink in sinks:
            omss.add_sink(source.near, sink.near)
        feed(source, 0, 50)
        classes = ((sinks[1], socket.IPPROTO_IP, socket.IP_TOS), (sinks[2], socket.IPPROTO_IPV6, socket.IPV6_TCLASS))
        for sink, level, kind in classes:
            wait_for(lambda sink=sink: outcome(sink).cursor == 50, "all are sent")  # type: ignore[misc]
            data, ancillary, _, _ = sink.far.recvmsg(2000, 100)
            assert number_of(data) in range(50)
            assert [(one[0], one[1], one[2][0]) for one in ancillary] == [(level, kind, 0x28)]
            sink.got += data
        read_bytes(sinks, 50 * PIECE)
        assert all(received(sink) == list(range(50)) for sink in sinks)


def test_joins() -> None:
    with links(["udp4", "tcp4", "tcp4", "tcp6", "udp4", "tcp4"]) as (source, *sinks):
        session = omss.set_source(source.near, ring=50)
        feed(source, 0, 80)
        omss.add_sink(source.near, sinks[0].near)
        omss.add_sink(source.near, sinks[1].near, join=Join.OLDEST)
        omss.add_sink(sinks[0].near, sinks[2].near, join=Join.NEXT_SYNC, session=session)
        omss.add_sink(sinks[0].near, sinks[3].near, join=Join.FROM, begin=75)
        omss.add_sink(sinks[4].near, sinks[4].near, join=Join.FROM, begin=10, session=session)
        wait_for(lambda: all(one.lag == 0 for one in omss.sinks(source.near)), "they have what was there")
        feed(source, 80, 20)
        for sink, first in zip(sinks, (80, 30, 80, 75, 30), strict=True):
            read_bytes([sink], (100 - first) * PIECE)
            assert numbers(sink.got) == list(range(first, 100))
        assert outcome(sinks[4]).sent.drops.overrun == 20
        assert outcome(sinks[1]).sent.drops.total == 0


def test_a_removed_sink_is_its_owners_again() -> None:
    with links(["udp4", "tcp4", "udp4", "tcp6"]) as (source, *sinks):
        omss.set_source(source.near)
        numbers_of = [omss.add_sink(source.near, sink.near) for sink in sinks]
        feed(source, 0, 10)
        read_bytes(sinks, 10 * PIECE)
        omss.halt_sink(source.near, sinks[0].near)
        assert outcome(sinks[0]).state is SinkState.LEAVING and outcome(sinks[0]).cursor == 10
        omss.remove_sink(source.near, sinks[0].near)
        omss.remove_sink(source.near, sinks[1].near)
        omss.remove_sink(source.near, numbers_of[2])
        feed(source, 10, 10)
        assert omss.status(source.near).sinks == 0 and omss.status(source.near).sent.bytes == 30 * PIECE
        for sink in sinks:
            sink.near.sendall(b"from its owner")
            read_all([sink], lambda one: len(one.got) > 10 * PIECE)
            assert bytes(sink.got[10 * PIECE :]) == b"from its owner"
            sink.far.setblocking(True)
            sink.far.sendall(b"and back")
            assert sink.near.recv(100) == b"and back"
            with pytest.raises(OSError) as caught:
                omss.remove_sink(source.near, sink.near)
            assert caught.value.errno == errno.ENOENT
            omss.add_sink(source.near, sink.near)  # and once more


def test_it_leaves_between_entries() -> None:
    """Removed while its buffers are full and an entry is half sent: the entry is finished, what follows is the owner's."""
    with links(["udp4"]) as (source,), links(["tcp4", "tcp6"], buffer=SMALL) as sinks:
        omss.set_source(source.near, ring=1000)
        for sink in sinks:
            omss.add_sink(source.near, sink.near)
        feed(source, 0, 900)
        for sink in sinks:
            wait_for(lambda one=sink: outcome(one).blocked, "it is blocked")  # type: ignore[misc]
            before = sink.near.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            omss.remove_sink(source.near, sink.near)
            assert sink.near.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == before
        for sink in sinks:
            sink.near.setblocking(False)
            last, sent = b"the owner's", 0
            while sent < len(last):
                sink.read()
                try:
                    sent += sink.near.send(last[sent:])
                except BlockingIOError:
                    time.sleep(0.001)
            read_all([sink], lambda one: bytes(one.got[-20:]).endswith(b"the owner's"))
            got = numbers(sink.got[: -len(last)])
            assert got == list(range(len(got))) and 0 < len(got) < 900


def test_head_drop_takes_whole_entries_from_the_slow_sink_only() -> None:
    with links(["udp4", "tcp4", "udp6"]) as (source, *quick), links(["tcp4", "tcp6", "tcp4"], buffer=SMALL) as slow:
        omss.set_source(source.near, ring=100)
        for sink in (*quick, *slow[:2]):
            omss.add_sink(source.near, sink.near)
        omss.add_sink(source.near, slow[2].near, lag_soft=10)
        for first in range(0, 3000, 50):
            feed(source, first, 50)
            read_bytes(quick, (first + 50) * PIECE)
            if first % 500 == 0:
                for sink in slow:
                    sink.read()
        for sink in quick:
            assert received(sink) == list(range(3000)) and outcome(sink).sent.drops.total == 0
        for sink in slow:
            catch_up(sink)
            got, status = numbers(sink.got), outcome(sink)
            assert got == sorted(set(got)) and got[-1] == 2999
            assert len(got) == status.sent.entries == 3000 - status.sent.drops.total < 3000
        assert outcome(slow[2]).sent.drops.lag > 0 and outcome(slow[0]).sent.drops.overrun > 0
        # Half the limit of the most impatient does not wait; the others' gaps end a ring before the head.
        assert len(set(range(2990, 3000)) - set(numbers(slow[2].got))) == 0


@pytest.mark.parametrize("by", ["soft", "hard"])
def test_disconnect(by: str) -> None:
    limit = {"lag_soft": 20, "on_lag": OnLag.DISCONNECT} if by == "soft" else {"lag_hard": 150}
    with links(["udp4", "tcp4"]) as (source, quick), links(["tcp4"], buffer=SMALL) as (slow,):
        omss.set_source(source.near, ring=1000)
        omss.add_sink(source.near, quick.near, **limit)  # type: ignore[arg-type]
        omss.add_sink(source.near, slow.near, **limit)  # type: ignore[arg-type]
        for first in range(0, 600, 10):
            feed(source, first, 10)
            read_bytes([quick], (first + 10) * PIECE)
        wait_for(lambda: outcome(slow).state is SinkState.DISCONNECTED, "it is disconnected")
        read_all([slow], lambda one: one.over)
        assert outcome(quick).state is SinkState.STREAMING and numbers(quick.got) == list(range(600))
        got = slow.got[: len(slow.got) // PIECE * PIECE]
        assert numbers(got) == list(range(len(got) // PIECE))
        slow.near.close()
        assert omss.status(source.near).sinks == 1


def test_the_latency_budget_gathers_entries() -> None:
    sends = {}
    for latency in (0, 200):
        with links(["udp4", "tcp4", "udp4"]) as (source, *sinks):
            omss.set_source(source.near, latency=latency)
            for sink in sinks:
                omss.add_sink(source.near, sink.near)
            began = time.monotonic()
            feed(source, 0, 20, pause=0.002)
            read_bytes(sinks, 20 * PIECE)
            took = time.monotonic() - began
            assert took >= latency / 1000
            for sink in sinks:
                assert received(sink) == list(range(20))
            assert sorted(map(number_of, sinks[1].pieces)) == list(range(20))
            sends[latency] = [outcome(sink).sent.sends for sink in sinks]
    assert min(sends[0]) >= 8
    assert max(sends[200]) <= 3


def test_the_budget_does_not_lose_entries() -> None:
    with links(["udp4", "tcp4"]) as (source, sink):
        omss.set_source(source.near, latency=1000, ring=20)
        omss.add_sink(source.near, sink.near)
        for first in range(0, 200, 10):
            feed(source, first, 10)
            time.sleep(0.01)
        read_bytes([sink], 200 * PIECE)
        assert numbers(sink.got) == list(range(200))


def test_copy_mode_and_small_payload() -> None:
    for options, shared in (({"copy": True}, False), ({"copy_below": 2000}, False), ({}, True)):
        with links(["udp4", "tcp4"]) as (source, sink):
            omss.set_source(source.near, **options)
            omss.add_sink(source.near, sink.near)
            for number in range(20):
                feed(source, number, 1)
                read_bytes([sink], (number + 1) * PIECE)
            assert numbers(sink.got) == list(range(20))
            counters = outcome(sink).sent
            assert (counters.shared, counters.copied) == ((20 * PIECE, 0) if shared else (0, 20 * PIECE))
            assert (counters.pages > 0) is shared


def test_payload_that_was_handed_over_never_changes() -> None:
    """A sink that reads late gets what was sent, though the ring has been filled many times since."""
    with links(["udp4", "tcp4", "tcp6"]) as (source, late, quick):
        for sock in (late.near, late.far):
            sock.setsockopt(socket.SOL_SOCKET, 32, 4 << 20)  # SO_SNDBUFFORCE
            sock.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)
        omss.set_source(source.near, ring=8)
        omss.add_sink(source.near, late.near)
        omss.add_sink(source.near, quick.near)
        for first in range(0, 1000, 4):
            feed(source, first, 4)
            read_bytes([quick], (first + 4) * PIECE)
        catch_up(late)
        got = numbers(late.got)
        assert len(got) == 1000 - outcome(late).sent.drops.total and got == sorted(got)
        assert outcome(late).sent.copied == 0


@pytest.mark.parametrize("kind", ["tcp4", "udp6"])
def test_transport_stream(kind: str) -> None:
    """Entries are whole packets; who waits for a sync point begins with a PAT that leads to a key frame."""
    groups = [group(20), group(20, key=False), group(20), group(9), group(30)]
    with links([kind, "tcp4", "tcp4", "udp4"]) as (source, first, joiner, datagrams):
        omss.set_source(source.near, framing=Framing.MPEGTS, entry=7 * PACKET, ring=500)
        omss.add_sink(source.near, first.near)
        omss.add_sink(source.near, datagrams.near)
        feed_stream(source, groups[0][: 10 * PACKET])
        omss.add_sink(source.near, joiner.near, join=Join.NEXT_SYNC)
        assert outcome(joiner).state is SinkState.WAITING
        feed_stream(source, groups[0][10 * PACKET :] + groups[1])
        assert outcome(joiner).state is SinkState.WAITING
        feed_stream(source, groups[2] + groups[3])
        feed_stream(source, groups[4])
        whole = b"".join(groups)
        read_bytes([first, datagrams], len(whole))
        assert bytes(first.got) == whole
        assert sorted(packets(datagrams.got)) == sorted(packets(whole))
        rest = b"".join(groups[2:])
        read_bytes([joiner], len(rest))
        assert bytes(joiner.got) == rest
        assert omss.status(source.near).syncs == 4
        assert all(len(data) % PACKET == 0 and len(data) <= 7 * PACKET for data in datagrams.pieces)
        if source.stream:
            assert sum(data[1] & 0x1F == 0 and data[2] == 0 for data in datagrams.pieces) == len(groups)


def packets(blob: bytes | bytearray) -> list[bytes]:
    """Of a transport stream."""
    return [bytes(blob[at : at + PACKET]) for at in range(0, len(blob), PACKET)]


def feed_stream(source: Link, blob: bytes) -> None:
    """In pieces of any size to TCP; to UDP a PAT begins a datagram."""
    chosen = random.Random(1)
    while blob:
        if source.stream:
            size = chosen.randint(1, 700)
        else:
            starts = [at for at in range(PACKET, 7 * PACKET, PACKET) if blob[at + 1 : at + 3] == b"\x40\x00"]
            size = starts[0] if starts else 7 * PACKET
        send(source, blob[:size])
        blob = blob[size:]
        if source.stream:
            settled(source)
    settled(source)
    wait_for(lambda: omss.status(source.near).head > 0, "it has come")


def test_what_is_no_packet_is_passed_on() -> None:
    """As entries of its own: a sink gets every byte, however they come, and joins at a PAT."""
    chance = random.Random(11)
    parts = [b"rubbish" * 100, *(_with_rubbish(chance) for _ in range(60)), b"\x47" + bytes(50)]
    whole, at = b"".join(parts), 0
    with links(["tcp4", "tcp4", "tcp4"]) as (source, sink, late):
        omss.set_source(source.near, framing=Framing.MPEGTS, entry=7 * PACKET, ring=4000)
        omss.add_sink(source.near, sink.near)
        omss.add_sink(source.near, late.near, join=Join.NEXT_SYNC)
        while at < len(whole):
            step = chance.choice([1, 50, 187, 188, 189, 1000, 5000])
            send(source, whole[at : at + step])
            at += step
        source.far.close()
        read_bytes([sink], len(whole))
        wait_for(lambda: omss.status(source.near).state is State.ENDED, "the end")
        late.read()
        assert bytes(sink.got) == whole
        begins = bytes(late.got)
        assert whole.endswith(begins) and begins.startswith(b"\x47\x40\0") and len(begins) > len(whole) // 2
        status = omss.status(source.near)
        assert status.dropped.framing == 0 and status.received == len(whole)


def _with_rubbish(chance: random.Random) -> bytes:
    """A group, and perhaps bytes that belong to no packet."""
    rubbish = bytes(chance.randrange(256) for _ in range(chance.choice([0, 0, 0, 1, 77, 187, 188, 400, 5000])))
    return group(20) + rubbish


def test_drop_to_sync() -> None:
    """After a stall a sink goes on with a PAT; what it got is whole entries."""
    groups = [group(40) for _ in range(60)]
    starts = set(itertools.accumulate((len(one) for one in groups), initial=0))
    whole = b"".join(groups)
    with links(["tcp4", "tcp4"]) as (source, quick), links(["tcp4"], buffer=SMALL) as (slow,):
        omss.set_source(source.near, framing=Framing.MPEGTS, entry=7 * PACKET, ring=200)
        omss.add_sink(source.near, quick.near)
        omss.add_sink(source.near, slow.near, on_lag=OnLag.DROP_TO_SYNC, lag_soft=20)
        sent = 0
        for at, one in enumerate(groups):
            send(source, one)
            sent += len(one)
            read_bytes([quick], sent)
            if at in (20, 40):
                slow.read()
        catch_up(slow)
        assert bytes(quick.got) == whole
        got, at, gaps = bytes(slow.got), 0, 0
        while got:
            if got[:PACKET] != whole[at : at + PACKET]:
                at = whole.index(got[:1000], at)
                assert at in starts, "it goes on at a PAT"
                gaps += 1
            got, at = got[PACKET:], at + PACKET
        assert gaps >= 1 and outcome(slow).sent.drops.lag > 0 and at == len(whole)


def test_random_disturbance_changes_nobody_elses_stream() -> None:
    disturbed(2010, lambda rounds: rounds < 60)


@pytest.mark.long
@pytest.mark.timeout(500)
def test_five_minutes_of_random_disturbance() -> None:
    end = time.monotonic() + 300
    disturbed(2011, lambda rounds: time.monotonic() < end)


def disturbed(seed: int, more: Callable[[int], bool]) -> None:
    """Joins, leaves, stalls, resets and closes at random; the steady sinks get every byte, the others whole entries."""
    chosen, fed, rounds = random.Random(seed), 0, 0
    with links(["udp4", "tcp4", "tcp6", "udp4"]) as (source, *steady):
        omss.set_source(source.near, ring=64)
        for sink in steady:
            omss.add_sink(source.near, sink.near, service_class=3)
        others: list[Link] = []
        while more(rounds):
            for _ in range(5):
                feed(source, fed, 10)
                fed += 10
                disturb(chosen, source, others)
            read_bytes(steady, 50 * PIECE)
            for sink in steady:
                assert received(sink) == list(range(fed - 50, fed))
                sink.got.clear()
                sink.pieces.clear()
            rounds += 1
        assert all(outcome(sink).sent.drops.total == 0 for sink in steady)
        for sink in others:
            sink.close()
        wait_for(lambda: omss.status(source.near).sinks == len(steady), "who was closed has left")


def disturb(chosen: random.Random, source: Link, others: list[Link]) -> None:
    """One thing that a viewer may do."""
    act = chosen.randrange(6)
    if act <= 1 and len(others) < 40:
        sink = link(chosen.choice(KINDS), buffer=chosen.choice((0, SMALL)))
        others.append(sink)
        policy = chosen.choice((OnLag.HEAD_DROP, OnLag.DISCONNECT, OnLag.DROP_TO_SYNC))
        soft, join = chosen.choice((0, 5, 30)), chosen.choice((Join.LATEST, Join.OLDEST))
        omss.add_sink(source.near, sink.near, on_lag=policy, lag_soft=soft, service_class=chosen.randrange(8), join=join)
        return
    if not others:
        return
    sink = chosen.choice(others)
    if act == 2:
        sink.read()
        return
    if act == 3:
        return
    others.remove(sink)
    if act == 4 and sink.stream:
        sink.reset()
        sink.near.close()
    elif chosen.random() < 0.5:
        try:
            omss.remove_sink(source.near, sink.near)
        except OSError as error:
            assert error.errno in (errno.ENOENT, errno.EAGAIN)
        whole_entries(sink)
    sink.close()


def whole_entries(sink: Link) -> None:
    """What it has got so far."""
    sink.read()
    if sink.stream:
        numbers(sink.got[: len(sink.got) // PIECE * PIECE])
    else:
        assert all(number_of(data) >= 0 for data in sink.pieces)


def test_no_memory_is_a_drop_and_not_a_stall() -> None:
    for kind in ("udp4", "tcp4"):
        with links([kind, "tcp4"]) as (source, sink):
            omss.set_source(source.near, entry=1000 if kind == "tcp4" else 0)
            omss.add_sink(source.near, sink.near)
            feed(source, 0, 5)
            read_bytes([sink], 5 * PIECE)
            with set_to("max_memory", 0):
                feed(source, 5, 5)
                assert omss.status(source.near).dropped.memory >= 1
            feed(source, 10, 5)
            read_bytes([sink], 10 * PIECE)
            assert numbers(sink.got) == [*range(5), *range(10, 15)]


def test_a_refused_datagram_does_not_cost_the_next() -> None:
    with links(["udp4", "udp4", "udp6"]) as (source, *sinks):
        omss.set_source(source.near)
        for sink in sinks:
            omss.add_sink(source.near, sink.near)
            name = sink.far.getsockname()
            sink.far.close()
            feed(source, 0, 1)
            wait_for(lambda one=sink: outcome(one).cursor == omss.status(source.near).head, "it is sent")  # type: ignore[misc]
            sink.far = socket.socket(sink.near.family, socket.SOCK_DGRAM)
            sink.far.bind(name[:2])
            sink.far.setblocking(False)
            feed(source, 1, 1)
            read_bytes([sink], PIECE)
            assert numbers(sink.got) == [1]
            drops = outcome(sink).sent.drops
            assert (drops.refused, drops.total) == (1, 0)


def test_limits_of_sinks() -> None:
    with links(["udp4", "tcp4", "tcp4", "tcp4"]) as (source, *sinks):
        omss.set_source(source.near, max_sinks=2)
        for sink in sinks[:2]:
            omss.add_sink(source.near, sink.near)
        for setting in (0, 2):
            with set_to("max_sinks", setting), pytest.raises(OSError) as caught:
                omss.add_sink(source.near, sinks[2].near)
            assert caught.value.errno == errno.ENOSPC
        omss.remove_sink(source.near, sinks[0].near)
        omss.add_sink(source.near, sinks[2].near)
