# SPDX-License-Identifier: Apache-2.0
"""The ring's writer: what it has written is there to read, and it goes on where another stopped."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from guest_agent.handoff.ring_file import HEADER_BYTES, RingReader
from guest_agent.ring import Ring

SIZE = 64 << 10


def _read(path: Path, position: int, most: int = 1 << 20) -> tuple[int, bytes, bool]:
    with path.open("rb") as file:
        piece = RingReader().read(file.fileno(), position, most)
    return piece.position, piece.data, piece.ended


def test_everything_that_was_written_is_read(tmp_path: Path) -> None:
    path, data, chance = tmp_path / "ring", os.urandom(1_000_000), random.Random(1)
    got, at = bytearray(), 0
    with Ring(path, size=SIZE) as ring:
        assert path.stat().st_size == HEADER_BYTES + SIZE and ring.size == SIZE
        while at < len(data):
            step = chance.randrange(1, 20_000)
            ring.write(data[at : at + step])
            at = min(at + step, len(data))
            assert ring.position == at
            position, more, _ = _read(path, len(got))
            assert position == len(got)
            got += more
    assert got == data


def test_more_than_the_ring_keeps_is_its_newest_bytes(tmp_path: Path) -> None:
    path, data = tmp_path / "ring", os.urandom(5 * SIZE + 123)
    with Ring(path, size=SIZE) as ring:
        ring.write(data)
    position, kept, ended = _read(path, 0)
    assert data.endswith(kept) and position + len(kept) == len(data) and not ended
    assert len(kept) > SIZE * 7 // 8, "what is announced is not much of the ring"


def test_a_writer_that_comes_back_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ring"
    Ring(path, size=SIZE).write(b"one,")
    again = Ring(path)
    assert again.position == 4
    again.write(b"two,")
    third = Ring(path, size=SIZE - 1)
    third.write(b"three")
    assert _read(path, 0) == (0, b"one,two,three", False)
    third.end()
    assert _read(path, 0) == (0, b"one,two,three", True)
    assert _read(path, 13) == (13, b"", True)
    third.write(b".")
    assert _read(path, 0)[2] is False
    for one in (again, third):
        one.close()


def test_it_lets_go_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "ring"

    def opened() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))

    ring = Ring(path, size=SIZE)
    assert opened() == 0
    ring.write(b"1")
    assert opened() == 1
    ring.close()
    ring.close()
    assert opened() == 0
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        ring.write(b"2")
    (tmp_path / "elsewhere").rename(path)
    ring.write(b"2")
    ring.close()
    assert _read(path, 0)[1] == b"12"


def test_what_is_no_ring(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Ring(tmp_path / "nothing")
    (tmp_path / "film").write_bytes(bytes(100_000))
    with pytest.raises(OSError, match="not a ring"):
        Ring(tmp_path / "film", size=SIZE)
    Ring(tmp_path / "ring", size=SIZE).close()
    with pytest.raises(ValueError, match="a ring of 65536 bytes"):
        Ring(tmp_path / "ring", size=2 * SIZE)
    with pytest.raises(ValueError, match="multiple of"):
        Ring(tmp_path / "vast", size=1 << 41)
    assert [one.name for one in sorted(tmp_path.iterdir())] == ["film", "ring"]
