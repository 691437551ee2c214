# SPDX-License-Identifier: Apache-2.0
"""The `user` engine: one-to-many in this process, without a kernel module.

The price of fan-out is per send. So sinks that have got the same entries form a *herd*: a herd has one position for all, and
its turn is one call (`fanout.py`) that gives every socket the same buffers. Nothing is done per sink unless it does not take
everything; then it leaves the herd as a *straggler*, with a cursor of its own, is woken when its socket has room, and comes
back when it has caught up. Counting works the same way: the herd counts, and a sink remembers what the herd had counted when
it came.

A turn gives at most one send's worth to each sink, and goes in quanta (`schedule.py`). During a turn a herd does not change:
who comes or falls behind meanwhile is sorted in at its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import select
import socket
from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol, cast

from guest_agent.handoff import kernel
from hypervisor_svc import fanout
from hypervisor_svc.mpegts import Framer, SyncPoints
from hypervisor_svc.ring import Join, OnLag, Payload, Ring, Skip, Slice, catch_up
from hypervisor_svc.schedule import Schedule
from hypervisor_svc.splice import (
    Counts,
    FileSource,
    Framing,
    Left,
    OnLeft,
    Parting,
    SessionOptions,
    SessionStatus,
    SinkOptions,
    SinkState,
    SinkStatus,
    Source,
)

QUANTUM = 256
"""Sinks of one quantum: about a millisecond."""
TURN_BYTES = 1 << 17
"""What a sink gets in one turn at most; so many bytes do not wait for the latency budget either."""
RECEIVE_BYTES = 1 << 16
RECEIVES = 16
"""Receives from a source between two turns of its sinks."""
SOURCE_BUFFER = 4 << 20
"""Bytes of datagrams that may wait in the source's socket."""
POLL_INTERVAL = 0.01
"""Seconds between two looks at a file that grows; nobody tells a file system's other side when it has."""
SWEEP_INTERVAL = 0.25
_PAGE = os.sysconf("SC_PAGE_SIZE")
_WAIT = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})
_NO_BURST = frozenset({errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP})
"""What a send with UDP_SEGMENT says on a path that cannot: too small an MTU, no checksum offload."""
_SO_BUF_LOCK, _SO_MEMINFO = 72, 55
_UNREACHABLE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EMSGSIZE, errno.EPERM})


class UserEngine:
    """Sessions in the running event loop."""

    name = "user"

    def __init__(self, schedule: Schedule, *, why: str = "the kernel module omss is not loaded") -> None:
        self.why = why
        self.schedule = schedule
        self.loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._watched: dict[int, _Watched] = {}
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

    def watch(self, fd: int, watched: _Watched, events: int) -> None:
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


