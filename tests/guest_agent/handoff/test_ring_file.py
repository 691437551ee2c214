# SPDX-License-Identifier: Apache-2.0
"""The ring's file: golden bytes, a header that says anything, and a reader whose bytes are overwritten while it reads."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.handoff.ring_file import HEAD_BYTES, HEADER_BYTES, RingHeader, RingReader, decode, encode, pieces
from guest_agent.ring import Ring

SIZE = 8192
HEADER = RingHeader(SIZE, 0x0102030405060708, reserved=70_000, head=69_000)
FIELDS = bytes.fromhex("0020000000000000 0807060504030201 7011010000000000 880d010000000000") + bytes(16)
GOLDEN = b"slring\0\1" + bytes.fromhex("01000000 026a05dc") + FIELDS


def test_golden_bytes() -> None:
    assert encode(HEADER) == GOLDEN
    assert decode(GOLDEN) == HEADER
    assert decode(encode(replace(HEADER, ended=True))).ended
    assert HEADER.tail == 70_000 - SIZE


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 0},
        {"size": 4095},
        {"size": -4096},
        {"size": 1 << 41},
        {"head": 70_001},
        {"head": 70_000 - SIZE - 1},
        {"head": -1},
        {"reserved": 1 << 62, "head": 1 << 62},
        {"identity": -1},
        {"identity": 1 << 64},
    ],
)
def test_numbers_that_cannot_be(changes: dict[str, int]) -> None:
    numbers = {"size": SIZE, "identity": 1, "reserved": 70_000, "head": 69_000, **changes}
    with pytest.raises(ValueError):
        RingHeader(**numbers)  # type: ignore[arg-type]


def _sealed(fields: bytes, version: int = 1) -> bytes:
    return b"slring\0\1" + version.to_bytes(4, "little") + zlib.crc32(fields).to_bytes(4, "little") + fields


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a ring"),
        (encode(HEADER)[:-1], "not a ring"),
        (b"RIFF" + encode(HEADER)[4:], "not a ring"),
        (_sealed(FIELDS, 2), "version 2"),
        (encode(HEADER)[:-9] + b"\1" + encode(HEADER)[-8:], "damaged"),
        (_sealed(FIELDS[:-16] + b"\2" + bytes(15)), "nobody knows"),
        (_sealed(FIELDS[:-8] + b"\0\0\0\0\0\0\0\1"), "nobody knows"),
    ],
)
def test_what_is_no_header(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        decode(data)


@given(fields=st.binary(min_size=48, max_size=48), cut=st.integers(0, HEAD_BYTES + 10))
def test_no_header_crashes(fields: bytes, cut: int) -> None:
    """Also one whose checksum is right: what passes is within its own bounds."""
    data = (_sealed(fields) + bytes(10))[:cut]
    try:
        found = decode(data)
    except ValueError:
        return
    assert 0 <= found.tail <= found.head <= found.reserved <= found.tail + found.size


@given(size=st.integers(1, 4), position=st.integers(0, 1 << 20), data=st.data())
def test_pieces_stay_within_the_file(size: int, position: int, data: st.DataObject) -> None:
    size *= 4096
    count = data.draw(st.integers(0, size))
    parts = pieces(size, position, count)
    assert sum(length for _, length in parts) == count and len(parts) <= 2
    where = [HEADER_BYTES + (position + at) % size for at in range(count)]
    assert [offset + at for offset, length in parts for at in range(length)] == where


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Iterator[int]:
    file = os.open(tmp_path / "ring", os.O_RDWR | os.O_CREAT)
    yield file
    os.close(file)


def _put(file: int, header: bytes, size: int = SIZE) -> None:
    os.ftruncate(file, HEADER_BYTES + size)
    os.pwrite(file, header, 0)


def test_a_ring_that_becomes_another(file: int) -> None:
    _put(file, encode(HEADER))
    reader = RingReader()
    assert reader.read(file, 69_000, 100).data == b""
    for changed in (replace(HEADER, identity=1), replace(HEADER, size=4096 * 3), replace(HEADER, head=68_999)):
        _put(file, encode(HEADER))
        reader.header(file)
        _put(file, encode(changed), changed.size)
        with pytest.raises(OSError) as error:
            reader.read(file, 69_000, 100)
        assert error.value.errno == errno.ESTALE
        reader = RingReader()
    with pytest.raises(OSError, match="ends at 69000, before 69001"):
        _put(file, encode(HEADER))
        RingReader().read(file, 69_001, 100)
    with pytest.raises(OSError, match="cut short"):
        os.ftruncate(file, HEADER_BYTES)
        RingReader().read(file, 0, SIZE)
    with pytest.raises(OSError) as error:
        os.ftruncate(file, 10)
        RingReader().header(file)
    assert error.value.errno == errno.EBADMSG


@given(
    writes=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    between=st.lists(st.integers(1, 3000), max_size=8),
    asked=st.integers(0, 30_000),
    most=st.integers(1, 10_000),
)
def test_what_is_overwritten_while_it_is_read_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, writes: list[int], between: list[int], asked: int, most: int
) -> None:
    """The writer writes on after the reader has read the bytes and before it looks at the header again: the worst moment."""
    path = tmp_path_factory.mktemp("ring") / "ring"
    stream = b"".join(number.to_bytes(4, "big") for number in range(20_000))
    written = 0
    with Ring(path, size=SIZE) as ring, path.open("rb") as file:

        def write(count: int) -> None:
            nonlocal written
            ring.write(stream[written : written + count])
            written += count

        for count in writes:
            write(count)
        head = written

        class Interrupted(RingReader):
            looks = 0

            def header(self, file: int) -> RingHeader:
                self.looks += 1
                if self.looks == 2:
                    for count in between:
                        write(count)
                return super().header(file)

        if asked > head:
            with pytest.raises(OSError, match="before"):
                Interrupted().read(file.fileno(), asked, most)
            return
        piece = Interrupted().read(file.fileno(), asked, most)
    assert piece.position >= asked and piece.data == stream[piece.position : piece.position + len(piece.data)]
    assert piece.position + len(piece.data) <= head and len(piece.data) <= most
    if asked + SIZE - SIZE // 16 > written + 3000 and asked < head:
        assert piece.position == asked and len(piece.data) == min(most, head - asked), "nothing is lost that need not be"


def test_a_header_that_is_being_written_is_read_again(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = encode(HEADER)[:40] + bytes(8) + encode(HEADER)[48:]
    seen = iter([damaged, damaged, encode(HEADER)])
    monkeypatch.setattr(os, "pread", lambda *_: next(seen))
    assert RingReader().header(file) == HEADER
