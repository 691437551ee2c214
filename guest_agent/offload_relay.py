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
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from guest_agent import local, local_relay, offload_asyncio
from guest_agent.local_relay import Ending, LocalRelay, LocalSink
from guest_agent.offload_wire import EXPLANATIONS, Message, Reply, encode_relay, new_token, next_number, unsuitable
from guest_agent.ring import Ring

JOINS = ("latest", "oldest", "next_sync")
LAGS = ("head_drop", "drop_to_sync", "disconnect")
STATUS_LIMIT = 5.0
PACKET = 188
"""Bytes of one of a transport stream."""
_OF_THE_RELAY = ("unknown_relay", "relay_ended", "bad_request", "duplicate")
"""Why the host refuses a sink, when this process should too."""
Target = socket.socket | asyncio.WriteTransport | asyncio.StreamWriter


class Sink:
    """One client of a relay. `path`: who sends to it, "offloaded" or "local"."""

    def __init__(self, token: str, over: asyncio.Future[Ending], here: LocalSink | None = None) -> None:
        self.token, self.path = token, "offloaded" if here is None else "local"
        self._over, self._here = over, here

    @property
    def over(self) -> bool:
        """Whether it has left."""
        return self._over.done()

    async def wait(self) -> Ending:
        """Until it has left."""
        return await asyncio.shield(self._over)