class _Watched(Protocol):
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
        self.ring = Ring(options.ring_entries, all_sync=options.framing is Framing.RAW)
        self.due = 0
        self.ended = False
        self.gone = Counts()
        self.stragglers: set[_Sink] = set()
        self.waiting: set[_Sink] = set()
        self._on_end = on_end
        self._groups: dict[Hashable, _Group] = {}
        self._sinks: dict[int, _Sink] = {}
        self._numbers = itertools.count(1)
        self._bytes_in = 0
        self._closed = False
        self._syncs = SyncPoints() if options.framing is Framing.MPEGTS else None
        self._budget: asyncio.TimerHandle | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._source = _open_source(source, self)

    # The source's side.

    def take(self, payloads: Iterator[Payload] | Sequence[Payload]) -> None:
        """New entries; the sinks get them within the latency budget."""
        for payload in payloads:
            sequence = self.ring.append(payload)
            self._bytes_in += len(payload)
            if self._syncs is not None:
                self._look_for_sync(sequence, payload)
        if self.options.budget_ms == 0 or self._pending() >= TURN_BYTES:
            self.flush()
        elif self._budget is None and self.due < self.ring.head:
            self._budget = self.engine.loop.call_later(self.options.budget_ms / 1000, self.flush)

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
        self.due = self.ring.head
        for group in self._groups.values():
            group.go_on()

    def end(self, reason: str) -> None:
        """See `splice.Session`."""
        if self.ended:
            return
        self.ended = True
        self._source.close()
        self.flush()
        for sink in list(self.waiting):
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
        sink = _Sink(next(self._numbers), sock, options, on_left, self)
        self._sinks[sink.number] = sink
        if kind is _Streams:
            self.engine.watch(sink.fd, sink, select.EPOLLOUT)
        self.group(sink, kind).admit(sink)
        if self._sweep is None:
            self._sweep = self.engine.loop.call_later(SWEEP_INTERVAL, self._sweep_stragglers)
        return sink.number

    def group(self, sink: _Sink, kind: type[_Group]) -> _Group:
        """Where the sink belongs."""
        options = sink.options
        key = (kind, options.priority, options.on_lag, options.lag_soft)
        if key not in self._groups:
            self._groups[key] = kind(self, options)
        sink.group = self._groups[key]
        return sink.group

    def remove_sink(self, sink: int) -> Parting:
        """See `splice.Session`."""
        found = self._sinks[sink]
        found.group.settle()
        if sink not in self._sinks:
            raise KeyError(sink)  # that turn showed that it is dead; its owner was told
        unsent = found.finish_entry()
        cursor = found.cursor_now()
        self._forget(found)
        return Parting(cursor, unsent, found.counts)

    def leave(self, sink: _Sink, why: Left, number: int = 0) -> None:
        """By itself; harmless if it has left already."""
        if sink.number not in self._sinks:
            return
        sink.count_lost_until(self.ring.head)
        cursor = sink.cursor_now()
        self._forget(sink)
        sink.on_left(sink.number, why, number, Parting(cursor, 0, sink.counts))

    def _forget(self, sink: _Sink) -> None:
        del self._sinks[sink.number]
        self.engine.unwatch(sink.fd)
        self.engine.schedule.remove(sink)
        sink.group.dismiss(sink)
        self.stragglers.discard(sink)
        self.waiting.discard(sink)
        self.gone.add(sink.counts)

    def ahead(self, group: _Group) -> list[_Sink]:
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
            entries_in=self.ring.head,
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


