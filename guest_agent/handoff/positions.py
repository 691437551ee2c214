# SPDX-License-Identifier: Apache-2.0
"""Where the entries of a relay are in its source. Pure.

A session numbers its entries from 0 as it cuts them, so their numbers say nothing to another session. What a sink is told when it
leaves is therefore a *position*: of a file or a ring the offset of a byte, of other sources the entry's number. With it the sink
goes on anywhere, at another host too, without a gap or a repeat, be it in the middle of an entry there."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque


class Positions:
    """Of the newest `capacity` entries; `begin`: where the first one is. `usual`: bytes of a full entry."""

    def __init__(self, capacity: int, begin: int, *, usual: int) -> None:
        self._begins: deque[int] = deque(maxlen=capacity)
        self._lengths: deque[int] = deque(maxlen=capacity)
        self._usual = usual
        self.head = 0
        """The number of the entry that comes next."""
        self.end = begin
        """The position behind the newest entry."""

    def append(self, position: int, length: int) -> None:
        """The next entry, at the end or, where something is missing, after it."""
        self._begins.append(position)
        self._lengths.append(length)
        self.end = position + length
        self.head += 1

    @property
    def tail(self) -> int:
        """The oldest entry that is known here."""
        return self.head - len(self._begins)

    def of(self, entry: int) -> int:
        """Where an entry begins; one that is not known any more is told as the oldest."""
        return self._begins[max(entry - self.tail, 0)] if entry < self.head else self.end

    def find(self, position: int) -> tuple[int, int] | None:
        """The entry that a position is in, and how many of its bytes are before it; None: it has not come yet. An entry before
        `tail` (perhaps below 0) for a position that is too old: so many entries are missing."""
        if position >= self.end:
            return (self.head, 0) if position == self.end else None
        oldest = self.of(self.tail)
        if position < oldest:
            return self.tail - -(-(oldest - position) // self._usual), 0
        index = bisect_right(self._begins, position) - 1
        into = position - self._begins[index]
        return (self.tail + index, into) if into < self._lengths[index] else (self.tail + index + 1, 0)
