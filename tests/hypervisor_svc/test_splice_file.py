# SPDX-License-Identifier: Apache-2.0
"""Files and rings as sources: their bytes are the sinks', and who leaves one session goes on in another, with no gap and no
repeat."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_agent.handoff.ring_file import HEADER_BYTES, MAGIC
from guest_agent.ring import Ring
from hypervisor_svc.ring import Join, OnLag
from hypervisor_svc.splice import FileSource, Framing, Left, RingSource, SinkOptions, SinkState
from tests.hypervisor_svc.splice_bench import Bench, bench, pair, run
from tests.transport_stream import stream


def opened(path: Path, offset: int = 0) -> FileSource:
    return FileSource(os.open(path, os.O_RDONLY), offset)


def opened_ring(path: Path, offset: int = 0) -> RingSource:
    return RingSource(os.open(path, os.O_RDONLY), offset)


@pytest.mark.parametrize("mpegts", [False, True])
def test_a_file_that_grows_is_sent_from_the_page_cache(mpegts: bool, tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "live"
        data = b"".join(stream(200))
        path.write_bytes(data[:100_000])
        framing = Framing.MPEGTS if mpegts else Framing.RAW
        file = os.open(path, os.O_RDONLY)
        async with bench(FileSource(file, 0), framing=framing, ring_entries=4096) as made:
            early = [made.listen() for _ in range(20)]
            udp = made.listen(udp=True)
            with path.open("ab") as writer:
                for at in range(100_000, len(data), 50_000):
                    writer.write(data[at : at + 50_000])
                    writer.flush()
                    await asyncio.sleep(0.01)
            await made.until(lambda: all(len(one.got) >= len(data) - 187 for one in early), "all have all")
            late = made.listen(SinkOptions(join=Join.OLDEST))
            await made.until(lambda: len(late.got) == len(early[0].got), "who comes late too")
            assert {bytes(one.got) for one in [*early, late]} == {data}
            assert b"".join(udp.datagrams) == data
            counts = made.sink(early[0]).counts
            assert counts.bytes_copied == 0 and counts.pages_referenced >= len(data) // 4096
            path.write_bytes(b"")
            await made.until(lambda: made.ended, "a file that was cut short is the end")
            assert "cut short" in made.ended[0]

    run(test)


@pytest.mark.parametrize("mpegts", [False, True])
def test_a_ring_goes_to_everybody(mpegts: bool, tmp_path: Path) -> None:
    """Many times its size, to who is quick enough."""

    async def test() -> None:
        path, data = tmp_path / "ring", b"".join(stream(400))
        with Ring(path, size=256 << 10) as ring:
            framing = Framing.MPEGTS if mpegts else Framing.RAW
            async with bench(opened_ring(path), framing=framing, ring_entries=4096) as made:
                tcp = [made.listen() for _ in range(20)]
                udp = made.listen(udp=True)
                for at in range(0, len(data), 20_000):
                    ring.write(data[at : at + 20_000])
                    read = min(at + 20_000, len(data)) - 188
                    await made.until(lambda read=read: made.session.status().bytes_in >= read, "it is read")  # type: ignore[misc]
                ring.end()
                await made.until(lambda: all(one.left for one in [*tcp, udp]), "the ring's end is everybody's")
                assert {one.left for one in tcp} == {(Left.SOURCE_ENDED, 0)} and made.ended == ["the source's ring was ended"]
                await made.until(lambda: all(len(one.got) == len(data) for one in tcp), "all of it")
                assert {bytes(one.got) for one in tcp} == {data} and b"".join(udp.datagrams) == data
                assert made.session.status().source_dropped == {}

    run(test)


def test_a_writer_that_is_too_quick_costs_what_it_wrote_over(tmp_path: Path) -> None:
    async def test() -> None:
        path, data = tmp_path / "ring", b"".join(stream(100, length=50))
        with Ring(path, size=64 << 10) as ring:
            async with bench(opened_ring(path), framing=Framing.MPEGTS, entry_bytes=1316, ring_entries=4096) as made:
                listener = made.listen()
                ring.write(data[: 188 * 100])
                await made.until(lambda: made.session.status().bytes_in >= 188 * 99, "it is read")
                ring.write(data[188 * 100 :])  # without a pause for the reader
                ring.end()
                await made.until(lambda: listener.left, "the end")
                lost = made.session.status().source_dropped["overwritten"]
                await made.until(lambda: len(listener.got) == len(data) - lost, "all but what was overwritten")
                kept = len(data) - 188 * 100 - lost
                assert 48 << 10 < kept < 64 << 10
                assert listener.got == data[: 188 * 100] + data[-kept:]

    run(test)


Open = Callable[[Path, int], FileSource]


class Writer:
    """Lets a file or a ring grow by pieces of any length."""

    def __init__(self, path: Path, data: bytes, *, ring: bool) -> None:
        self.path, self.data, self.written = path, data, 0
        self.open: Open = opened_ring if ring else opened
        self._ring = Ring(path, size=4 << 20) if ring else None
        self._file = path.open("ab", buffering=0) if not ring else None
        self._chance = random.Random(3)

    def some(self) -> None:
        step = self.data[self.written : self.written + self._chance.randrange(1, 30_000)]
        self.written += len(step)
        if self._ring is not None:
            self._ring.write(step)
        elif self._file is not None:
            self._file.write(step)

    def close(self) -> None:
        for one in (self._ring, self._file):
            if one is not None:
                one.close()


@pytest.mark.root
@pytest.mark.parametrize("mpegts", [False, True])
@pytest.mark.parametrize("ring", [False, True])
def test_who_leaves_a_session_goes_on_in_another(ring: bool, mpegts: bool, tmp_path: Path) -> None:
    """As after a migration: every session cuts its own entries, of another size, and begins where it likes."""
    data = b"".join(stream(1000))
    writer = Writer(tmp_path / "source", data, ring=ring)
    sinks = [pair(buffer=30_000), pair(), pair(udp=True)]
    got = [bytearray() for _ in sinks]
    cursors: list[int] = [0, 0, 0]
    chance = random.Random(5)

    async def stay(made: Bench) -> None:
        numbers = [
            made.session.add_sink(near, SinkOptions(begin=cursors[index]), lambda *_: pytest.fail("it left by itself"))
            for index, (near, _) in enumerate(sinks)
        ]
        for _ in range(chance.randrange(1, 12)):
            writer.some()
            await asyncio.sleep(0.004)
            for index, (_, far) in enumerate(sinks):
                if index or chance.random() < 0.5:  # the first one is slow
                    _drain(far, got[index])
        for index, number in enumerate(numbers):
            parting = made.session.remove_sink(number)
            assert parting.unsent == parting.counts.lost == 0 and parting.cursor is not None
            cursors[index] = parting.cursor
            await made.until(lambda index=index: _drained(sinks[index][1], got[index], cursors[index]), "what was sent")  # type: ignore[misc]
            assert got[index] == data[: cursors[index]], index

    async def test() -> None:
        while writer.written < len(data):
            begin, entry = min(cursors), chance.choice([188, 1316, 4000, 60_000])
            begin -= chance.randrange(0, begin + 1) % 50_000
            begin -= begin % 188 if mpegts else 0
            framing = Framing.MPEGTS if mpegts else Framing.RAW
            options = {"framing": framing, "entry_bytes": entry, "ring_entries": 65536, "budget_ms": chance.choice([0, 3])}
            async with bench(writer.open(writer.path, begin), **options) as made:
                await stay(made)
        assert min(cursors) > len(data) // 2, "they got most of it"

    try:
        run(test)
    finally:
        writer.close()
        for both in sinks:
            for sock in both:
                sock.close()


def _drain(far: socket.socket, got: bytearray) -> None:
    while True:
        try:
            got += far.recv(1 << 17)
        except BlockingIOError:
            return


def _drained(far: socket.socket, got: bytearray, count: int) -> bool:
    _drain(far, got)
    return len(got) >= count


def test_a_place_that_the_source_has_not_reached_is_waited_for(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "live"
        path.write_bytes(b"0123456789")
        async with bench(opened(path), entry_bytes=188) as made:
            early = made.listen(SinkOptions(begin=15))
            now = made.listen(SinkOptions(join=Join.OLDEST))
            await made.until(lambda: now.got == b"0123456789", "it has what is there")
            assert made.sink(early).state is SinkState.WAITING
            with path.open("ab") as writer:
                writer.write(b"abcdefghij")
            await made.until(lambda: now.got == b"0123456789abcdefghij", "it has all")
            await made.until(lambda: early.got == b"fghij", "it begins within an entry")
            waits = made.listen(SinkOptions(begin=100))
            assert made.session.remove_sink(waits.number).cursor == 100
            again = made.listen(SinkOptions(begin=100))
            path.write_bytes(b"")
            await made.until(lambda: again.left, "a source that ends before")
            assert again.left == (Left.SOURCE_ENDED, 0) and again.parting is not None and again.parting.cursor == 100

    run(test)


def test_what_the_ring_does_not_keep_any_more_is_lost_by_the_sink_s_own_rules(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "live"
        path.write_bytes(bytes(188 * 100))
        async with bench(opened(path), entry_bytes=188, ring_entries=10) as made:
            await made.until(lambda: made.session.ring.head == 100, "it is read")
            loses = made.listen(SinkOptions(begin=188 * 50 + 1))
            leaves = made.listen(SinkOptions(begin=0, on_lag=OnLag.DISCONNECT))
            await made.until(lambda: len(loses.got) == 1880 and leaves.left, "both")
            assert made.sink(loses).counts.overrun == 40
            assert leaves.left == (Left.LAGGED, 0) and leaves.got == b""

    run(test)


SIZE = 8192
FIELDS = st.tuples(
    st.sampled_from([SIZE, SIZE, SIZE, 0, 4096, 1 << 40, 1 << 63]),
    st.sampled_from([7, 7, 7, 8]),
    st.integers(0, 40_000) | st.integers(0, (1 << 64) - 1),
    st.integers(0, 40_000) | st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, 0, 0, 1, 2]),
    st.sampled_from([0, 0, 0, 1]),
)


@settings(max_examples=40, deadline=None)
@given(headers=st.lists(st.tuples(FIELDS, st.booleans(), st.integers(0, HEADER_BYTES + SIZE)), min_size=1, max_size=8))
def test_a_ring_that_says_anything(
    tmp_path_factory: pytest.TempPathFactory, headers: list[tuple[tuple[int, ...], bool, int]]
) -> None:
    """Nothing that a guest writes there breaks more than its own relay, which says why; and no sink gets more than there was."""

    async def test() -> None:
        path = tmp_path_factory.mktemp("ring") / "ring"
        path.write_bytes(bytes(HEADER_BYTES + SIZE))
        async with bench(opened_ring(path), ring_entries=64, entry_bytes=1000) as made:
            listener = made.listen()
            for fields, sound, size in headers:
                packed = struct.pack("<6Q", *fields)
                with path.open("r+b") as file:
                    file.write(MAGIC + struct.pack("<II", 1, zlib.crc32(packed) ^ (not sound)) + packed)
                    file.truncate(size if size % 3 == 0 else HEADER_BYTES + SIZE)
                await asyncio.sleep(0.012)
            status = made.session.status()
            assert status.bytes_in <= SIZE * len(headers) * 2 + 40_000 and len(listener.got) <= status.bytes_in
            assert made.ended or not status.ended

    run(test)