class _Group:
    """Sinks that are treated alike: a herd at `position`, and its stragglers. A `schedule.Task`."""

    def __init__(self, session: UserSession, options: SinkOptions) -> None:
        self.session, self.options = session, options
        self.position = session.due
        self.soft = options.lag_soft or session.options.ring_entries
        self.counts = Counts()
        self._schedule = session.engine.schedule
        self._fds = array("i")
        self._herd: list[_Sink] = []
        self._arrivals: list[_Sink] = []
        self._misfits: dict[_Sink, int] = {}
        self._first = 0
        self._done = 0
        self._run: _Run | None = None

    @property
    def owner(self) -> Hashable:
        """See `schedule.Task`."""
        return self.session.owner

    @property
    def rank(self) -> tuple[int, int]:
        """See `schedule.Task`."""
        return self.session.level, self.options.priority

    @property
    def limit(self) -> int:
        """How far a straggler goes on by itself: there it meets the herd."""
        return self._run.end if self._run is not None else self.position

    # Who belongs to the herd.

    def admit(self, sink: _Sink) -> None:
        """A new sink."""
        begin = sink.options.begin
        if begin is not None:
            sink.straggle(min(begin, self.session.ring.head))
        elif sink.options.join is Join.OLDEST:
            sink.straggle(self.session.ring.tail)
        elif sink.options.join is Join.NEXT_SYNC and self.session.options.framing is Framing.MPEGTS:
            sink.wait_for_sync()
        elif not self._herd and self._run is None:
            self.position = self.session.due
            self.arrive(sink)
        else:
            self.arrive(sink)

    def arrive(self, sink: _Sink) -> None:
        """It has everything up to `limit`."""
        if self._run is not None:
            self._arrivals.append(sink)
            return
        sink.cursor, sink.index = self.position, len(self._herd)
        sink.since = self.counts.copy()
        self._herd.append(sink)
        self._fds.append(sink.fd)

    def meets(self, cursor: int) -> bool:
        """Whether the herd is where one is that has come so far. One that was sent ahead waits for it, if there is one."""
        if not self._herd and self._run is None:
            self.position = max(self.position, cursor)
        return cursor == self.limit

    def dismiss(self, sink: _Sink) -> None:
        """Out of the herd, if it is there; not during a turn (`settle`)."""
        if sink in self._arrivals:
            self._arrivals.remove(sink)
        if sink.index < 0:
            return
        assert self._run is None
        last = self._herd.pop()
        fd = self._fds.pop()
        if last is not sink:
            self._herd[sink.index], self._fds[sink.index] = last, fd
            last.index = sink.index
        sink.counts.add(self.counts, sink.since)
        sink.cursor, sink.index, sink.since = self.position, -1, None

    # Its turns.

    def go_on(self) -> None:
        """Something is due."""
        if self._herd and (self._run is not None or self.position < self.session.due):
            self._schedule.add(self)

    def turn(self) -> None:
        """One quantum of a turn."""
        if self._run is None and not self._begin():
            return
        self._quantum()
        if self._run is not None:
            self._schedule.add(self)
        else:
            self.go_on()

    def settle(self) -> None:
        """End a turn that is under way."""
        while self._run is not None:
            self._quantum()

    def _begin(self) -> bool:
        if not self._herd or self.position >= self.session.due:
            return False
        skip = self._falls_behind()
        if skip is not None and not self._skip(skip):
            return False
        self._run = self.plan(self.position, self.session.due)
        self._done = 0
        self._first = (self._first + QUANTUM) % len(self._herd)  # nobody is always the last
        return True

    def _falls_behind(self) -> Skip | None:
        """The herd does so as a whole, when higher classes leave no time for it. That is no sink's fault, and none's own limit."""
        ring = self.session.ring
        if self.position >= ring.tail:
            return None
        if self.options.on_lag is OnLag.DISCONNECT:
            return Skip(None, overrun=False)
        return catch_up(ring, self.position, self.session.due, on_lag=self.options.on_lag, lag_soft=self.soft)

    def _skip(self, skip: Skip) -> bool:
        """Whether the herd goes on."""
        if skip.to is not None:
            _count_lost(self.counts, skip.to - self.position, overrun=skip.overrun)
            self.position = skip.to
            return self.position < self.session.due
        for sink in list(self._herd):
            self.dismiss(sink)
            if self.options.on_lag is OnLag.DISCONNECT:
                self.session.leave(sink, Left.LAGGED)
            else:
                sink.wait_for_sync(overrun=skip.overrun)
        return False

    def _quantum(self) -> None:
        assert self._run is not None
        size = len(self._herd)
        count = min(QUANTUM, size - self._done)
        start = (self._first + self._done) % size
        for index, result in self._run.send(self._fds, start, count):
            self._misfits[self._herd[index]] = result
        self._done += count
        if self._done >= size:
            self._end()

    def _end(self) -> None:
        run, self._run = self._run, None
        assert run is not None
        misfits, self._misfits = self._misfits, {}
        for sink in misfits:
            self.dismiss(sink)
        run.count(self.counts)
        self.position = run.end
        for sink, result in misfits.items():
            self.resolve(sink, run, result)
        arrivals, self._arrivals = self._arrivals, []
        for sink in arrivals:
            self.arrive(sink)
        for sink in self.session.ahead(self):
            self._schedule.add(sink)
        self.release_if_done()

    def release_if_done(self) -> None:
        """After the source's end, those that have everything leave."""
        if self.session.ended and self.has_everything():
            for sink in list(self._herd):
                self.session.leave(sink, Left.SOURCE_ENDED)

    def has_everything(self) -> bool:
        """Whether its herd is not behind the source."""
        return self._run is None and self.position >= self.session.due

    def plan(self, begin: int, end: int, skip: int = 0) -> _Run:
        """What each sink gets in one send: entries from `begin` on, before `end`; of the first not the bytes before `skip`."""
        raise NotImplementedError

    def resolve(self, sink: _Sink, run: _Run, result: int) -> None:
        """A sink did not take all of `run`; it is out of the herd."""
        raise NotImplementedError


