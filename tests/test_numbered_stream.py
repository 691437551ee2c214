# SPDX-License-Identifier: Apache-2.0
"""The stream proves what it is to prove, and the product finds its sync points."""

from __future__ import annotations

import random

from hypervisor_svc.mpegts import Framer, SyncPoints
from tests.numbered_stream import GROUP, GROUP_BYTES, Checker, group_at, packet_at
from tests.transport_stream import PACKET


def checked(data: bytes, *, seed: int = 1) -> Checker:
    """After pieces of random length."""
    checker, chance = Checker(), random.Random(seed)
    while data:
        count = chance.randint(1, 3 * GROUP_BYTES)
        checker.feed(data[:count])
        data = data[count:]
    return checker


def stream(first: int, groups: int) -> bytes:
    return b"".join(group_at(index) for index in range(first, first + groups))


def test_all_of_it() -> None:
    for seed in range(20):
        checker = checked(stream(7, 50)[3 * PACKET :], seed=seed)
        assert (checker.fault, checker.gaps, checker.packets) == ("", [], 50 * GROUP - 3)


def test_a_gap_that_ends_at_a_sync_point() -> None:
    checker = checked(stream(0, 2) + packet_at(2 * GROUP) + stream(9, 1))
    assert (checker.fault, checker.gaps, checker.lost) == ("", [(2 * GROUP + 1, 9 * GROUP)], 7 * GROUP - 1)


def test_faults() -> None:
    assert "no sync point" in checked(stream(0, 1) + packet_at(GROUP + 1)).fault
    assert "again" in checked(stream(3, 1) + stream(3, 1)).fault
    for at in range(0, GROUP_BYTES, 37):
        damaged = bytearray(stream(5, 2))
        damaged[at] ^= 1
        assert "no packet" in checked(bytes(damaged)).fault, at


def test_every_group_begins_with_a_sync_point() -> None:
    points, framer = SyncPoints(), Framer(65536)
    found = [points.look(sequence, entry) for sequence, entry in enumerate(framer.feed(stream(0, 10) + group_at(10)[:PACKET]))]
    assert found[:10] == list(range(10))
