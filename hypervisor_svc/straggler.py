# SPDX-License-Identifier: Apache-2.0
"""One sink of the `user` engine. In the herd its group knows where it stands; one that did not take everything is a straggler: it
has a cursor of its own, is woken when its socket has room, and comes back when it has caught up (`herd.py`)."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from array import array
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, cast

from guest_agent.handoff import kernel
from hypervisor_svc.herd import WAIT, FileRun, Group, Run, StreamRun, Streams, count_lost
from hypervisor_svc.ring import OnLag, Payload, Slice, catch_up
from hypervisor_svc.splice import Counts, Left, OnLeft, SinkOptions, SinkState, SinkStatus

if TYPE_CHECKING:
    from hypervisor_svc.splice_user import UserSession

_SO_BUF_LOCK = 72


class Sink:
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
        self.group: Group
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

    def go_on_within(self, sequence: int, offset: int) -> None:
        """From a byte of an entry on."""
        if offset:
            payload = self.session.ring[sequence]
            self.partial, self.offset = payload if isinstance(self.group, Streams) else self.session.load(payload), offset
        self.straggle(sequence)

    def lose_what_is_gone(self) -> None:
        """It leaves at an entry's end, and what is before the ring's is lost."""
        tail = self.session.ring.tail
        if self.index < 0 and not self.offset and self.cursor is not None and self.cursor < tail:
            count_lost(self.counts, tail - self.cursor, overrun=True)
            self.cursor = tail

    def count_lost_until(self, sequence: int) -> None:
        """What passed while it waited."""
        if self.lost_from is not None:
            begin, overrun = self.lost_from
            count_lost(self.counts, sequence - begin, overrun=overrun)
            self.lost_from = None

    def pass_over(self, run: Run) -> None:
        """Nothing of it reaches this sink."""
        self.counts.unreachable += run.end - run.begin
        self.offset, self.partial = 0, None
        self.straggle(run.end)

    def stand_in(self, run: Run, taken: int) -> None:
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
            self._send(self.group.plan(self.cursor, max(self.group.limit, self.cursor + 1), self.offset))

    def _rest_of_entry(self) -> Run:
        assert self.cursor is not None and self.partial is not None
        if isinstance(self.partial, Slice):
            return FileRun(self.cursor, [self.partial], self.session.source_file(), self.offset)
        return StreamRun(self.cursor, [self.partial], self.offset)

    def _send(self, run: Run) -> None:
        misfits = run.send(array("i", [self.fd]), 0, 1)
        if misfits:
            self._not_all(run, misfits[0][1])
            return
        run.count(self.counts)
        self.cursor, self.offset, self.partial = run.end, 0, None
        self.progress = self.session.engine.loop.time()
        self.session.engine.schedule.add(self)

    def _not_all(self, run: Run, result: int) -> None:
        if isinstance(self.group, Streams):
            if result < 0 and -result not in WAIT:
                self.session.leave(self, Left.PEER_GONE, -result)
                return
            self.stand_in(run, max(result, 0))
            if result > 0:
                self.session.engine.schedule.add(self)  # ask until it says EAGAIN: only then is there an event
        elif -result in WAIT:
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
            if not isinstance(group, Streams):
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
        count_lost(self.counts, skip.to - self.cursor, overrun=skip.overrun)
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