class _Streams(_Group):
    """TCP sinks."""

    def plan(self, begin: int, end: int, skip: int = 0) -> _Run:
        chosen: list[Payload] = []
        size = 0
        for payload in self.session.ring.window(begin, min(end, begin + fanout.MAX_BUFFERS)):
            if chosen and size + len(payload) > TURN_BYTES:
                break
            chosen.append(payload)
            size += len(payload)
        if isinstance(chosen[0], Slice):
            return _FileRun(begin, cast("list[Slice]", chosen), self.session.source_file(), skip)
        return _StreamRun(begin, cast("list[bytes]", chosen), skip)

    def resolve(self, sink: _Sink, run: _Run, result: int) -> None:
        if result < 0 and -result not in _WAIT:
            self.session.leave(sink, Left.PEER_GONE, -result)
            return
        sink.stand_in(run, max(result, 0))
        sink.straggle(sink.cursor or 0)


class _Datagrams(_Group):
    """UDP sinks: an entry is a datagram. A run of equally long ones is one send."""

    bursts = True

    def plan(self, begin: int, end: int, skip: int = 0) -> _Run:
        payloads = [self.session.load(one) for one in self.session.ring.window(begin, min(end, begin + fanout.MAX_BURST))]
        size = len(payloads[0])
        alike = [payloads[0]]
        if self.bursts:
            room = fanout.MAX_BURST_BYTES // max(size, 1)
            for payload in payloads[1:room]:
                if len(payload) > size or len(alike[-1]) < size:
                    break
                alike.append(payload)
        if len(alike) > 1:
            return _BurstRun(begin, alike, 0)
        return _DatagramRun(begin, payloads[:1], 0)

    def resolve(self, sink: _Sink, run: _Run, result: int) -> None:
        if isinstance(run, _BurstRun) and -result in _NO_BURST:
            self.session.group(sink, _SingleDatagrams)
            sink.straggle(run.begin)
        elif -result == errno.ECONNREFUSED:  # said of an earlier one; this one was not tried
            sink.counts.refused += 1
            sink.straggle(run.begin)
        elif -result in _UNREACHABLE:
            sink.counts.unreachable += run.end - run.begin
            sink.straggle(run.end)
        elif result < 0 and -result not in _WAIT:
            self.session.leave(sink, Left.PEER_GONE, -result)
        else:
            sink.straggle(run.begin)


class _SingleDatagrams(_Datagrams):
    """Sinks on a path that takes no bursts."""

    bursts = False


class _Run:
    """What each sink of a herd gets in one turn: the entries [begin, end), from byte `skip` of the first on."""

    def __init__(self, begin: int, payloads: Sequence[Payload], skip: int) -> None:
        self.begin, self.end, self.skip = begin, begin + len(payloads), skip
        self.payloads = payloads
        self.bytes = sum(map(len, payloads)) - skip

    def send(self, fds: array[int], start: int, count: int) -> fanout.Misfits:
        """To `count` sockets."""
        raise NotImplementedError

    def count(self, counts: Counts) -> None:
        """All of it was taken."""
        counts.turns += 1
        counts.entries += len(self.payloads)
        counts.bytes += self.bytes
        self.count_bytes(counts, self.bytes)

    def count_bytes(self, counts: Counts, taken: int) -> None:
        """How they came into the socket."""
        counts.bytes_copied += taken


class _StreamRun(_Run):
    def __init__(self, begin: int, payloads: Sequence[bytes], skip: int) -> None:
        super().__init__(begin, payloads, skip)
        self._buffers: Sequence[bytes | memoryview] = [memoryview(payloads[0])[skip:], *payloads[1:]] if skip else payloads

    def send(self, fds: array[int], start: int, count: int) -> fanout.Misfits:
        return fanout.send_stream(fds, start, count, self._buffers)


