# SPDX-License-Identifier: Apache-2.0
"""One source, many sinks: what both engines are asked and what they tell. Nouns only.

`splice_user.py` does it in this process, `splice_omss.py` has the kernel module do it; `relay.py` gives them the sockets."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

from hypervisor_svc.ring import Join, OnLag

MAX_BUDGET_MS = 1000
MAX_RING_ENTRIES = 1 << 16
MAX_ENTRY_BYTES = 1 << 16
MAX_REST = 1024
"""Bytes of an entry that is not complete yet: less than a packet, mostly."""


class Framing(str, Enum):
    """Where a byte stream is cut into entries. Datagrams are entries as they are."""

    RAW = "raw"  # as it comes
    MPEGTS = "mpegts"  # whole packets, and a PAT begins an entry


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """`budget_ms`: how long an entry may wait for others, so that a sink gets several in one send. `entry_bytes`: the most that
    one entry takes of a byte stream. Of a stream that went on at another host before: `first`, the number of the entry that comes
    next, and `rest`, what had come of it. Raises ValueError."""

    framing: Framing = Framing.RAW
    ring_entries: int = 1024
    entry_bytes: int = 16384
    budget_ms: int = 0
    max_sinks: int = 65536
    first: int = 0
    rest: bytes = b""

    def __post_init__(self) -> None:
        if len(self.rest) > MAX_REST:
            raise ValueError(f"rest has {len(self.rest)} bytes, more than {MAX_REST}")
        for name, least, most in (
            ("ring_entries", 2, MAX_RING_ENTRIES),
            ("entry_bytes", 188, MAX_ENTRY_BYTES),
            ("budget_ms", 0, MAX_BUDGET_MS),
            ("max_sinks", 1, 1 << 20),
            ("first", 0, 1 << 61),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}, not from {least} to {most}")


@dataclass(frozen=True, slots=True)
class SinkOptions:
    """`priority`: index into `schedule.PRIORITIES`. `lag_soft`: entries behind at which `on_lag` acts (0: as many as the ring
    has). `lag_hard_ms`: how long a sink that is behind may take nothing before it is disconnected (0: for ever). `begin`: the
    position (`handoff/positions.py`) where it goes on, instead of what `join` says: it was a sink before. Raises ValueError."""

    priority: int = 1
    join: Join = Join.LATEST
    on_lag: OnLag = OnLag.HEAD_DROP
    lag_soft: int = 0
    lag_hard_ms: int = 0
    begin: int | None = None

    def __post_init__(self) -> None:
        for name, most in (("priority", 2), ("lag_soft", MAX_RING_ENTRIES), ("lag_hard_ms", 1 << 31)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}, not from 0 to {most}")


@dataclass(slots=True)
class Counts:
    """What a sink got since it was added. `overrun`, `lagged`: entries that it did not get, because the ring was full or because
    of its own limit, until it went on; `unreachable`: because there was no way to it; `refused`: datagrams that were sent, and
    that its host says it did not want (ICMP)."""

    bytes: int = 0
    entries: int = 0
    turns: int = 0
    pages_referenced: int = 0
    bytes_copied: int = 0
    overrun: int = 0
    lagged: int = 0
    unreachable: int = 0
    refused: int = 0

    def add(self, other: Counts, since: Counts | None = None) -> None:
        """All that `other` counted, or what it counted since it was `since`."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name) - (getattr(since, name) if since else 0))

    def copy(self) -> Counts:
        """As it is now."""
        return replace(self)

    @property
    def lost(self) -> int:
        """Entries that it did not get."""
        return self.overrun + self.lagged + self.unreachable


class SinkState(str, Enum):
    """Where a sink stands."""

    LIVE = "live"  # it has everything that was due
    BEHIND = "behind"
    WAITING = "waiting"  # for a sync point


class Left(str, Enum):
    """Why a sink left by itself."""

    PEER_GONE = "peer_gone"
    LAGGED = "lagged"
    SOURCE_ENDED = "source_ended"  # it has everything; its socket is as good as before


@dataclass(frozen=True, slots=True)
class SinkStatus:
    """`cursor`: the entry that it gets next (None: the next sync point); `lag` in entries."""

    sink: int
    state: SinkState
    priority: int
    cursor: int | None
    lag: int
    counts: Counts


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """`source_dropped`: entries that could not be stored, by reason; of a ring the bytes that were overwritten before they were
    read."""

    engine: str
    ended: bool
    head: int
    tail: int
    sinks: int
    bytes_in: int
    counts: Counts
    source_dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Parting:
    """A sink that was removed. `cursor`: the position (`handoff/positions.py`) where it would have gone on; `unsent`: bytes of the
    entry before it that its socket did not take (it had died)."""

    cursor: int | None
    unsent: int
    counts: Counts


OnLeft = Callable[[int, Left, int, Parting], None]
"""(sink, why, errno, what it got): the sink is no longer the session's; its socket is still its owner's."""


class Session(Protocol):
    """One source and its sinks."""

    def add_sink(self, sock: socket.socket, options: SinkOptions, on_left: OnLeft) -> int:
        """The sink's number. `sock`: connected TCP or UDP; it stays the caller's and open until the sink has left. Raises
        ValueError for a socket that cannot be one, OverflowError when there are too many."""

    def remove_sink(self, sink: int) -> Parting:
        """Leave at an entry's end; the socket is usable again as before. Raises KeyError."""

    def halt(self) -> None:
        """Take no more from the source, as far as that can be; the sinks get what is here, as far as their sockets take it. They
        are removed next. Idempotent."""

    def standing(self) -> tuple[int, bytes]:
        """Where the source stands: the position (`handoff/positions.py`) behind the newest entry, and what has come of the next."""

    def end(self, reason: str) -> None:
        """Take no more from the source, which is its owner's again; the sinks get what is left and leave. Idempotent."""

    def status(self) -> SessionStatus:
        """Since it began."""

    def sinks(self) -> list[SinkStatus]:
        """All, in no order."""

    def close(self) -> None:
        """The sinks leave where they stand, the source stays its owner's. Idempotent."""


@dataclass(frozen=True)
class FileSource:
    """A file that grows: `file` is a descriptor that the session owns from now on, `offset` where the first entry begins."""

    file: int
    offset: int


@dataclass(frozen=True)
class RingSource(FileSource):
    """A ring that a guest writes (`handoff/ring_file.py`); `offset` is a position in its stream, and if that is overwritten the
    first entry begins at what is there."""


Source = socket.socket | FileSource


class Engine(Protocol):
    """Something that runs sessions; `why` says why this one was chosen."""

    name: str
    why: str

    def begin(
        self, source: Source, options: SessionOptions, *, owner: object, level: int, on_end: Callable[[str], None]
    ) -> Session:
        """`owner` and `level`: whose work it is and its class (`schedule.py`). `on_end(reason)` when the source gives no more;
        its sinks still get what they have not, and leave with SOURCE_ENDED."""
