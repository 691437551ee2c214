# SPDX-License-Identifier: Apache-2.0
"""Positions against a plain list of bytes, some of which are missing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guest_agent.handoff.positions import Positions

ENTRIES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=40)
"""Bytes that are missing before each entry, and its length."""


@given(capacity=st.integers(2, 12), begin=st.integers(0, 50), entries=ENTRIES, position=st.integers(0, 400))
def test_a_position_is_in_one_entry(capacity: int, begin: int, entries: list[tuple[int, int]], position: int) -> None:
    positions, where, at = Positions(capacity, begin, usual=4), [], begin
    for missing, length in entries:
        at += missing
        positions.append(at, length)
        where.append((at, length))
        at += length
    tail = max(len(entries) - capacity, 0)
    assert (positions.tail, positions.head, positions.end) == (tail, len(entries), at)
    oldest = where[tail][0] if entries else at
    for entry in range(len(entries) + 1):
        known = max(entry, tail)
        assert positions.of(entry) == (where[known][0] if known < len(entries) else at)
    found = positions.find(position)
    if position > at:
        assert found is None
    elif position < oldest:
        assert found == (tail - (oldest - position + 3) // 4, 0)
    else:
        assert found is not None
        entry, into = found
        behind = [number for number, (first, length) in enumerate(where) if first + length > position]
        assert entry == (behind[0] if behind else len(entries))
        assert into == (max(position - where[entry][0], 0) if behind else 0)


def test_what_a_sink_is_told_is_where_it_goes_on() -> None:
    positions = Positions(8, 1000, usual=100)
    for length in (10, 20, 30):
        positions.append(positions.end, length)
    for entry in range(4):
        assert positions.find(positions.of(entry)) == (entry, 0)
    assert positions.find(1015) == (1, 5)
    assert positions.find(1061) is None
    assert positions.find(850) == (-2, 0)