class _DatagramRun(_Run):
    def send(self, fds: array[int], start: int, count: int) -> fanout.Misfits:
        return fanout.send_datagrams(fds, start, count, cast("Sequence[bytes]", self.payloads))


class _BurstRun(_Run):
    def send(self, fds: array[int], start: int, count: int) -> fanout.Misfits:
        payloads = cast("Sequence[bytes]", self.payloads)
        return fanout.send_burst(fds, start, count, payloads, len(payloads[0]))


class _FileRun(_Run):
    def __init__(self, begin: int, payloads: Sequence[Slice], file: int, skip: int) -> None:
        super().__init__(begin, payloads, skip)
        self._file, self._offset = file, payloads[0].offset + skip

    def send(self, fds: array[int], start: int, count: int) -> fanout.Misfits:
        return fanout.send_file(fds, start, count, self._file, self._offset, self.bytes)

    def count_bytes(self, counts: Counts, taken: int) -> None:
        counts.pages_referenced += (self._offset % _PAGE + taken + _PAGE - 1) // _PAGE


class _Sink:
    """One sink. In the herd (`index` >= 0) the group knows where it stands; else `cursor` and `offset` do, and `partial` keeps
    the entry that it is in the middle of, whatever becomes of it in the ring. A `schedule.Task` while it straggles."""

    __slots__ = (
        "counts",
        "cursor",
        "fd",
        "group",
        "index",
        "lost_from",
        "number",
        "offset",
        "on_left",
        "options",
        "partial",
        "progress",
        "session",
        "since",
        "sock",
    )

    def __init__(self, number: int, sock: socket.socket, options: SinkOptions, on_left: OnLeft, session: UserSession) -> None:
        self.number, self.sock, self.fd = number, sock, sock.fileno()
        self.options, self.on_left, self.session = options, on_left, session
        self.group: _Group
        self.index = -1
        self.since: Counts | None = None
        self.cursor: int | None = None
        self.offset = 0
        self.partial: Payload | None = None
        self.lost_from: tuple[int, bool] | None = None
        self.counts = Counts()
        self.progress = session.engine.loop.time()

    @property
    def owner(self) -> Hashable:
        """See `schedule.Task`."""
        return self.group.owner

    @property
    def rank(self) -> tuple[int, int]:
        """See `schedule.Task`."""
        return self.group.rank

    # Where it stands.

    def straggle(self, cursor: int) -> None:
        """Behind the herd, at `cursor`."""
        self.cursor = cursor
        self.progress = self.session.engine.loop.time()
        self.session.stragglers.add(self)
        self.session.engine.schedule.add(self)

    def wait_for_sync(self, *, overrun: bool | None = None) -> None:
        """Nothing until there is a place to begin. A new sink (`overrun` is None) loses nothing by that."""
        self.lost_from = None if overrun is None else (self.cursor or 0, overrun)
        self.cursor = None
        self.session.stragglers.discard(self)
        self.session.waiting.add(self)

    def go_on_at(self, sequence: int) -> None:
        """A sync point was found."""
        self.count_lost_until(sequence)
        self.straggle(sequence)

    def count_lost_until(self, sequence: int) -> None:
        """What passed while it waited."""
        if self.lost_from is not None:
            begin, overrun = self.lost_from
            _count_lost(self.counts, sequence - begin, overrun=overrun)
            self.lost_from = None

    def stand_in(self, run: _Run, taken: int) -> None:
        """After `taken` bytes of a run."""
        self.cursor, self.offset = run.begin, run.skip + taken
        done = 0
        for payload in run.payloads:
            if self.offset < len(payload):
                break
            self.offset -= len(payload)
            done += 1
        self.cursor += done
        self.partial = run.payloads[done] if self.offset else None
        self.counts.bytes += taken
        self.counts.entries += done
        self.counts.turns += 1 if taken else 0
        run.count_bytes(self.counts, taken)
        if taken:
            self.progress = self.session.engine.loop.time()

    def cursor_now(self) -> int | None:
        """The entry that it gets next, or is in the middle of."""
        return self.group.position if self.index >= 0 else self.cursor

    # Turns of a straggler.

    def event(self, events: int) -> None:
        """Its socket has room, or died."""
        if events & (select.EPOLLERR | select.EPOLLHUP):
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if self.sock.type == socket.SOCK_DGRAM:
                self.counts.refused += 1
            elif error or events & select.EPOLLHUP:
                self.group.settle()
                self.session.leave(self, Left.PEER_GONE, error or errno.ECONNRESET)
                return
        if self in self.session.stragglers:
            self.session.engine.schedule.add(self)

    def turn(self) -> None:
        """One send's worth."""
        if self not in self.session.stragglers or self.cursor is None:
            return
        if (not self.offset or self.options.on_lag is OnLag.DISCONNECT) and not self._may_go_on():
            return
        if not self.offset and self.cursor >= self.group.limit:
            self._caught_up()
            return
        if self.partial is not None and self.cursor < self.session.ring.tail:
            self._send(self._rest_of_entry())
        else:
            self._send(self.group.plan(self.cursor, self.group.limit, self.offset))

    def _rest_of_entry(self) -> _Run:
        assert self.cursor is not None and self.partial is not None
        if isinstance(self.partial, Slice):
            return _FileRun(self.cursor, [self.partial], self.session.source_file(), self.offset)
        return _StreamRun(self.cursor, [self.partial], self.offset)

    def _send(self, run: _Run) -> None:
        misfits = run.send(array("i", [self.fd]), 0, 1)
        if misfits:
            self._not_all(run, misfits[0][1])
            return
        run.count(self.counts)
        self.cursor, self.offset, self.partial = run.end, 0, None
        self.progress = self.session.engine.loop.time()
        self.session.engine.schedule.add(self)

    def _not_all(self, run: _Run, result: int) -> None:
        if isinstance(self.group, _Streams):
            if result < 0 and -result not in _WAIT:
                self.session.leave(self, Left.PEER_GONE, -result)
                return
            self.stand_in(run, max(result, 0))
            if result > 0:
                self.session.engine.schedule.add(self)  # ask until it says EAGAIN: only then is there an event
        elif -result in _WAIT:
            self.session.engine.watch(self.fd, self, select.EPOLLOUT)
        else:
            self.session.stragglers.discard(self)
            self.group.resolve(self, run, result)

    def _caught_up(self) -> None:
        group = self.group
        if self.session.ended and group.has_everything():
            self.session.leave(self, Left.SOURCE_ENDED)
        elif group.meets(cast(int, self.cursor)):
            self.session.stragglers.discard(self)
            if not isinstance(group, _Streams):
                self.session.engine.unwatch(self.fd)
            group.arrive(self)
            group.go_on()

    def _may_go_on(self) -> bool:
        """Has it fallen too far behind? Asked at an entry's end, for there it may skip; anywhere, if it is to be disconnected."""
        assert self.cursor is not None
        ring = self.session.ring
        if self.options.on_lag is OnLag.DISCONNECT:
            if self.cursor >= ring.tail and self.group.limit - self.cursor <= self.group.soft:
                return True
            self.session.leave(self, Left.LAGGED)
            return False
        skip = catch_up(ring, self.cursor, self.group.limit, on_lag=self.options.on_lag, lag_soft=self.group.soft)
        if skip is None:
            return True
        if skip.to is None:
            self.wait_for_sync(overrun=skip.overrun)
            return False
        _count_lost(self.counts, skip.to - self.cursor, overrun=skip.overrun)
        self.cursor = skip.to
        return True

    def check_limits(self, now: float) -> None:
        """Of one that may never be woken again."""
        hard = self.options.lag_hard_ms / 1000
        if hard and now - self.progress > hard:
            self.session.leave(self, Left.LAGGED)
        else:
            self.session.engine.schedule.add(self)  # a queue below the socket may have room again: nobody tells

    def finish_entry(self) -> int:
        """Give the socket the rest of the entry that it is in the middle of, room or not: it leaves at the entry's end. The bytes
        that it did not take."""
        if not self.offset:
            return 0
        run = self._rest_of_entry()
        with _room_for(self.sock, run.bytes):
            misfits = run.send(array("i", [self.fd]), 0, 1)
        if misfits:
            return run.bytes - max(misfits[0][1], 0)
        run.count(self.counts)
        self.cursor, self.offset, self.partial = run.end, 0, None
        return 0

    # What is told.

    def counts_now(self) -> Counts:
        """With the herd's."""
        if self.index < 0:
            return self.counts
        counts = self.counts.copy()
        counts.add(self.group.counts, self.since)
        return counts

    def status(self) -> SinkStatus:
        """See `splice.SinkStatus`."""
        cursor = self.cursor_now()
        lag = self.session.ring.head - cursor if cursor is not None else 0
        state = SinkState.WAITING if cursor is None else SinkState.LIVE if self.index >= 0 else SinkState.BEHIND
        return SinkStatus(self.number, state, self.options.priority, cursor, lag, self.counts_now())


