# SPDX-License-Identifier: Apache-2.0
"""The `user` engine on loopback: what every sink got is the source's bytes, with exactly whole entries missing, which are
counted; and whatever one sink does, no other notices."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from typing import Any

import pytest

from hypervisor_svc.herd import Datagrams
from hypervisor_svc.ring import Join, OnLag
from hypervisor_svc.splice import Framing, Left, SessionOptions, SinkOptions, SinkState
from tests.hypervisor_svc.splice_bench import Bench, Listener, bench, feed, run
from tests.transport_stream import PACKET, stream


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("budget", [0, 30])
def test_every_byte_to_every_tcp_sink(budget: int, family: int) -> None:
    async def test() -> None:
        data = os.urandom(3_000_000)
        async with bench(budget_ms=budget) as made:
            for _ in range(100):
                made.listen(family=family)
            await feed(made, data)
            made.source.close()
            await made.until(lambda: all(one.left for one in made.listeners), "all have left")
            assert {one.left for one in made.listeners} == {(Left.SOURCE_ENDED, 0)}
            assert {one.parting.counts.bytes for one in made.listeners if one.parting} == {len(data)}
            for one in made.listeners:
                one.near.close()
            await made.until(lambda: all(one.ended for one in made.listeners), "all see the end")
            assert all(one.got == data for one in made.listeners)
            counts = made.session.status().counts
            assert (counts.bytes, counts.lost) == (100 * len(data), 0)
            assert counts.entries == 100 * made.session.ring.head
            assert counts.bytes_copied == counts.bytes and counts.pages_referenced == 0
            assert made.ended == ["the source closed its connection"]

    run(test)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("budget", [0, 50])
def test_every_datagram_to_every_udp_sink(budget: int, family: int) -> None:
    async def test() -> None:
        chance = random.Random(3)
        sent = [chance.randbytes(1400 if chance.random() < 0.8 else chance.randrange(1, 1400)) for _ in range(400)]
        async with bench("udp", budget_ms=budget) as made:
            for _ in range(50):
                made.listen(udp=True, family=family)
            for number, datagram in enumerate(sent):
                made.source.send(datagram)
                if number % 20 == 19:
                    await asyncio.sleep(0.005)
            await made.until(lambda: made.session.ring.head == len(sent), "all datagrams have come")
            await made.until(lambda: all(len(one.datagrams) == len(sent) for one in made.listeners), "and gone")
            assert all(one.datagrams == sent for one in made.listeners)
            counts = made.session.status().counts
            assert (counts.entries, counts.lost) == (50 * len(sent), 0)
            if budget:
                assert counts.turns < counts.entries / 2, "several datagrams in one send"

    run(test)


def test_a_budget_makes_fewer_sends_and_keeps_its_time() -> None:
    async def test() -> None:
        async with bench("udp", budget_ms=100) as made:
            listener = made.listen()
            made.source.send(b"first")
            await asyncio.sleep(0.02)
            assert not listener.got
            for _ in range(9):
                made.source.send(b"more.")
            await made.until(lambda: len(listener.got) == 50, "everything")
            assert made.sink(listener).counts.turns == 1
            assert made.sink(listener).counts.entries == 10

    run(test)


def test_many_bytes_do_not_wait_for_the_budget() -> None:
    async def test() -> None:
        async with bench(budget_ms=1000, entry_bytes=65536) as made:
            listener = made.listen()
            begun = made.loop.time()
            await feed(made, bytes(200_000))
            await made.until(lambda: len(listener.got) >= 131072, "what is enough for one send")
            assert made.loop.time() - begun < 0.9

    run(test)


def _numbered(count: int, size: int) -> list[bytes]:
    """Entries that tell which they are."""
    return [(b"%08d" % number) * (size // 8) for number in range(count)]


def _which(got: bytes, size: int) -> list[int]:
    """The numbers of what was received: whole entries only."""
    assert len(got) % size == 0
    numbers = []
    for at in range(0, len(got), size):
        entry = got[at : at + size]
        assert entry == entry[:8] * (size // 8), "an entry is cut or mixed"
        numbers.append(int(entry[:8]))
    return numbers


async def _send_numbered(made: Bench, entries: list[bytes]) -> None:
    before = made.session.ring.head
    for number, entry in enumerate(entries):
        made.source.send(entry)
        if number % 8 == 7:
            await made.until(lambda number=number: made.session.ring.head > before + number, "entries arrive")  # type: ignore[misc]
    await made.until(lambda: made.session.ring.head == before + len(entries), "all entries have come")


@pytest.mark.parametrize("soft", [0, 8])
def test_a_slow_sink_loses_whole_entries_and_only_that_one(soft: int) -> None:
    size, entries = 8000, _numbered(600, 8000)

    async def test() -> None:
        async with bench("udp", ring_entries=64) as made:
            slow = made.listen(SinkOptions(lag_soft=soft), buffer=20_000)
            slow.stall(made.loop)
            others = [made.listen() for _ in range(20)]
            await _send_numbered(made, entries)
            assert made.sink(slow).state is SinkState.BEHIND
            slow.read(made.loop)
            await made.caught_up()
            await made.until(lambda: all(len(one.got) == len(entries) * size for one in others), "the others have all")
            counts = made.sink(slow).counts
            await made.until(lambda: len(slow.got) == counts.bytes, "what was sent")
            numbers = _which(bytes(slow.got), size)
            assert numbers == sorted(set(numbers))
            assert len(numbers) + counts.lost == len(entries) and counts.lost > 400
            assert counts.entries == len(numbers)
            kept = soft or 64
            assert numbers[-kept:] == list(range(600 - kept, 600)), "what is newest comes"
            assert bool(counts.overrun), "the ring had no room"
            assert all(_which(bytes(one.got), size) == list(range(600)) for one in others)

    run(test)


def test_a_sink_that_lags_is_disconnected_if_it_wants_that() -> None:
    async def test() -> None:
        async with bench("udp", ring_entries=64) as made:
            slow = made.listen(SinkOptions(on_lag=OnLag.DISCONNECT, lag_soft=10), buffer=20_000)
            stuck = made.listen(SinkOptions(lag_hard_ms=200), buffer=20_000)
            idle = made.listen(SinkOptions(lag_hard_ms=200))
            slow.stall(made.loop)
            stuck.stall(made.loop)
            await _send_numbered(made, _numbered(100, 8000))
            await made.until(lambda: slow.left and stuck.left, "both have left")
            assert slow.left == stuck.left == (Left.LAGGED, 0)
            await asyncio.sleep(0.5)
            assert idle.left is None, "who has everything may take nothing for as long as he likes"

    run(test)


def test_transport_stream_goes_on_at_a_sync_point() -> None:
    packets = stream(60, length=50)
    data = b"".join(packets)
    begins = {at for at in range(0, len(data), PACKET) if at % (50 * PACKET) == 0}

    async def test() -> None:
        async with bench(framing=Framing.MPEGTS, ring_entries=64, entry_bytes=1316) as made:
            slow = made.listen(SinkOptions(on_lag=OnLag.DROP_TO_SYNC), buffer=20_000)
            slow.stall(made.loop)
            other = made.listen()
            await feed(made, data, piece=5000, pause=0.001)
            slow.read(made.loop)
            await made.caught_up(other)
            await asyncio.sleep(0.1)
            late = made.listen(SinkOptions(join=Join.NEXT_SYNC))
            oldest = made.listen(SinkOptions(join=Join.OLDEST))
            assert made.sink(late).state is SinkState.WAITING
            more = b"".join(stream(5, length=50, seed=2))
            await feed(made, more[: 10 * PACKET])
            await feed(made, more[10 * PACKET :])
            await made.until(lambda: made.session.status().bytes_in == len(data + more), "all")
            await made.caught_up()
            await made.until(lambda: len(other.got) == len(data + more), "all at the other")
            read = (late, oldest, slow)
            await made.until(lambda: all(len(one.got) == made.sink(one).counts.bytes for one in read), "what was sent")
            whole = data + more
            assert other.got == whole
            assert late.got == more[: len(late.got)] and len(late.got) > 4 * 50 * PACKET
            assert whole.endswith(bytes(oldest.got)) and len(oldest.got) > len(more)
            counts = made.sink(slow).counts
            gaps = _gaps(bytes(slow.got), whole)
            assert gaps and all(to in begins or to >= len(data) for _, to in gaps), "each gap ends at a table"
            assert counts.overrun + counts.lagged + counts.entries == made.session.ring.head

    run(test)


def _gaps(got: bytes, whole: bytes) -> list[tuple[int, int]]:
    """Where `got`, which is `whole` with parts missing, skips from and to. Every packet of `whole` is different but for tables
    and padding: those at both ends of a gap count as behind it."""
    gaps, at, here = [], 0, 0
    while here < len(got):
        if got[here : here + PACKET] != whole[at : at + PACKET]:
            probe = got[here : here + 6 * PACKET]
            to = whole.find(probe, at)
            assert to >= 0, "bytes that the source never sent"
            same = 0
            while same < at and whole[at - same - PACKET : at - same] == whole[to - same - PACKET : to - same]:
                same += PACKET
            gaps.append((at - same, to - same))
            at = to
        here, at = here + PACKET, at + PACKET
    return gaps


def test_one_that_is_gone_is_told_and_nobody_else_notices() -> None:
    async def test() -> None:
        async with bench() as made:
            listeners = [made.listen() for _ in range(10)]
            data = os.urandom(500_000)
            await feed(made, data[:250_000])
            listeners[3].close(reset=True)
            listeners[7].close()
            await feed(made, data[250_000:])
            await made.until(lambda: listeners[3].left and listeners[7].left, "both are gone")
            assert listeners[3].left[0] is listeners[7].left[0] is Left.PEER_GONE  # type: ignore[index]
            rest = [one for number, one in enumerate(listeners) if number not in (3, 7)]
            await made.until(lambda: all(len(one.got) == len(data) for one in rest), "the others have all")
            assert all(one.got == data for one in rest)
            assert made.session.status().sinks == 8

    run(test)


@pytest.mark.root
def test_who_is_removed_leaves_at_an_entry_s_end_with_a_usable_socket() -> None:
    size, entries = 60_000, _numbered(100, 60_000)

    async def test() -> None:
        async with bench("udp", ring_entries=128) as made:
            slow, quick = made.listen(buffer=100_000), made.listen()
            slow.stall(made.loop)
            await _send_numbered(made, entries[:60])
            await made.until(lambda: made.sink(slow).state is SinkState.BEHIND, "it is behind")
            locks = slow.near.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            parting = made.session.remove_sink(slow.number)
            assert parting.unsent == 0 and parting.cursor is not None and 0 < parting.cursor < 60
            assert slow.near.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == locks
            slow.read(made.loop)
            await made.until(lambda: len(slow.got) == parting.counts.bytes, "what was sent")
            assert _which(bytes(slow.got), size) == list(range(parting.cursor))
            with pytest.raises(KeyError):
                made.session.remove_sink(slow.number)
            await made.loop.sock_sendall(slow.near, b"my own words")
            await made.until(lambda: slow.got.endswith(b"my own words"), "the socket is its owner's again")
            slow.got.clear()
            again = made.session.add_sink(slow.near, SinkOptions(begin=parting.cursor), lambda *_: None)
            assert again != slow.number
            await _send_numbered(made, entries[60:])
            await made.until(lambda: len(slow.got) == (100 - parting.cursor) * size, "no gap, no repeat")  # type: ignore[operator]
            assert _which(bytes(slow.got), size) == list(range(parting.cursor, 100))
            await made.until(lambda: len(quick.got) == 100 * size, "the other has all")

    run(test)


@pytest.mark.root
def test_anything_at_random_and_nobody_s_stream_changes() -> None:
    """Sinks join, leave, stall and reset; the entries that each got are whole, in order, and its own losses."""
    size = 4000

    async def test() -> None:
        chance = random.Random(7)
        async with bench("udp", ring_entries=128, budget_ms=5) as made:
            steady = [made.listen() for _ in range(10)]
            guests: list[Listener] = []
            total = 0
            for _ in range(150):
                entries = [(b"%08d" % (total + number)) * (size // 8) for number in range(8)]
                total += 8
                await _send_numbered(made, entries)
                dice = chance.random()
                present = [one for one in guests if one.left is None and one.far.fileno() >= 0 and one.number]
                if dice < 0.35 or not present:
                    join = chance.choice([Join.LATEST, Join.OLDEST])
                    guests.append(
                        made.listen(SinkOptions(join=join, priority=chance.randrange(3)), buffer=chance.choice([0, 30_000]))
                    )
                elif dice < 0.5:
                    chance.choice(present).stall(made.loop)
                elif dice < 0.6:
                    one = chance.choice(present)
                    if not one._reading:
                        one.read(made.loop)
                elif dice < 0.8:
                    one = chance.choice(present)
                    made.session.remove_sink(one.number)
                    one.number = 0
                else:
                    chance.choice(present).close(reset=chance.random() < 0.5)
            for one in guests:
                if one.far.fileno() >= 0 and not one._reading:
                    one.read(made.loop)
            await made.until(lambda: all(len(one.got) == total * size for one in steady), "the steady have all")
            await made.until(lambda: all(len(one.got) % size == 0 for one in guests if one.far.fileno() >= 0), "whole entries")
            await asyncio.sleep(0.3)
            assert all(_which(bytes(one.got), size) == list(range(total)) for one in steady)
            seen = 0
            for one in guests:
                whole = len(one.got) - len(one.got) % size
                numbers = _which(bytes(one.got[:whole]), size)
                assert numbers == sorted(set(numbers))
                seen += len(numbers)
                if one.far.fileno() >= 0:
                    assert whole == len(one.got)
            assert seen > 1000

    run(test)


@pytest.mark.parametrize("source", ["tcp", "udp"])
def test_a_calm_source_rests_within_the_budget_and_loses_nothing(source: str) -> None:
    """Also when it is calm no more."""

    async def test() -> None:
        async with bench(source, budget_ms=100, ring_entries=4096) as made:
            listener = made.listen()
            reads, looked = 0, made.session.take

            def take(payloads: Any) -> None:
                nonlocal reads
                reads += 1
                looked(payloads)

            made.session.take = take  # type: ignore[method-assign]
            for number in range(100):
                made.source.send(b"%04d" % number * 100)
                await asyncio.sleep(0.01)
            await made.until(lambda: len(listener.got) == 40_000, "all of it")
            assert reads < 100, "it was not looked at for each"
            surge = b"".join(b"%04d" % number * 1000 for number in range(700))
            made.source.setblocking(False)
            for at in range(0, len(surge), 20_000):
                await made.loop.sock_sendall(made.source, surge[at : at + 20_000])
            await made.until(lambda: len(listener.got) == 40_000 + len(surge), "the surge too")
            assert listener.got.endswith(surge)
            assert made.session.status().counts.lost == 0 and not made.session.status().source_dropped

    run(test)


def test_bursts_of_one_length_and_what_comes_between() -> None:
    """Datagrams stay what they are, whatever their sockets were told of the lengths before; and a socket that leaves forgets it."""

    async def test() -> None:
        chance, sent = random.Random(3), list[bytes]()
        async with bench("udp", budget_ms=5) as made:
            herd = [made.listen(udp=True) for _ in range(5)]
            for _ in range(60):
                length = chance.choice([1400, 1400, 1400, 700, 3000])
                for _ in range(chance.choice([1, 4, 4])):
                    data = os.urandom(length)
                    made.source.send(data)
                    sent.append(data)
                await asyncio.sleep(0.006)
            await made.until(lambda: all(len(one.datagrams) == len(sent) for one in herd), "all came")
            assert all(one.datagrams == sent for one in herd)
            (group,) = made.session._groups.values()
            assert isinstance(group, Datagrams) and group.segment
            parting = made.session.remove_sink(herd[0].number)
            assert parting.counts.turns < parting.counts.entries == len(sent)
            herd[0].near.send(bytes(3 * 1400))
            await made.until(lambda: herd[0].datagrams[-1] == bytes(3 * 1400), "one datagram, as before")

    run(test)


def test_a_datagram_that_is_too_long_for_a_burst_goes_alone() -> None:
    async def test() -> None:
        async with bench("udp", budget_ms=40) as made:
            listener = made.listen(udp=True)
            for number in range(4):
                made.source.send(bytes([number]) * 60_000)
            await made.until(lambda: len(listener.datagrams) == 4, "all of them")
            assert [len(one) for one in listener.datagrams] == [60_000] * 4

    run(test)


def test_a_receiver_that_is_not_there_yet() -> None:
    """Its host says so (ICMP); it is counted, and the next datagram is tried again."""

    async def test() -> None:
        async with bench("udp") as made:
            listener = made.listen(udp=True)
            address = listener.far.getsockname()
            listener.close()
            for _ in range(10):
                made.source.send(b"into nothing")
                await asyncio.sleep(0.005)
            await made.until(lambda: made.session.ring.head == 10, "all came")
            assert made.sink(listener).counts.refused > 0
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as late:
                late.bind(address)
                late.settimeout(5)
                for _ in range(4):
                    made.source.send(b"here you are")
                    await asyncio.sleep(0.01)
                assert late.recv(100) == b"here you are"

    run(test)


@pytest.mark.parametrize(
    ("option", "value"),
    [("ring_entries", 1), ("ring_entries", 1 << 17), ("entry_bytes", 100), ("budget_ms", 1001), ("max_sinks", 0)],
)
def test_options_out_of_range(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        SessionOptions(**{option: value})  # type: ignore[arg-type]


def test_what_can_be_no_sink() -> None:
    async def test() -> None:
        async with bench(max_sinks=1) as made:
            with socket.socket() as loose, pytest.raises(ValueError, match="must be connected"):
                made.session.add_sink(loose, SinkOptions(), lambda *_: None)
            one, two = socket.socketpair()
            with one, two, pytest.raises(ValueError, match="TCP or UDP"):
                made.session.add_sink(one, SinkOptions(), lambda *_: None)
            listener = made.listen()
            with pytest.raises(OverflowError, match="has 1 sinks"):
                made.session.add_sink(listener.near, SinkOptions(), lambda *_: None)

    run(test)
