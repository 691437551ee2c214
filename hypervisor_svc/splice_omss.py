# SPDX-License-Identifier: Apache-2.0
"""The `omss` engine: the kernel module does it (`host_module/omss/`), this process only says who belongs to what.

The module tells nobody when something happens, so this asks: a socket that died says so in the epoll; whether the source has
ended, and whether a sink was disconnected for its lag, is looked up a few times a second. The bytes never wait for that."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass

from hypervisor_svc import omss
from hypervisor_svc.ring import OnLag
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

LOOK_INTERVAL = 0.1
"""Seconds between two looks at a session."""
HALT_TRIES = 50


class OmssEngine:
    """Sessions in the kernel."""

    name = "omss"

    def __init__(self) -> None:
        """Raises OSError: the module is not loaded, or another version."""
        self._door = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            told = omss.hello(self._door)
        except OSError:
            self._door.close()
            raise
        self.why = f"the kernel module omss (version {told.version}, {told.workers} workers) is loaded"
        self.loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._sinks: dict[int, tuple[OmssSession, int]] = {}
        self.loop.add_reader(self._epoll, self._events)

    def close(self) -> None:
        """After the last session."""
        self.loop.remove_reader(self._epoll)
        self._epoll.close()
        self._door.close()

    def begin(
        self, source: Source, options: SessionOptions, *, owner: object, level: int, on_end: Callable[[str], None]
    ) -> OmssSession:
        """See `splice.Engine`; sockets only."""
        if isinstance(source, FileSource):
            raise ValueError("a file is served from the page cache, by the user engine")
        return OmssSession(self, source, options, level=level, on_end=on_end)

    def watch(self, session: OmssSession, sink: int, sock: socket.socket) -> None:
        """Tell the session when a sink's connection died. What ICMP says of a UDP sink the module hears itself."""
        self._sinks[sock.fileno()] = session, sink
        self._epoll.register(sock.fileno(), select.EPOLLET)

    def unwatch(self, sock: socket.socket) -> None:
        """The opposite."""
        if self._sinks.pop(sock.fileno(), None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(sock.fileno())

    def _events(self) -> None:
        for fd, _ in self._epoll.poll(0, 512):
            found = self._sinks.get(fd)
            if found is not None:
                found[0].look_at(found[1])


@dataclass(eq=False)
class _Member:
    """A sink of ours. `missed`: entries that passed while its VM moved."""

    sock: socket.socket
    options: SinkOptions
    on_left: OnLeft
    missed: int = 0


class OmssSession:
    """See `splice.Session`."""

    def __init__(
        self, engine: OmssEngine, source: socket.socket, options: SessionOptions, *, level: int, on_end: Callable[[str], None]
    ) -> None:
        self._engine, self._source, self._level, self._on_end = engine, source, level, on_end
        self._first, self._by_packets = options.first, options.framing is Framing.MPEGTS
        self._members: dict[int, _Member] = {}
        self._closed = self._ended = False
        self._last: SessionStatus | None = None
        self._id = omss.set_source(
            source,
            framing=omss.Framing[options.framing.name],
            ring=options.ring_entries,
            entry=options.entry_bytes,
            latency=options.budget_ms,
            service_class=self._class(2),
            max_sinks=options.max_sinks,
        )
        self._timer = engine.loop.call_later(LOOK_INTERVAL, self._look)

    def _class(self, priority: int) -> int:
        """The VM's class, then its own priorities."""
        return min(self._level * 3 + priority, omss.CLASSES - 1)

    def add_sink(self, sock: socket.socket, options: SinkOptions, on_left: OnLeft) -> int:
        """See `splice.Session`."""
        if sock.type == socket.SOCK_STREAM:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        missed = max(self._first - options.begin, 0) if options.begin is not None else 0
        try:
            number = omss.add_sink(
                self._source,
                sock,
                session=self._id,
                service_class=self._class(options.priority),
                join=self._join(options, missed),
                begin=max((options.begin or 0) - self._first, 0),
                on_lag=omss.OnLag[options.on_lag.name],
                lag_soft=options.lag_soft,
                lag_hard=options.lag_hard_ms,
            )
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OverflowError(str(error)) from None
            raise ValueError(str(error)) from None
        self._members[number] = _Member(sock, options, on_left, missed)
        if sock.type == socket.SOCK_STREAM:
            self._engine.watch(self, number, sock)
        return number

    def _join(self, options: SinkOptions, missed: int) -> omss.Join:
        """Who has missed something goes on where a receiver can."""
        if options.begin is None:
            return omss.Join[options.join.name]
        return omss.Join.NEXT_SYNC if missed and self._by_packets else omss.Join.FROM

    def remove_sink(self, sink: int) -> Parting:
        """See `splice.Session`."""
        return self._part(sink, self._members.pop(sink))

    def _part(self, sink: int, member: _Member) -> Parting:
        """A sink halts, is asked once more what it got, and leaves."""
        self._engine.unwatch(member.sock)
        for _ in range(HALT_TRIES):
            try:
                omss.halt_sink(self._source, sink, session=self._id)
                break
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    break
        counts, left, cursor = Counts(), 0, None
        with contextlib.suppress(OSError):
            found = omss.sink_status(member.sock)
            counts, left = _counts(found.sent), found.left
            cursor = None if found.state is omss.SinkState.WAITING else found.cursor + self._first
        counts.overrun += member.missed
        with contextlib.suppress(OSError):
            omss.remove_sink(self._source, sink, session=self._id)
        return Parting(cursor, left, counts)

    def look_at(self, sink: int) -> None:
        """Its connection died."""
        member = self._members.get(sink)
        if member is not None:
            error = member.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._leave(sink, Left.PEER_GONE, error or errno.ECONNRESET)

    def _leave(self, sink: int, why: Left, number: int = 0) -> None:
        member = self._members.pop(sink)
        member.on_left(sink, why, number, self._part(sink, member))

    def _look(self) -> None:
        """What nobody told us."""
        self._timer = self._engine.loop.call_later(LOOK_INTERVAL, self._look)
        with contextlib.suppress(OSError):
            now = omss.status(self._source, self._id)
            draining = now.state is not omss.State.RUNNING
            if draining or any(m.options.lag_hard_ms or m.options.on_lag is OnLag.DISCONNECT for m in self._members.values()):
                self._look_at_all(draining=draining)
            if draining and not self._ended:
                self._ended = True
                self._on_end("the source closed its connection")

    def _look_at_all(self, *, draining: bool) -> None:
        for found in omss.sinks(self._source, self._id):
            if found.id not in self._members:
                continue
            if found.state is omss.SinkState.DISCONNECTED:
                self._leave(found.id, Left.LAGGED)
            elif found.state is omss.SinkState.FAILED:
                self._leave(found.id, Left.PEER_GONE, found.error)
            elif draining and not found.left and (not found.lag or found.state is omss.SinkState.WAITING):
                self._leave(found.id, Left.SOURCE_ENDED)

    def halt(self) -> None:
        """See `splice.Session`. The module reads on until the end."""

    def standing(self) -> tuple[int, bytes]:
        """See `splice.Session`. What the module has of the next entry is lost."""
        return self.status().head, b""

    def end(self, reason: str) -> None:
        """See `splice.Session`. The source leaves with the session: what is in the ring is lost to those who are behind."""
        if self._ended:
            return
        self._ended = True
        for sink in list(self._members):
            self._leave(sink, Left.SOURCE_ENDED)
        self._last = self.status()
        self._stop()
        self._on_end(reason)

    def status(self) -> SessionStatus:
        """See `splice.Session`."""
        try:
            now = omss.status(self._source, self._id)
        except OSError:
            if self._last is not None:
                return self._last
            return SessionStatus("omss", True, 0, 0, 0, 0, Counts())
        lost = {"memory": now.dropped.memory, "framing": now.dropped.framing, "size": now.dropped.size}
        dropped = {reason: count for reason, count in lost.items() if count}
        sinks = len(self._members)
        sent = _counts(now.sent)
        head, tail = now.head + self._first, now.tail + self._first
        return SessionStatus("omss", self._ended, head, tail, sinks, now.received, sent, dropped)

    def sinks(self) -> list[SinkStatus]:
        """See `splice.Session`."""
        with contextlib.suppress(OSError):
            found = omss.sinks(self._source, self._id)
            return [_status(one, self._members[one.id], self._first) for one in found if one.id in self._members]
        return []

    def close(self) -> None:
        """See `splice.Session`."""
        if self._closed:
            return
        self._ended = True
        while self._members:
            self._part(*self._members.popitem())
        self._stop()

    def _stop(self) -> None:
        self._closed = True
        self._timer.cancel()
        with contextlib.suppress(OSError):
            omss.end(self._source, self._id)


def _counts(sent: omss.Counters) -> Counts:
    drops = sent.drops
    return Counts(
        bytes=sent.bytes,
        entries=sent.entries,
        turns=sent.sends,
        pages_referenced=sent.pages,
        bytes_copied=sent.copied,
        overrun=drops.overrun,
        lagged=drops.lag,
        unreachable=drops.error,
        refused=drops.refused,
    )


def _status(found: omss.SinkStatus, member: _Member, first: int) -> SinkStatus:
    waiting = found.state is omss.SinkState.WAITING
    behind = found.blocked or found.left
    state = SinkState.WAITING if waiting else SinkState.BEHIND if behind else SinkState.LIVE
    cursor = None if waiting else found.cursor + first
    counts = _counts(found.sent)
    counts.overrun += member.missed
    return SinkStatus(found.id, state, member.options.priority, cursor, found.lag, counts)
