# SPDX-License-Identifier: Apache-2.0
"""One source, many clients: `offload.publish`.

    relay = await offload.publish(source)            # a connection that sends, a file on the share that grows, or a ring there
    sink = await relay.add_sink(writer)              # after the client's request was answered with a header
    ending = await sink.wait()                       # it left: gone, removed, or the relay is over; the socket is back
    await relay.remove_sink(sink)                    # call it home
    await relay.close()                              # all come home

While a socket is in a relay nobody else may use it. When it is back it works on, at the end of an entry of the stream. If the
host cannot run the relay, this process does (`relay.path` is "local", `relay.reason` says why): the same calls, the same rules.
A client that the host cannot take (TLS, Multipath TCP) is served from here where the source is a file or a ring, which this
process can read too (`sink.path` is "local"). A connection's bytes are at the host alone: there such a client is refused."""

from __future__ import annotations

import asyncio
import errno
import socket
from dataclasses import replace
from typing import IO, Any

from guest_agent import offload_asyncio
from guest_agent.local_relay import Ending, LocalRelay, LocalSink
from guest_agent.offload_source import Readable, Source, Target, plan_of, prepared, unsuitable_target
from guest_agent.offload_wire import EXPLANATIONS, Message, Reply, encode_relay, new_token, next_number
from guest_agent.offload_wire import here as not_asked
from guest_agent.ring import Ring

JOINS = ("latest", "oldest", "next_sync")
LAGS = ("head_drop", "drop_to_sync", "disconnect")
STATUS_LIMIT = 5.0
MOVE_PAUSE = 0.005
"""Seconds between two looks at whether everybody is home."""
_OF_THE_RELAY = ("unknown_relay", "relay_ended", "bad_request", "duplicate")
"""Why the host refuses a sink, when this process should too."""


class Sink:
    """One client of a relay. `path`: who sends to it now, "offloaded" or "local"."""

    def __init__(self, target: Target, options: dict[str, Any]) -> None:
        self.token, self.path = "", "offloaded"
        self._target, self._options = target, options
        self._sent = 0
        self._own: socket.socket | None = None
        self._here: LocalSink | None = None
        self._over: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    @property
    def over(self) -> bool:
        """Whether it has left."""
        return self._over.done()

    async def wait(self) -> Ending:
        """Until it has left."""
        return await asyncio.shield(self._over)

    def _keep_own(self, sock: socket.socket) -> socket.socket:
        """A duplicate, for the application may close its own."""
        self._target = self._own = own = sock.dup()
        self._over.add_done_callback(lambda _: own.close())
        return own

    def _is_here(self, here: LocalSink) -> None:
        """This process sends to it."""
        self.path, self._here = "local", here
        here.over.add_done_callback(lambda done: self._leave(done.result()))

    def _leave(self, ending: Ending) -> None:
        if not self._over.done():
            self._over.set_result(replace(ending, sent=self._sent + ending.sent))


