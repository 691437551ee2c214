# SPDX-License-Identifier: Apache-2.0
"""Transport streams are cut where they may be, nothing is left out, and receivers can begin at what is marked."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor_svc.mpegts import PACKET, Framer, SyncPoints
from tests.transport_stream import SOUND_PID, VIDEO_PID, packet, pat, pmt, stream


@given(data=st.binary(max_size=3000), cuts=st.lists(st.integers(0, 3000)), largest=st.integers(188, 2000))
def test_nothing_is_left_out_of_anything(data: bytes, cuts: list[int], largest: int) -> None:
    assert b"".join(_entries(data, cuts, largest)) == data


@given(cuts=st.lists(st.integers(0, 40 * PACKET)), largest=st.integers(188, 4000))
def test_entries_are_whole_packets_and_begin_at_tables(cuts: list[int], largest: int) -> None:
    data = b"".join(stream(2))
    entries = _entries(data, cuts, largest)
    assert b"".join(entries) == data
    assert all(len(entry) % PACKET == 0 and 0 < len(entry) <= largest for entry in entries)
    assert all(pat() not in entry[1:] for entry in entries)


def test_what_is_no_packet_is_an_entry_of_its_own() -> None:
    packets = stream(1, length=5)
    framer = Framer(10 * PACKET)
    entries = list(framer.feed(b"junk" + b"".join(packets) + b"more"))
    assert entries == [b"junk", b"".join(packets), b"more"]


def _entries(data: bytes, cuts: list[int], largest: int) -> list[bytes]:
    framer, entries, places = Framer(largest), [], sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for begin, end in itertools.pairwise(places):
        entries += list(framer.feed(data[begin:end]))
    rest = framer.flush()
    return [*entries, rest] if rest else entries


def _sync_points(entries: list[bytes]) -> list[tuple[int, int]]:
    """(entry at which it was found, the sync point)."""
    points = SyncPoints()
    found = ((number, points.look(number, entry)) for number, entry in enumerate(entries))
    return [(number, sync) for number, sync in found if sync is not None]


def test_a_sync_point_is_known_when_the_picture_comes() -> None:
    video = packet(VIDEO_PID)
    key = packet(VIDEO_PID, random_access=True)
    assert _sync_points([video, pat(), pmt(), video, key, video, key]) == [(4, 1)]
    assert _sync_points([pat() + pmt() + key + video, pat() + pmt() + video, key]) == [(0, 0), (2, 1)]


def test_no_table_no_sync_point() -> None:
    key = packet(VIDEO_PID, random_access=True)
    assert _sync_points([key, pat(), key, pmt(), pat(), key]) == []


def test_where_there_is_video_sound_is_no_place_to_begin() -> None:
    sound, video = packet(SOUND_PID, random_access=True), packet(VIDEO_PID, random_access=True)
    assert _sync_points([pat(), pmt(sound=True), sound, video]) == [(3, 0)]
    assert _sync_points([pat(), pmt(sound=True, video=False), sound, video]) == [(2, 0)]


def test_datagrams_may_have_a_header_of_rtp() -> None:
    key = packet(VIDEO_PID, random_access=True)
    assert _sync_points([bytes(12) + pat() + pmt(), bytes(12) + key]) == [(1, 0)]


@given(data=st.binary(min_size=188, max_size=188 * 4))
def test_nonsense_is_no_error(data: bytes) -> None:
    SyncPoints().look(0, data)
    points = SyncPoints()
    points.look(0, b"\x47\x40\0" + data[3:])
    points.look(0, pat() + b"\x47\x41\0" + data[3:])


@pytest.mark.root
def test_a_real_encoder_s_stream(tmp_path: Path) -> None:
    """Each of its pictures with the indicator is found, and what follows a sync point decodes without an error."""
    path = tmp_path / "clip.ts"
    source = ["-f", "lavfi", "-i", "testsrc=size=320x180:rate=25:duration=6", "-f", "lavfi", "-i", "sine=duration=6"]
    source += ["-g", "25", "-c:v", "libx264", "-bf", "0", "-c:a", "aac"]
    subprocess.run(["ffmpeg", "-v", "error", *source, "-f", "mpegts", str(path)], check=True)
    entries = list(Framer(1316).feed(path.read_bytes()))
    found = [sync for _, sync in _sync_points(entries)]
    assert len(found) == 6 and found == sorted(set(found))
    for sync in found[1:]:
        rest = tmp_path / "rest.ts"
        rest.write_bytes(b"".join(entries[sync:]))
        argv = ["ffmpeg", "-v", "error", "-xerror", "-i", str(rest), "-f", "null", "-"]
        done = subprocess.run(argv, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
