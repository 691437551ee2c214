# SPDX-License-Identifier: Apache-2.0
"""The `user` engine: one-to-many in this process, without a kernel module.

The price of fan-out is per send. So sinks that have got the same entries form a *herd* (`herd.py`) whose turn is one call; who does
not take everything leaves it as a *straggler* (`straggler.py`) until it has caught up. Counting works the same way: the herd
counts, and a sink remembers what the herd had counted when it came. Entries come from `splice_source.py` or `splice_file.py` and
are kept in a ring (`ring.py`); `schedule.py` says whose turn it is."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import select
import socket
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol

from hypervisor_svc.herd import TURN_BYTES, Datagrams, Group, Streams
from hypervisor_svc.mpegts import SyncPoints
from hypervisor_svc.ring import Payload, Ring
from hypervisor_svc.schedule import Schedule
from hypervisor_svc.splice import (
    Counts,
    FileSource,
    Framing,
    Left,
    OnLeft,
    Parting,
    RingSource,
    SessionOptions,
    SessionStatus,
    SinkOptions,
    SinkStatus,
    Source,
)
from hypervisor_svc.splice_file import FileReader, RingFileReader
from hypervisor_svc.splice_source import DatagramSource, SourceReader, StreamSource
from hypervisor_svc.straggler import Sink

SWEEP_INTERVAL = 0.25
CALM_BYTES = TURN_BYTES // 4
"""A source that brought no more within one latency budget may rest in the next."""


class UserEngine:
    """Sessions in the running event loop."""

    name = "user"

    def __init__(self, schedule: Schedule, *, why: str = "the kernel module omss is not loaded") -> None:
        self.why = why
        self.schedule = schedule
        self.loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._watched: dict[int, Watched] = {}
        self.loop.add_reader(self._epoll, self._events)

    def close(self) -> None:
        """After the last session."""
        self.loop.remove_reader(self._epoll)
        self._epoll.close()

    def begin(
        self, source: Source, options: SessionOptions, *, owner: object, level: int, on_end: Callable[[str], None]
    ) -> UserSession:
        """See `splice.Engine`."""
        return UserSession(self, source, options, owner=owner, level=level, on_end=on_end)

    def watch(self, fd: int, watched: Watched, events: int) -> None:
        """Tell a source that something has come, a sink that its socket has room, or is dead. A UDP socket has room after each
        datagram, and says so every time: only one that had none is watched."""
        if fd not in self._watched:
            self._watched[fd] = watched
            self._epoll.register(fd, events | select.EPOLLET)

    def unwatch(self, fd: int) -> None:
        """The opposite."""
        if self._watched.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def _events(self) -> None:
        for fd, events in self._epoll.poll(0, 512):
            watched = self._watched.get(fd)
            if watched is not None:
                watched.event(events)


class Watched(Protocol):
    """Has a socket in the engine's epoll."""

    def event(self, events: int) -> None: ...