def _count_lost(counts: Counts, entries: int, *, overrun: bool) -> None:
    if overrun:
        counts.overrun += entries
    else:
        counts.lagged += entries


@contextlib.contextmanager
def _room_for(sock: socket.socket, count: int) -> Iterator[None]:
    """Let a socket take `count` bytes more than its send buffer has room for."""
    size, lock = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF), sock.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)
    sock.setsockopt(socket.SOL_SOCKET, kernel.SO_SNDBUFFORCE, size + 2 * count)  # the kernel doubles it, for its overhead
    try:
        yield
    finally:
        sock.setsockopt(socket.SOL_SOCKET, kernel.SO_SNDBUFFORCE, size // 2)
        sock.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, lock)


def _kind_of(sock: socket.socket) -> type[_Group]:
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
        return _Streams
    return _Datagrams


# Sources.


class _SourceReader:
    """Gives the session what comes. Sockets stay their owner's."""

    file = -1

    def __init__(self, session: UserSession) -> None:
        self._session = session
        self._loop = session.engine.loop

    def read(self, part: Slice) -> bytes:
        """Bytes of the source's file."""
        raise NotImplementedError

    def dropped(self) -> dict[str, int]:
        """Entries that were lost before they came here."""
        return {}

    def close(self) -> None:
        """Take no more. Idempotent."""

    def release(self) -> None:
        """The session needs nothing of it any more."""