class Relay:
    """What `publish` opened. `path`: who relays, "offloaded" or "local"; `reason` and `message`: why not the host."""

    def __init__(
        self,
        token: str,
        there: LocalRelay | None = None,
        *,
        reason: str | None = None,
        message: str = "",
        readable: _Readable | None = None,
    ) -> None:
        self.token, self.reason, self.message = token, reason, message
        self.path = "local" if there is not None else "offloaded"
        self._local, self._readable = there, readable
        self._beside: set[LocalRelay] = set()
        self._sinks: dict[str, Sink] = {}
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done when the source gives no more: why."""

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
        options = {
            "priority": priority,
            "join": join,
            "on_lag": on_lag,
            "lag_soft": lag_soft,
            "lag_hard_ms": lag_hard_ms,
            "begin": begin,
        }
        if self._local is not None:
            return self._add_here(self._local, target, join, begin)
        try:
            return self._remember(await self._hand_out(target, options))
        except _NotMovable as error:
            if self._readable is None or self.over.done():
                raise OSError(error.errno, f"{error.strerror}, and the relay is at the host") from None
        if begin is None and join == "oldest":
            begin = self._readable.oldest()
        return self._add_here(self._reader_beside(self._readable, begin), target, join, begin)

    def _add_here(self, there: LocalRelay, target: Target, join: str, begin: int | None) -> Sink:
        here = there.add_sink(target, join=join, begin=begin)
        return self._remember(Sink(new_token(), here.over, here))

    def _reader_beside(self, readable: _Readable, begin: int | None) -> LocalRelay:
        """Of the same source, for clients that the host cannot take; it reads no longer than there are any."""
        for there in self._beside:
            if begin is None or there.keeps(begin):
                return there
        there = readable.relay(readable.newest() if begin is None else begin)
        there.on_idle = lambda: self._beside.discard(there)
        self._beside.add(there)
        return there

    async def _hand_out(self, target: Target, options: dict[str, object]) -> Sink:
        sock, resume = await _prepared(target)
        udp = sock.type == socket.SOCK_DGRAM
        reason = None if udp else _unsuitable(target, sock)
        if reason is not None:
            if resume is not None:
                resume()
            raise _NotMovable(errno.EOPNOTSUPP, EXPLANATIONS.get(reason, reason))
        token, number = new_token(), next_number()
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        message = encode_relay("add_udp" if udp else "add_sink", number, token=token, relay=self.token, **options)
        reply = offload_asyncio.link().begin(
            number,
            token,
            message,
            sock=None if udp else sock,
            fds=(sock.fileno(),),
            when_over=resume,
            on_note=lambda note: None if taken.done() else taken.set_result(None),
        )
        await asyncio.wait((reply, taken), return_when=asyncio.FIRST_COMPLETED)
        if not taken.done() and reply.result().outcome == "local":
            refusal = reply.result()
            kind = OSError if refusal.reason in _OF_THE_RELAY else _NotMovable
            raise kind(refusal.errno or errno.EOPNOTSUPP, refusal.message or str(refusal.reason))
        return Sink(token, _ended(reply))

    def _remember(self, sink: Sink) -> Sink:
        self._sinks[sink.token] = sink
        sink._over.add_done_callback(lambda _: self._sinks.pop(sink.token, None))
        return sink

    async def remove_sink(self, sink: Sink) -> Ending:
        """Call a client home; harmless if it has left."""
        if not sink.over:
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
        return {**found, "sinks_here": sum(sink.path == "local" for sink in self._sinks.values())} if found else None

    async def close(self) -> None:
        """All clients come home, the source too; returns when they have."""
        if self._local is not None:
            await self._local.close()
        else:
            self._tell("close_relay", relay=self.token)
        for there in list(self._beside):
            await there.close()
        waiting: list[asyncio.Future[Any]] = [sink._over for sink in self._sinks.values()]
        await asyncio.gather(*waiting, self.over, return_exceptions=True)

    def _end(self, why: str) -> None:
        """The source gives no more; what this process reads of it beside the host ends too."""
        if not self.over.done():
            self.over.set_result(why)
        for there in self._beside:
            there.end()

    def _tell(self, operation: str, **fields: object) -> None:
        offload_asyncio.link().tell(encode_relay(operation, next_number(), **fields))


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
    }
    link = offload_asyncio.link()
    reason = await link.ready()
    plan = await _plan(source, link, reason)
    if plan.reason is not None:
        if plan.resume is not None:
            plan.resume()
        return await _here(source, plan.reason, EXPLANATIONS.get(plan.reason, plan.reason), options)
    token, number = new_token(), next_number()
    taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    source_token = new_token()
    reply = link.begin(
        number,
        source_token,
        encode_relay("publish", number, token=token, source_token=source_token, **plan.fields, **options),
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
    if not taken.done():
        refusal = reply.result()
        if refusal.outcome == "local" and not isinstance(source, int):
            return await _here(source, refusal.reason or "unknown", refusal.message, options)
        if refusal.outcome != "offloaded":
            raise OSError(refusal.errno or errno.EOPNOTSUPP, refusal.message or str(refusal.reason))
    relay = Relay(token, readable=_readable(source, options))
    reply.add_done_callback(lambda done: relay._end(_why_over(done)))
    return relay


def _why_over(reply: asyncio.Future[Reply]) -> str:
    error = reply.exception()
    return str(error) if error else reply.result().message or reply.result().reason or ""


async def _here(source: Any, reason: str, message: str, options: dict[str, Any]) -> Relay:
    """This process does it."""
    if isinstance(source, int):
        raise OSError(errno.EOPNOTSUPP, f"a UDP port of the host: {message}")
    there = local_relay.begin(source, offset=options["offset"], **_ring_of(options))
    relay = Relay(new_token(), there, reason=reason, message=message)
    there.over.add_done_callback(lambda done: None if relay.over.done() else relay.over.set_result(done.result()))
    return relay


def _ring_of(options: dict[str, Any]) -> dict[str, int]:
    return {name: options[name] for name in ("ring_entries", "entry_bytes")}


class _NotMovable(OSError):
    """The host cannot take this client."""


@dataclass(frozen=True)
class _Readable:
    """A source that this process can read while the host does."""

    source: IO[bytes] | Ring
    options: dict[str, Any]

    def newest(self) -> int:
        """The position where a client begins that wants what comes: at the end, and at a packet's beginning. Raises OSError."""
        source, first = self.source, int(self.options["offset"])
        at = Ring(source.path).position if isinstance(source, Ring) else os.fstat(source.fileno()).st_size
        return at - ((at - first) % PACKET if self.options["framing"] == "mpegts" else 0)

    def oldest(self) -> int:
        """The same for one that wants all that is kept."""
        kept = self.options["ring_entries"] * (self.options["entry_bytes"] // PACKET * PACKET)
        return max(int(self.options["offset"]), self.newest() - int(kept))

    def relay(self, position: int) -> LocalRelay:
        """From a position on."""
        return local_relay.begin(self.source, offset=position, **_ring_of(self.options))


def _readable(source: Any, options: dict[str, Any]) -> _Readable | None:
    elsewhere = isinstance(source, int | socket.socket | asyncio.WriteTransport | asyncio.StreamWriter)
    return None if elsewhere else _Readable(source, options)


@dataclass(frozen=True)
class _Plan:
    """How the host is asked. `resume` undoes what was done to the source for that, when it is back; `opened` is closed as soon as
    the host has it."""

    reason: str | None
    fields: dict[str, object]
    fds: tuple[int, ...] = ()
    sock: Any = None
    resume: Callable[[], None] | None = None
    opened: IO[bytes] | None = None


async def _plan(source: Any, link: offload_asyncio.Link, absent: str | None) -> _Plan:
    if isinstance(source, int):
        return _Plan(absent, {"source": "udp", "port": source})
    if isinstance(source, Ring):
        reason = absent or link.elsewhere(source.path)
        file = None if reason else open(source.path, "rb", buffering=0)  # noqa: SIM115
        return _Plan(reason, {"source": "ring"}, (file.fileno(),) if file else (), opened=file)
    if not isinstance(source, socket.socket | asyncio.WriteTransport | asyncio.StreamWriter):
        reason = absent or link.elsewhere(os.readlink(f"/proc/self/fd/{source.fileno()}"))
        return _Plan(reason, {"source": "file"}, (source.fileno(),))
    if absent is not None:
        _must_not_block(source)
        return _Plan(absent, {})
    sock, resume = await _prepared(source)
    return _Plan(_unsuitable(source, sock), {"source": "connection"}, (sock.fileno(),), sock, resume)


def _unsuitable(target: Target, sock: Any) -> str | None:
    if not isinstance(target, socket.socket) and target.get_extra_info("sslcontext") is not None:
        return "upper_layer_protocol"
    return unsuitable(sock)


async def _prepared(target: Target) -> tuple[Any, Callable[[], None] | None]:
    """A target's socket, with nothing left in its transport; and what lets the transport read again."""
    _must_not_block(target)
    if isinstance(target, socket.socket):
        return target, None
    transport: Any = target.transport if isinstance(target, asyncio.StreamWriter) else target
    if transport.is_closing():
        raise ConnectionResetError(errno.ECONNRESET, "the transport is closing")
    await local.drain(transport)
    return transport.get_extra_info("socket"), local.pause_reading(transport)


def _must_not_block(target: Any) -> None:
    if isinstance(target, socket.socket) and target.gettimeout() != 0 and target.type == socket.SOCK_STREAM:
        raise ValueError("the socket must be non-blocking")


def _ended(reply: asyncio.Future[Reply]) -> asyncio.Future[Ending]:
    over: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    def done(reply: asyncio.Future[Reply]) -> None:
        error = reply.exception()
        if error is not None:
            over.set_result(Ending(0, "host_lost", str(error), None, alive=False))
            return
        said = reply.result()
        over.set_result(Ending(said.sent, said.reason, said.message, said.cursor, alive=said.outcome != "failed"))

    reply.add_done_callback(done)
    return over


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is none of {', '.join(allowed)}")