class Relay:
    """What `publish` opened. `path`: who relays, "offloaded" or "local"; `reason` and `message`: why not the host.

    When the VM leaves its host, sockets come home and wait; when it works with a host again, the relay is opened there, and its
    sinks go on where they stopped. Of that nobody sees more than a pause."""

    def __init__(self, token: str, source: Source) -> None:
        self.token, self.message = token, ""
        self.reason: str | None = None
        self.path = "offloaded"
        self._source = source
        self._local: LocalRelay | None = None
        self._beside: set[LocalRelay] = set()
        self._sinks: set[Sink] = set()
        self._waiting: dict[Sink, int | None] = {}
        self._settled = asyncio.Event()
        self._settled.set()
        self._task: asyncio.Task[None] | None = None
        self._meanwhile: LocalRelay | None = None
        self._rejoining: set[asyncio.Task[None]] = set()
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done when the source gives no more: why."""
        self.over.add_done_callback(lambda _: source.close())

    async def add_sink(
        self,
        target: Target,
        *,
        priority: str = "normal",
        join: str = "latest",
        on_lag: str = "head_drop",
        lag_soft: int = 0,
        lag_hard_ms: int = 0,
        begin: int | None = None,
    ) -> Sink:
        """Give the relay one more client: a non-blocking TCP socket, a transport or StreamWriter, or a connected UDP socket.

        `join`: latest, oldest (all that the ring has) or next_sync; `begin`: where it once left (`Ending.cursor`), instead. Of a
        file or a ring that is a position in its bytes, which holds for any relay of it; others count entries. `on_lag`:
        what happens to it when it is `lag_soft` entries behind (0: as many as the ring has): head_drop, drop_to_sync, disconnect.
        After `lag_hard_ms` in which it took nothing although there was something it is disconnected (0: never). Raises OSError
        for a socket that cannot be one, or not here (its errno and words say why), ValueError for a bad argument."""
        _one_of("join", join, JOINS)
        _one_of("on_lag", on_lag, LAGS)
        _one_of("priority", priority, ("low", "normal", "high"))
        options: dict[str, Any] = {
            "priority": priority,
            "join": join,
            "on_lag": on_lag,
            "lag_soft": lag_soft,
            "lag_hard_ms": lag_hard_ms,
            "begin": begin,
        }
        sink = Sink(target, options)
        await self._add(sink, begin)
        self._sinks.add(sink)
        sink._over.add_done_callback(lambda _: self._forget(sink))
        return sink

    def _forget(self, sink: Sink) -> None:
        self._sinks.discard(sink)
        self._waiting.pop(sink, None)

    async def _add(self, sink: Sink, begin: int | None) -> None:
        """By the host if it can, by this process if that can. Raises OSError."""
        while True:
            if self._meanwhile is not None:
                self._join_meanwhile(self._meanwhile, sink, begin)
                return
            await self._settled.wait()
            if self._local is not None:
                self._add_here(self._local, sink, begin)
                return
            try:
                if await self._hand_out(sink, begin):
                    return
            except _NotMovable as error:
                self._add_beside(sink, begin, error)
                return
            await asyncio.sleep(MOVE_PAUSE)  # the VM is about to leave; this relay will hear of it

    def _add_here(self, there: LocalRelay, sink: Sink, begin: int | None) -> None:
        sink._is_here(there.add_sink(sink._target, join=sink._options["join"], begin=begin))

    def _add_beside(self, sink: Sink, begin: int | None, error: OSError) -> None:
        readable = self._source.readable
        if readable is None or self.over.done():
            raise OSError(error.errno, f"{error.strerror}, and the relay is at the host") from None
        if begin is None and sink._options["join"] == "oldest":
            begin = readable.oldest()
        self._add_here(self._reader_beside(readable, begin), sink, begin)

    def _reader_beside(self, readable: Readable, begin: int | None) -> LocalRelay:
        """Of the same source, for clients that the host cannot take; it reads no longer than there are any."""
        for there in self._beside:
            if begin is None or there.keeps(begin):
                return there
        there = readable.relay(readable.newest() if begin is None else begin)
        there.on_idle = lambda: self._beside.discard(there)
        self._beside.add(there)
        return there

    async def _hand_out(self, sink: Sink, begin: int | None) -> bool:
        """Whether the host has it; not if the VM is leaving. Raises OSError, _NotMovable."""
        target = sink._target
        sock, resume = await prepared(target)
        udp = sock.type == socket.SOCK_DGRAM
        reason = None if udp else unsuitable_target(target, sock)
        if reason is not None:
            if resume is not None:
                resume()
            raise _NotMovable(errno.EOPNOTSUPP, EXPLANATIONS.get(reason, reason))
        if udp and isinstance(target, socket.socket) and not sink._own:
            sock = sink._keep_own(target)
        number, sink.token = next_number(), new_token()  # each stay at a host is a transfer of its own
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        options = {**sink._options, "begin": begin}
        message = encode_relay("add_udp" if udp else "add_sink", number, token=sink.token, relay=self.token, **options)
        reply = offload_asyncio.link().begin(
            number,
            sink.token,
            message,
            sock=None if udp else sock,
            fds=(sock.fileno(),),
            when_over=resume,
            on_note=lambda note: None if taken.done() else taken.set_result(None),
        )
        await asyncio.wait((reply, taken), return_when=asyncio.FIRST_COMPLETED)
        if not taken.done() and reply.result().outcome == "local":
            refusal = reply.result()
            if _moves(refusal):
                return False
            kind = OSError if refusal.reason in _OF_THE_RELAY else _NotMovable
            raise kind(refusal.errno or errno.EOPNOTSUPP, refusal.message or str(refusal.reason))
        sink.path, sink._here = "offloaded", None
        reply.add_done_callback(lambda done: self._sink_over(sink, done))
        return True

    def _sink_over(self, sink: Sink, reply: asyncio.Future[Reply]) -> None:
        error = reply.exception()
        if error is not None:
            sink._leave(Ending(0, "host_lost", str(error), None, alive=False))
            return
        said = reply.result()
        if _moves(said) and not self.over.done() and sink in self._sinks:
            sink._sent += said.sent
            self._waiting[sink] = said.cursor
            return
        sink._leave(Ending(said.sent, said.reason, said.message, said.cursor, alive=said.outcome != "failed"))

    async def remove_sink(self, sink: Sink) -> Ending:
        """Call a client home; harmless if it has left."""
        if sink in self._waiting:
            sink._leave(Ending(0, None, "", self._waiting[sink], alive=True))
        elif not sink.over:
            if sink._here is not None:
                await sink._here.relay.remove(sink._here)
            else:
                self._tell("remove_sink", token=sink.token, relay=self.token)
        return await sink.wait()

    async def status(self) -> dict[str, Any] | None:
        """What the engine counts, all sinks together (`streamlift relays` shows each); None if the host does not know the relay any
        more. Raises TimeoutError."""
        if self._local is not None:
            return self._local.status()
        number = next_number()
        told: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        link = offload_asyncio.link()
        message = encode_relay("relay_status", number, relay=self.token)

        def hear(note: Message) -> None:
            if not told.done():
                told.set_result(note)

        reply = link.begin(number, "", message, sock=None, fds=(), on_note=hear)
        done, _ = await asyncio.wait((told, reply), return_when=asyncio.FIRST_COMPLETED, timeout=STATUS_LIMIT)
        if not done:
            raise TimeoutError(f"the agent did not answer for {STATUS_LIMIT:g} s")
        if reply.done():
            reply.result()  # raises what happened to the agent
        found: dict[str, Any] | None = told.result()["relay_status"] if told.done() else None
        return {**found, "sinks_here": sum(sink.path == "local" for sink in self._sinks)} if found else None

    async def close(self) -> None:
        """All clients come home, the source too; returns when they have."""
        if self._local is not None:
            await self._local.close()
        elif self._task is not None:
            self._task.cancel()
            self._end("closed")
            if self._meanwhile is not None:
                await self._meanwhile.close()
        else:
            self._tell("close_relay", relay=self.token)
        for there in list(self._beside):
            await there.close()
        waiting: list[asyncio.Future[Any]] = [sink._over for sink in self._sinks]
        await asyncio.gather(*waiting, self.over, return_exceptions=True)

    def _end(self, why: str) -> None:
        """The source gives no more; what this process reads of it beside the host ends too."""
        if not self.over.done():
            self.over.set_result(why)
        for there in self._beside:
            there.end()
        for sink, cursor in list(self._waiting.items()):
            sink._leave(Ending(0, "relay_ended", why, cursor, alive=True))
        self._settled.set()

    def _tell(self, operation: str, **fields: object) -> None:
        offload_asyncio.link().tell(encode_relay(operation, next_number(), **fields))

    # The VM leaves its host, and works with one again.

    def _follow(self, reply: asyncio.Future[Reply]) -> None:
        """The host has it, until this reply."""
        reply.add_done_callback(self._source_over)

    def _source_over(self, reply: asyncio.Future[Reply]) -> None:
        if reply.exception() is None and _moves(reply.result()) and not self.over.done():
            self._settled.clear()
            self._task = asyncio.get_running_loop().create_task(self._go_on(reply.result()))
        else:
            error = reply.exception()
            self._end(str(error) if error else reply.result().message or reply.result().reason or "")

    async def _go_on(self, left: Reply) -> None:
        """Open it again from where it stood, and its sinks from where they did."""
        try:
            while any(sink._here is None and sink not in self._waiting for sink in self._sinks):
                await asyncio.sleep(MOVE_PAUSE)
            cursors = [cursor for cursor in self._waiting.values() if cursor is not None]
            self._source.go_on(left.cursor or 0, bytes.fromhex(left.rest), cursors)
            await self._relay_meanwhile()
            if self.over.done():
                return
            await self._open()
        except OSError as error:
            self._task = None
            self._end(str(error))
            return
        self._task = None
        self._settled.set()
        waiting, self._waiting = self._waiting, {}
        await asyncio.gather(*(self._add_again(sink, cursor) for sink, cursor in waiting.items()))

    async def _relay_meanwhile(self) -> None:
        """A live stream needs no share: until the VM works with a host again, this process relays it."""
        attendance = offload_asyncio.link().attendance
        there = self._source.relay_meanwhile()
        if there is None:
            return
        self._meanwhile, self.path = there, "local"
        waiting, self._waiting = self._waiting, {}
        for sink, cursor in waiting.items():
            self._join_meanwhile(there, sink, cursor)
        present = asyncio.ensure_future(attendance.present())
        try:
            await asyncio.wait((present, there.over), return_when=asyncio.FIRST_COMPLETED)
        finally:
            present.cancel()
            self._meanwhile, self.path = None, "offloaded"
        if there.over.done():
            self._end(there.over.result())
        await there.stop()
        self._source.go_on(there.head, b"", [])

    def _join_meanwhile(self, there: LocalRelay, sink: Sink, begin: int | None) -> None:
        sink.path, sink._here = "local", there.add_sink(sink._target, join=sink._options["join"], begin=begin)
        task = asyncio.get_running_loop().create_task(self._rejoin(sink, sink._here))
        self._rejoining.add(task)
        task.add_done_callback(self._rejoining.discard)

    async def _rejoin(self, sink: Sink, here: LocalSink) -> None:
        """When it has got everything that came meanwhile."""
        ending = await here.over
        if not ending.alive or here.removed or self.over.done():
            sink._leave(ending)
            return
        sink._sent, sink._here = sink._sent + ending.sent, None
        self._waiting[sink] = ending.cursor
        if self._settled.is_set():
            del self._waiting[sink]
            await self._add_again(sink, ending.cursor)

    async def _add_again(self, sink: Sink, cursor: int | None) -> None:
        if cursor is None:
            sink._options["join"] = "next_sync"  # it had been waiting for one
        try:
            await self._add(sink, cursor)
        except OSError as error:
            sink._leave(Ending(0, "peer_gone", str(error), cursor, alive=False))

    async def _open(self) -> None:
        """At the host, or here. Raises OSError for a source that nobody can read."""
        link = offload_asyncio.link()
        while True:
            await link.attendance.present()
            self._source.check()
            refusal = await self._ask(link)
            if refusal is None:
                return
            if not _moves(refusal):
                break
            await asyncio.sleep(MOVE_PAUSE)
        message = refusal.message or str(refusal.reason)
        if isinstance(self._source.given, int):
            raise OSError(errno.EOPNOTSUPP, f"a UDP port of the host: {message}")
        if refusal.outcome != "local":
            raise OSError(refusal.errno or errno.EOPNOTSUPP, message)
        self.path, self.reason, self.message = "local", refusal.reason, refusal.message
        there = self._local = self._source.relay_here()
        there.over.add_done_callback(lambda done: self._end(done.result()))

    async def _ask(self, link: offload_asyncio.Link) -> Reply | None:
        """None: the host has it."""
        plan = await plan_of(self._source, link, await link.ready())
        if plan.reason is not None:
            if plan.resume is not None:
                plan.resume()
            return not_asked(plan.reason)
        number, source_token = next_number(), new_token()
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        options = self._source.options
        reply = link.begin(
            number,
            source_token,
            encode_relay("publish", number, token=self.token, source_token=source_token, **plan.fields, **options),
            sock=plan.sock,
            fds=plan.fds,
            when_over=plan.resume,
            on_note=lambda note: None if taken.done() else taken.set_result(None),
        )
        try:
            await asyncio.wait((reply, taken), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if plan.opened is not None:
                if not taken.done():
                    reply.cancel()  # if it is still to be sent: the descriptor may be another file by then
                plan.opened.close()
        if not taken.done() and reply.result().outcome != "offloaded":
            return reply.result()
        self._follow(reply)
        return None


async def publish(
    source: Target | IO[bytes] | Ring | int,
    *,
    framing: str = "raw",
    budget_ms: int = 0,
    ring_entries: int = 1024,
    entry_bytes: int = 16384,
    max_sinks: int = 65536,
    offset: int = 0,
    priority: str = "normal",
) -> Relay:
    """Open a relay: one source, many clients.

    `source`: a non-blocking TCP socket (or its transport or StreamWriter) whose peer sends the stream, a file on the share that
    grows (from `offset` on), a `Ring` there (from the position `offset` on, if it keeps that), or the number of a UDP port of the
    host's. `framing`: raw, or mpegts, where entries are whole
    packets and sync points are known. `budget_ms` (0 to 1000): how long an entry may wait for others, so that each client gets
    several in one send. `ring_entries`: how far a client may fall behind; `entry_bytes`: the most that one entry takes of a byte
    stream. What the host cannot do this process does. Raises ValueError for a bad argument, OSError for a source that nobody can
    read."""
    _one_of("framing", framing, ("raw", "mpegts"))
    options = {
        "framing": framing,
        "budget_ms": budget_ms,
        "ring_entries": ring_entries,
        "entry_bytes": entry_bytes,
        "max_sinks": max_sinks,
        "priority": priority,
        "offset": offset,
        "first": 0,
        "rest": "",
    }
    relay = Relay(new_token(), Source(source, options))
    try:
        await relay._open()
    except BaseException:
        relay.over.cancel()
        raise
    return relay


def _moves(reply: Reply) -> bool:
    """Whether that was because the VM is leaving its host."""
    return reply.outcome == "local" and reply.reason == "draining" and offload_asyncio.link().attendance.away


class _NotMovable(OSError):
    """The host cannot take this client."""


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is none of {', '.join(allowed)}")
