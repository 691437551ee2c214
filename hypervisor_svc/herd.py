# SPDX-License-Identifier: Apache-2.0
"""Sinks of the `user` engine that are treated alike, and the herd among them: those that have got the same entries.

A herd has one position for all, and its turn is one call (`fanout.py`) that gives every socket the same buffers. Nothing is done
per sink unless it does not take everything. During a turn, which goes in quanta, a herd does not change: who comes or falls behind
meanwhile is sorted in at its end."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, cast

from hypervisor_svc import fanout
from hypervisor_svc.ring import Join, OnLag, Payload, Skip, Slice, catch_up
from hypervisor_svc.splice import Counts, Framing, Left, SinkOptions

if TYPE_CHECKING:
    from hypervisor_svc.splice_user import UserSession
    from hypervisor_svc.straggler import Sink

QUANTUM = 256
"""Sinks of one quantum: about a millisecond."""
TURN_BYTES = 1 << 17
"""What a sink gets in one turn at most; so many bytes do not wait for the latency budget either."""
WAIT = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})
"""What a socket says that has no room now."""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_NO_BURST = frozenset({errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP})
"""What a send with UDP_SEGMENT says on a path that cannot: too small an MTU, no checksum offload."""
_UNREACHABLE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EMSGSIZE, errno.EPERM})


class Group:
    """Sinks that are treated alike: a herd at `position`, and its stragglers. A `schedule.Task`."""

    def __init__(self, session: UserSession, options: SinkOptions) -> None:
        self.session, self.options = session, options
        self.position = session.due
        self.soft = options.lag_soft or session.options.ring_entries
        self.counts = Counts()
        self._schedule = session.engine.schedule
        self._fds = array("i")
        self._herd: list[Sink] = []
        self._arrivals: list[Sink] = []
        self._misfits: dict[Sink, int] = {}
        self._first = 0
        self._done = 0
        self._run: Run | None = None

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

    def admit(self, sink: Sink) -> None:
        """A new sink."""
        begin = sink.options.begin
        if begin is not None:
            self.session.begin_at(sink, begin)
        elif sink.options.join is Join.OLDEST:
            sink.straggle(self.session.ring.tail)
        elif sink.options.join is Join.NEXT_SYNC and self.session.options.framing is Framing.MPEGTS:
            sink.wait_for_sync()
        else:
            if not self._herd and self._run is None:
                self.position = self.session.due
            self.arrive(sink)

    def arrive(self, sink: Sink) -> None:
        """It has everything up to `limit`."""
        if self._run is not None:
            self._arrivals.append(sink)
            return
        sink.cursor, sink.index = self.position, len(self._herd)
        sink.since = self.counts.copy()
        self._herd.append(sink)
        self._fds.append(sink.fd)
        self.enters(sink)

    def meets(self, cursor: int) -> bool:
        """Whether the herd is where one is that has come so far. One that was sent ahead waits for it, if there is one."""
        if not self._herd and self._run is None:
            self.position = max(self.position, cursor)
        return cursor == self.limit

    def dismiss(self, sink: Sink) -> None:
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
        self.leaves(sink)
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

    def finish(self) -> None:
        """Everything that is due, at once."""
        self.settle()
        while self._begin():
            self.settle()

    def _begin(self) -> bool:
        if not self._herd or self.position >= self.session.due:
            return False
        skip = self._falls_behind()
        if skip is not None and not self._skip(skip):
            return False
        self._run = self.for_herd(self.plan(self.position, self.session.due))
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
            count_lost(self.counts, skip.to - self.position, overrun=skip.overrun)
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

    def plan(self, begin: int, end: int, skip: int = 0) -> Run:
        """What each sink gets in one send: entries from `begin` on, before `end`; of the first not the bytes before `skip`."""
        raise NotImplementedError

    def resolve(self, sink: Sink, run: Run, result: int) -> None:
        """A sink did not take all of `run`; it is out of the herd."""
        raise NotImplementedError

    def for_herd(self, run: Run) -> Run:
        """The same, in a way that is cheaper for many alike."""
        return run

    def enters(self, sink: Sink) -> None:
        """It is in the herd now."""

    def leaves(self, sink: Sink) -> None:
        """It is not any more."""


class Streams(Group):
    """TCP sinks."""

    def plan(self, begin: int, end: int, skip: int = 0) -> Run:
        chosen: list[Payload] = []
        size = 0
        for payload in self.session.ring.window(begin, min(end, begin + fanout.MAX_BUFFERS)):
            if chosen and size + len(payload) > TURN_BYTES:
                break
            chosen.append(payload)
            size += len(payload)
        if isinstance(chosen[0], Slice):
            return FileRun(begin, cast("list[Slice]", chosen), self.session.source_file(), skip)
        return StreamRun(begin, cast("list[bytes]", chosen), skip)

    def resolve(self, sink: Sink, run: Run, result: int) -> None:
        if result < 0 and -result not in WAIT:
            self.session.leave(sink, Left.PEER_GONE, -result)
            return
        sink.stand_in(run, max(result, 0))
        sink.straggle(sink.cursor or 0)


class Datagrams(Group):
    """UDP sinks: an entry is a datagram. A run of equally long ones is one send. What length that is each send can say; where it
    stays the same the herd's sockets are told once (UDP_SEGMENT as a socket option, `segment`), and a send has less to say."""

    bursts = True

    def __init__(self, session: UserSession, options: SinkOptions) -> None:
        super().__init__(session, options)
        self.segment = self._seen = 0

    def for_herd(self, run: Run) -> Run:
        if isinstance(run, DatagramRun) and 0 < self.segment < run.bytes:
            return BurstRun(run.begin, run.payloads, run.skip, segment=0)
        if not isinstance(run, BurstRun):
            return run
        if self._seen == run.segment != self.segment:
            told = [fanout.set_segment(sink.sock, run.segment) for sink in self._herd]
            self.segment = run.segment if any(told) else 0  # a socket that was not is dead
        self._seen = run.segment
        return ToldRun(run) if run.segment == self.segment else run

    def enters(self, sink: Sink) -> None:
        if self.segment:
            fanout.set_segment(sink.sock, self.segment)

    def leaves(self, sink: Sink) -> None:
        if self.segment:
            fanout.set_segment(sink.sock, 0)

    def plan(self, begin: int, end: int, skip: int = 0) -> Run:
        payloads = [self.session.load(one) for one in self.session.ring.window(begin, min(end, begin + fanout.MAX_BURST))]
        if skip:
            return DatagramRun(begin, [payloads[0][skip:]], 0)
        size = len(payloads[0])
        alike = [payloads[0]]
        if self.bursts:
            room = fanout.MAX_BURST_BYTES // max(size, 1)
            for payload in payloads[1:room]:
                if len(payload) > size or len(alike[-1]) < size:
                    break
                alike.append(payload)
        if len(alike) > 1:
            return BurstRun(begin, alike, 0, segment=size)
        return DatagramRun(begin, payloads[:1], 0)

    def resolve(self, sink: Sink, run: Run, result: int) -> None:
        if isinstance(run, BurstRun | ToldRun) and -result in _NO_BURST:
            self.session.group(sink, SingleDatagrams)
            sink.straggle(run.begin)
        elif -result == errno.ECONNREFUSED:  # said of an earlier one; this one was not tried
            sink.counts.refused += 1
            sink.straggle(run.begin)
        elif -result in _UNREACHABLE:
            sink.pass_over(run)
        elif result < 0 and -result not in WAIT:
            self.session.leave(sink, Left.PEER_GONE, -result)
        else:
            sink.straggle(run.begin)


