# SPDX-License-Identifier: Apache-2.0
"""The ring of a relay's entries, and where in it a sink goes on. Pure.

Entries are numbered from 0. The ring keeps those of the window [tail, head)::

            tail                    head
        ┌────┬────┬────┬────┬────┬────┐
        │ 41 │ 42 │ 43 │ 44 │ 45 │ 46 │ ◀── append()
        └────┴────┴────┴────┴────┴────┘
          a ▲        b ▲              ▲ c      cursors of three sinks: what each gets next

Hung 2010 (section 4.2) counts for each entry the sinks that still need it, and takes one from the counts of all entries for
each slow sink when the ring is full. Here nobody counts: the window moves, and a sink whose cursor is below the tail has lost
`tail - cursor` whole entries. A new entry costs the same with one sink and with ten thousand."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from itertools import islice


class OnLag(str, Enum):
    """What becomes of a sink that is `lag_soft` entries behind."""

    HEAD_DROP = "head_drop"  # it loses what is older than that
    DROP_TO_SYNC = "drop_to_sync"  # it goes on at the newest sync point, or at the next that comes
    DISCONNECT = "disconnect"


class Join(str, Enum):
    """Where a new sink begins."""

    LATEST = "latest"  # the next entry that comes
    OLDEST = "oldest"  # everything that the ring has
    NEXT_SYNC = "next_sync"  # the next sync point that is found


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes of the source's file: they are sent from the page cache."""

    offset: int
    length: int

    def __len__(self) -> int:
        return self.length


Payload = bytes | Slice


class Ring:
    """At most `capacity` entries. Payloads that are replaced live on as long as somebody sends them. `all_sync`: receivers can
    begin at any entry, else at those that were marked. `first`: the number of the first entry."""

    def __init__(self, capacity: int, *, all_sync: bool = False, first: int = 0) -> None:
        self.capacity, self._all_sync = capacity, all_sync
        self.head = first
        self.bytes = 0
        self._entries: deque[Payload] = deque()
        self._syncs: deque[int] = deque()

    @property
    def tail(self) -> int:
        """The oldest entry that is here; `head` if none is."""
        return self.head - len(self._entries)

    def append(self, payload: Payload) -> int:
        """Its sequence number. The oldest entry goes if there is no room."""
        if len(self._entries) == self.capacity:
            self.bytes -= len(self._entries.popleft())
        self._entries.append(payload)
        self.bytes += len(payload)
        self.head += 1
        return self.head - 1

    def __getitem__(self, sequence: int) -> Payload:
        """Raises LookupError outside the window."""
        if not self.tail <= sequence < self.head:
            raise LookupError(f"entry {sequence} is outside [{self.tail}, {self.head})")
        return self._entries[sequence - self.tail]

    def window(self, begin: int, end: int) -> list[Payload]:
        """The entries [begin, end) that are here."""
        tail = self.tail
        begin, end = max(begin, tail), min(end, self.head)
        if begin >= end:
            return []
        if begin - tail > len(self._entries) // 2:  # the end of a deque is as near as its beginning
            newest = list(islice(reversed(self._entries), self.head - end, self.head - begin))
            return newest[::-1]
        return list(islice(self._entries, begin - tail, end - tail))

    def mark_sync(self, sequence: int) -> None:
        """A receiver can begin at this entry."""
        while self._syncs and self._syncs[0] < self.tail:
            self._syncs.popleft()
        self._syncs.append(sequence)

    def newest_sync(self) -> int | None:
        """The newest sync point in the window."""
        if self._all_sync:
            return self.head - 1 if self._entries else None
        return self._syncs[-1] if self._syncs and self._syncs[-1] >= self.tail else None


@dataclass(frozen=True, slots=True)
class Skip:
    """Where a sink that has fallen behind goes on (None: at the next sync point). What is before that it has lost. `overrun`: the
    ring had no room any more; else the sink's own limit."""

    to: int | None
    overrun: bool


def catch_up(ring: Ring, cursor: int, front: int, *, on_lag: OnLag, lag_soft: int) -> Skip | None:
    """What a sink at an entry boundary that stands at `cursor` must skip, where the entries before `front` are due; None: nothing.
    Not for DISCONNECT."""
    overrun = cursor < ring.tail
    if not overrun and front - cursor <= lag_soft:
        return None
    if on_lag is OnLag.HEAD_DROP:
        return Skip(max(ring.tail, front - lag_soft), overrun)
    sync = ring.newest_sync()
    if sync is not None and sync > cursor:
        return Skip(sync, overrun)
    if sync is not None and not overrun:
        return None  # it stands at the newest, or after it: nothing better is here
    return Skip(None, overrun)