class UserSession:
    """See `splice.Session`."""

    def __init__(
        self,
        engine: UserEngine,
        source: Source,
        options: SessionOptions,
        *,
        owner: object,
        level: int,
        on_end: Callable[[str], None],
    ) -> None:
        self.engine, self.options, self.owner, self.level = engine, options, owner, level
        first = 0 if isinstance(source, FileSource) else options.first
        self.ring = Ring(options.ring_entries, all_sync=options.framing is Framing.RAW, first=first)
        self.due = self._first = first
        self.ended = False
        self.gone = Counts()
        self.stragglers: set[Sink] = set()
        self.waiting: set[Sink] = set()
        self.early: dict[Sink, int] = {}
        self._on_end = on_end
        self._groups: dict[Hashable, Group] = {}
        self._sinks: dict[int, Sink] = {}
        self._numbers = itertools.count(1)
        self._bytes_in = self._flushed = 0
        self._calm = False
        self._closed = False
        self._syncs = SyncPoints() if options.framing is Framing.MPEGTS else None
        self._budget: asyncio.TimerHandle | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._source = _reader(source, self)

    # The source's side.

    def take(self, payloads: Iterator[Payload] | Sequence[Payload]) -> None:
        """New entries; the sinks get them within the latency budget."""
        for payload in payloads:
            sequence = self.ring.append(payload)
            self._bytes_in += len(payload)
            if self._syncs is not None:
                self._look_for_sync(sequence, payload)
        for sink, position in list(self.early.items()):
            self.begin_at(sink, position)
        if self.options.budget_ms == 0 or self._pending() >= TURN_BYTES:
            self.flush()
        elif self._budget is None and self.due < self.ring.head:
            self._budget = self.engine.loop.call_later(self.options.budget_ms / 1000, self._budget_over)
            if self._calm:
                self._source.rest()  # to be woken for each entry costs more than to send it

    def _budget_over(self) -> None:
        self._source.catch_up()
        self.flush()

    def _pending(self) -> int:
        """Bytes that are not due yet; an estimate suffices."""
        fresh = self.ring.head - self.due
        stored = self.ring.head - self.ring.tail
        return self.ring.bytes * fresh // stored if stored else 0

    def _look_for_sync(self, sequence: int, payload: Payload) -> None:
        assert self._syncs is not None
        data = payload if isinstance(payload, bytes) else self._source.read(payload)
        found = self._syncs.look(sequence, data)
        if found is None:
            return
        self.ring.mark_sync(found)
        for sink in self.waiting:
            sink.go_on_at(found)
        self.waiting.clear()

    def flush(self) -> None:
        """Everything that is here is due now."""
        if self._budget is not None:
            self._budget.cancel()
            self._budget = None
        self._calm = self._bytes_in - self._flushed < CALM_BYTES
        self._flushed = self._bytes_in
        self.due = self.ring.head
        for group in self._groups.values():
            group.go_on()

    def halt(self) -> None:
        """See `splice.Session`."""
        self._source.close()
        self.flush()
        for group in self._groups.values():
            group.finish()

    def standing(self) -> tuple[int, bytes]:
        """See `splice.Session`."""
        return self._source.position(self.ring.head), self._source.begun

    def end(self, reason: str) -> None:
        """See `splice.Session`."""
        if self.ended:
            return
        self.ended = True
        self._source.close()
        self.flush()
        for sink in [*self.waiting, *self.early]:
            self.leave(sink, Left.SOURCE_ENDED)
        for group in self._groups.values():
            group.release_if_done()
        self._on_end(reason)

    # The sinks' side.

    def add_sink(self, sock: socket.socket, options: SinkOptions, on_left: OnLeft) -> int:
        """See `splice.Session`."""
        kind = _kind_of(sock)
        if len(self._sinks) >= self.options.max_sinks:
            raise OverflowError(f"the relay has {len(self._sinks)} sinks")
        if self.ended:
            raise ValueError("the relay's source has ended")
        sink = Sink(next(self._numbers), sock, options, on_left, self)
        self._sinks[sink.number] = sink
        if kind is Streams:
            self.engine.watch(sink.fd, sink, select.EPOLLOUT)
        self.group(sink, kind).admit(sink)
        if self._sweep is None:
            self._sweep = self.engine.loop.call_later(SWEEP_INTERVAL, self._sweep_stragglers)
        return sink.number

    def group(self, sink: Sink, kind: type[Group]) -> Group:
        """Where the sink belongs."""
        options = sink.options
        key = (kind, options.priority, options.on_lag, options.lag_soft)
        if key not in self._groups:
            self._groups[key] = kind(self, options)
        sink.group = self._groups[key]
        return sink.group

    def begin_at(self, sink: Sink, position: int) -> None:
        """It goes on where it once left, as soon as the source has come so far."""
        found = self._source.find(position)
        if found is None:
            self.early[sink] = position
        else:
            self.early.pop(sink, None)
            if found[0] < self._first and self._syncs is not None:
                sink.cursor = found[0]
                sink.wait_for_sync(overrun=True)  # what is missing was at another host
            else:
                sink.go_on_within(*found)

    def remove_sink(self, sink: int) -> Parting:
        """See `splice.Session`."""
        found = self._sinks[sink]
        found.group.settle()
        if sink not in self._sinks:
            raise KeyError(sink)  # that turn showed that it is dead; its owner was told
        unsent = found.finish_entry()
        cursor = self._position(found)
        self._forget(found)
        return Parting(cursor, unsent, found.counts)

    def leave(self, sink: Sink, why: Left, number: int = 0) -> None:
        """By itself; harmless if it has left already."""
        if sink.number not in self._sinks:
            return
        sink.count_lost_until(self.ring.head)
        cursor = self._position(sink)
        self._forget(sink)
        sink.on_left(sink.number, why, number, Parting(cursor, 0, sink.counts))

    def _position(self, sink: Sink) -> int | None:
        """Where it would go on. What the ring does not keep any more it has lost."""
        if sink in self.early:
            return self.early[sink]
        sink.lose_what_is_gone()
        cursor = sink.cursor_now()
        return None if cursor is None else self._source.position(cursor)

    def _forget(self, sink: Sink) -> None:
        del self._sinks[sink.number]
        self.engine.unwatch(sink.fd)
        self.engine.schedule.remove(sink)
        sink.group.dismiss(sink)
        self.stragglers.discard(sink)
        self.waiting.discard(sink)
        self.early.pop(sink, None)
        self.gone.add(sink.counts)

    def ahead(self, group: Group) -> list[Sink]:
        """Stragglers that wait for their herd."""
        return [one for one in self.stragglers if one.group is group and not one.offset and (one.cursor or 0) >= group.limit]

    def _sweep_stragglers(self) -> None:
        """Those that take nothing at all are not woken by anything."""
        self._sweep = self.engine.loop.call_later(SWEEP_INTERVAL, self._sweep_stragglers) if self._sinks else None
        now = self.engine.loop.time()
        for sink in list(self.stragglers):
            sink.check_limits(now)

    def status(self) -> SessionStatus:
        """See `splice.Session`."""
        counts = self.gone.copy()
        for sink in self._sinks.values():
            counts.add(sink.counts_now())
        return SessionStatus(
            engine=self.engine.name,
            ended=self.ended,
            head=self.ring.head,
            tail=self.ring.tail,
            sinks=len(self._sinks),
            bytes_in=self._bytes_in,
            counts=counts,
            source_dropped=self._source.dropped(),
        )

    def sinks(self) -> list[SinkStatus]:
        """See `splice.Session`."""
        return [sink.status() for sink in self._sinks.values()]

    def close(self) -> None:
        """See `splice.Session`."""
        if self._closed:
            return
        self._closed = self.ended = True
        self._source.close()
        for timer in (self._budget, self._sweep):
            if timer is not None:
                timer.cancel()
        for group in self._groups.values():
            group.settle()
            self.engine.schedule.remove(group)
        for sink in list(self._sinks.values()):
            self._forget(sink)
        self._source.release()

    def source_file(self) -> int:
        """The descriptor that `Slice`s refer to."""
        return self._source.file

    def load(self, payload: Payload) -> bytes:
        """An entry's bytes."""
        return payload if isinstance(payload, bytes) else self._source.read(payload)


def _reader(source: Source, session: UserSession) -> SourceReader:
    if isinstance(source, RingSource):
        return RingFileReader(session, source)
    if isinstance(source, FileSource):
        return FileReader(session, source)
    return StreamSource(session, source) if source.type == socket.SOCK_STREAM else DatagramSource(session, source)


def _kind_of(sock: socket.socket) -> type[Group]:
    """Raises ValueError for a socket that can be no sink."""
    try:
        sock.getpeername()
    except OSError as error:
        raise ValueError(f"a sink must be connected: {error.strerror}") from None
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        raise ValueError("a sink is a TCP or UDP socket")
    sock.setblocking(False)
    if sock.type == socket.SOCK_STREAM:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Streams
    return Datagrams