class SingleDatagrams(Datagrams):
    """Sinks on a path that takes no bursts."""

    bursts = False


class Run:
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


class StreamRun(Run):
    def __init__(self, begin: int, payloads: Sequence[bytes], skip: int) -> None:
        super().__init__(begin, payloads, skip)
        self._buffers: Sequence[bytes | memoryview] = [memoryview(payloads[0])[skip:], *payloads[1:]] if skip else payloads

    def send(self, fds: array[int], start: int, count: int) -> fanout.Misfits:
        return fanout.send_stream(fds, start, count, self._buffers)


class DatagramRun(Run):
    def send(self, fds: array[int], start: int, count: int) -> fanout.Misfits:
        return fanout.send_datagrams(fds, start, count, cast("Sequence[bytes]", self.payloads))


class BurstRun(Run):
    """`segment`: bytes of a datagram; 0: it is one."""

    def __init__(self, begin: int, payloads: Sequence[Payload], skip: int, *, segment: int) -> None:
        super().__init__(begin, payloads, skip)
        self.segment = segment

    def send(self, fds: array[int], start: int, count: int) -> fanout.Misfits:
        return fanout.send_burst(fds, start, count, cast("Sequence[bytes]", self.payloads), self.segment)


class ToldRun(Run):
    """A burst to sockets that know the datagrams' length."""

    def __init__(self, burst: BurstRun) -> None:
        super().__init__(burst.begin, burst.payloads, 0)
        self._joined = [b"".join(cast("Sequence[bytes]", burst.payloads))]

    def send(self, fds: array[int], start: int, count: int) -> fanout.Misfits:
        return fanout.send_stream(fds, start, count, self._joined)


class FileRun(Run):
    def __init__(self, begin: int, payloads: Sequence[Slice], file: int, skip: int) -> None:
        super().__init__(begin, payloads, skip)
        self._file, self._offset = file, payloads[0].offset + skip

    def send(self, fds: array[int], start: int, count: int) -> fanout.Misfits:
        return fanout.send_file(fds, start, count, self._file, self._offset, self.bytes)

    def count_bytes(self, counts: Counts, taken: int) -> None:
        counts.pages_referenced += (self._offset % _PAGE + taken + _PAGE - 1) // _PAGE


def count_lost(counts: Counts, entries: int, *, overrun: bool) -> None:
    if overrun:
        counts.overrun += entries
    else:
        counts.lagged += entries