class _SocketSource(_SourceReader):
    """A `schedule.Task`, after those of its sinks and before everything of a lower class. What has come waits in the socket until
    the sinks had their turns: so a class that has enough to do leaves nothing to lower ones, and loses nothing before they do."""

    def __init__(self, session: UserSession, sock: socket.socket) -> None:
        super().__init__(session)
        self._sock, self._engine = sock, session.engine
        self._open = True
        self._receives = min(RECEIVES, session.options.ring_entries // 2)
        sock.setblocking(False)
        self._engine.watch(sock.fileno(), self, select.EPOLLIN)

    @property
    def owner(self) -> Hashable:
        """See `schedule.Task`."""
        return self._session.owner

    @property
    def rank(self) -> tuple[int, int]:
        """See `schedule.Task`."""
        return self._session.level, -1

    def event(self, events: int) -> None:
        """Something has come, or the end."""
        self._engine.schedule.add(self)

    def turn(self) -> None:
        """See `schedule.Task`."""
        if self._open and not self._exhausted():
            self._engine.schedule.add(self)

    def _exhausted(self) -> bool:
        """Take some of what has come; whether there was no more. True too when that was the end."""
        raise NotImplementedError

    def close(self) -> None:
        if self._open:
            self._open = False
            self._engine.schedule.remove(self)
            self._engine.unwatch(self._sock.fileno())


class _StreamSource(_SocketSource):
    def __init__(self, session: UserSession, sock: socket.socket) -> None:
        options = session.options
        self._framer = Framer(options.entry_bytes) if options.framing is Framing.MPEGTS else None
        room = options.entry_bytes * options.ring_entries // 2
        self._size = min(RECEIVE_BYTES, room) if self._framer else options.entry_bytes
        super().__init__(session, sock)

    def _exhausted(self) -> bool:
        for _ in range(self._receives):
            try:
                data = self._sock.recv(self._size)
            except BlockingIOError:
                return True
            except OSError as error:
                self._session.end(f"the source's connection: {error.strerror}")
                return True
            if not data:
                rest = self._framer.flush() if self._framer else b""
                self._session.take([rest] if rest else [])
                self._session.end("the source closed its connection")
                return True
            self._session.take(self._framer.feed(data) if self._framer else [data])
        return False


class _DatagramSource(_SocketSource):
    def __init__(self, session: UserSession, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, kernel.SO_RCVBUFFORCE, SOURCE_BUFFER)
        self._before = _drops(sock)
        super().__init__(session, sock)

    def _exhausted(self) -> bool:
        came: list[Payload] = []
        exhausted = False
        for _ in range(self._receives):
            try:
                came.append(self._sock.recv(RECEIVE_BYTES))
            except BlockingIOError:
                exhausted = True
                break
            except ConnectionRefusedError:
                continue  # ICMP for something that somebody sent from here
            except OSError as error:
                self._session.end(f"the source's socket: {error.strerror}")
                return True
        if came:
            self._session.take(came)
        return exhausted

    def dropped(self) -> dict[str, int]:
        lost = _drops(self._sock) - self._before if self._sock.fileno() >= 0 else 0
        return {"not_read_in_time": lost} if lost else {}


def _drops(sock: socket.socket) -> int:
    """Datagrams that a socket had no room for (SO_MEMINFO, SK_MEMINFO_DROPS)."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36)[32:36], "little")


class _FileReader(_SourceReader):
    """Entries are parts of the file, whole pages where that is possible without waiting."""

    def __init__(self, session: UserSession, source: FileSource) -> None:
        super().__init__(session)
        self.file, self._offset = source.file, source.offset
        mpegts = session.options.framing is Framing.MPEGTS
        self._framer = Framer(session.options.entry_bytes) if mpegts else None
        self._at = source.offset
        self._timer: asyncio.TimerHandle | None = self._loop.call_soon(self._look)  # type: ignore[assignment]

    def _look(self) -> None:
        try:
            size = os.fstat(self.file).st_size
            grown = self._grown(size)
        except OSError as error:
            self._session.end(f"the source's file: {error.strerror}")
            return
        self._timer = self._loop.call_later(0 if size > self._at else POLL_INTERVAL, self._look)
        if grown:
            self._session.take(grown)

    def _grown(self, size: int) -> list[Payload]:
        if size < self._at:
            raise OSError(errno.ESTALE, "it was cut short")
        parts: list[Payload] = []
        for _ in range(RECEIVES):
            length = min(size - self._at, RECEIVE_BYTES if self._framer else self._session.options.entry_bytes)
            if not length:
                break
            parts += self._cut(Slice(self._at, length))
            self._at += length
        return parts

    def _cut(self, part: Slice) -> list[Payload]:
        if self._framer is None:
            return [part]
        parts: list[Payload] = []
        for entry in self._framer.feed(self.read(part)):
            parts.append(Slice(self._offset, len(entry)))
            self._offset += len(entry)
        return parts

    def read(self, part: Slice) -> bytes:
        return os.pread(self.file, part.length, part.offset)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def release(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def _open_source(source: Source, session: UserSession) -> _SourceReader:
    if isinstance(source, FileSource):
        return _FileReader(session, source)
    if source.type == socket.SOCK_STREAM:
        return _StreamSource(session, source)
    return _DatagramSource(session, source)
