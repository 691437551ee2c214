# SPDX-License-Identifier: Apache-2.0
"""What applications call: send a file on a TCP connection, by the host if it can, by ourselves if it cannot.

    from guest_agent import offload
    transfer = offload.sendfile(sock, file)                     # blocking sockets, any thread
    transfer = await offload.sendfile_async(writer, file)       # asyncio: non-blocking socket, transport, StreamWriter
    transfer = await offload.sendfile_async(writer, file, anticipate=next_segments)     # and what the client asks then
    file = await offload.open("/srv/share/film/1.m4s")          # also while the VM moves and has no share: offload_open.py
    relay = await offload.publish(source)                       # one source, many clients: offload_relay.py
    ring = offload.Ring(path, size=16 << 20)                    # a source in the share that is written over: ring.py

Afterwards the same socket works on. While a call is under way nobody else may read, write or configure that socket: it
may be at the host. Never worse than without us: whatever stands in the way (no agent, a small file, a file elsewhere...)
means that the bytes are sent from here, and `Transfer.reason` says why. A client that goes away raises what the kernel
would have raised.

The way of a request: decide without a system call to anybody where possible -> one message with two descriptors to the
agent -> one reply. If the agent goes away meanwhile, its next life gets the socket again ("reclaim")."""

from __future__ import annotations

import asyncio
import contextlib
import errno as errnos
import logging
import os
import socket
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Any

from guest_agent import local, offload_asyncio
from guest_agent.handoff.anticipated import Anticipated
from guest_agent.held_files import HeldFile, held, size_of
from guest_agent.offload_blocking import BlockingAgent
from guest_agent.offload_move import Notice
from guest_agent.offload_open import File, descriptor
from guest_agent.offload_open import open_file as open
from guest_agent.offload_relay import publish
from guest_agent.offload_wire import Reply, agent_path, here, lost, unsuitable
from guest_agent.ring import Ring

log = logging.getLogger("streamlift.offload")

__all__ = [
    "ON_MOVE",
    "PRIORITIES",
    "Anticipated",
    "File",
    "Ring",
    "Transfer",
    "anticipate_nothing",
    "attend",
    "close",
    "hold",
    "open",
    "present",
    "publish",
    "sendfile",
    "sendfile_async",
    "status",
]

PRIORITIES = ("low", "normal", "high")
ON_MOVE = ("wait", "local")
_HOST_ALONE = frozenset({"draining", "host_away", "host_lost"})
"""Reasons of a refusal that say nothing of the file: the next host is asked."""

Anticipate = Callable[[], Iterable[Anticipated]]
Target = socket.socket | asyncio.WriteTransport | asyncio.StreamWriter


@dataclass(frozen=True)
class Transfer:
    """What became of a call: bytes sent (fewer than asked only if the file ended), by whom, and why not by the host. `answered`:
    what else the client asked for and got, all of it."""

    sent: int
    path: str
    reason: str | None
    message: str
    answered: tuple[Anticipated, ...] = ()


def sendfile(
    sock: socket.socket,
    file: IO[bytes],
    offset: int = 0,
    count: int | None = None,
    *,
    priority: str = "normal",
    on_move: str = "wait",
) -> Transfer:
    """Send `count` bytes (None: all) of `file` from `offset` on a blocking socket; thread-safe.

    The socket's timeout bounds each wait of a local transfer; the host's transfers end when TCP says so. The file's
    position is not used. `on_move`: what happens to the rest when the VM leaves its host in the middle: "wait" until it works with
    one again, or "local": send it from here, and let the VM wait for that. Raises OSError as sendfile(2) would,
    ConnectionResetError if the connection was lost with its owner, ValueError for a non-blocking socket or a bad argument."""
    if sock.gettimeout() == 0:
        raise ValueError("the socket is non-blocking: use sendfile_async, or give it a timeout")
    count = _bytes_to_send(file, offset, count, priority, on_move)
    reason, done = _unsuitable(sock, count), _Done()
    with _held(file, on_move) as hold:
        while True:
            start, left = offset + done.sent, count - done.sent
            why = reason or _blocking.refusal(file.fileno(), left)
            reply = done.heard(here(why) if why else _blocking.request(sock, file.fileno(), start, left, priority))
            if reply.outcome != "local":
                return _conclude(reply, done)
            if reply.away and hold is not None:
                _blocking.wait_until_here()
                hold.check()
                continue
            absences = hold.absences if hold is not None else 0
            done.here += local.send(sock, file, offset + done.sent, count - done.sent) if count > done.sent else 0
            if done.sent == count or hold is None or hold.absences == absences:
                return _sent_here(reply, done)
            _blocking.wait_until_here()
            hold.check()


async def sendfile_async(
    target: Target,
    file: IO[bytes],
    offset: int = 0,
    count: int | None = None,
    *,
    priority: str = "normal",
    on_move: str = "wait",
    anticipate: Anticipate | None = None,
) -> Transfer:
    """The same for asyncio. A transport or StreamWriter first sends what was written to it; its reading is paused
    during the transfer. If the call is cancelled the host may send on: close the connection, as after any cancelled
    send. Its reading resumes when the socket is back.

    `anticipate()` is called when the host is asked, and says (or yields, while the file is sent) what the client may ask next, in
    this order, and how that is to be answered; some may be left out. The host does so without asking anybody here; the call returns
    when the client asks for anything else, or nothing for as long as the host waits (30 s). Whoever has read more from the client
    than the request that this file answers says nothing."""
    count_ = _bytes_to_send(file, offset, count, priority, on_move)
    foresight = _Foresight(anticipate) if anticipate is not None else None
    if isinstance(target, socket.socket):
        if target.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")
        return await _send_async(_OfSocket(target, file, priority, on_move, foresight), offset, count_)
    transport = target.transport if isinstance(target, asyncio.StreamWriter) else target
    if transport.is_closing():
        raise ConnectionResetError(errnos.ECONNRESET, "the transport is closing")
    return await _send_async(_OfTransport(transport, file, priority, on_move, foresight), offset, count_)


@dataclass
class _Foresight:
    """What the application anticipates, and what it has said of it."""

    ask: Anticipate
    told: list[Anticipated] = field(default_factory=list)

    def __call__(self) -> Iterator[Anticipated]:
        """The transfer is under way: the application's mistake must not end it."""
        told = self.told = []
        try:
            for one in self.ask():
                told.append(one)
                yield one
        except Exception:
            log.exception("what the client may ask next is not known")


@dataclass
class _OfSocket:
    """How parts of a file go out on a bare socket: by the host, or from here."""

    sock: socket.socket
    file: IO[bytes]
    priority: str
    on_move: str
    foresight: _Foresight | None

    def unsuitable(self, count: int) -> str | None:
        return _unsuitable(self.sock, count)

    async def ask(self, link: offload_asyncio.Link, file: int, offset: int, count: int) -> Reply:
        return await link.request(
            self.sock, file, offset, count, self.priority, on_move=self.on_move, anticipate=self.foresight
        )

    async def send(self, offset: int, count: int) -> int:
        return await local.send_on_socket(self.sock, self.file, offset, count)


@dataclass
class _OfTransport:
    """The same on a transport."""

    transport: asyncio.WriteTransport
    file: IO[bytes]
    priority: str
    on_move: str
    foresight: _Foresight | None

    def unsuitable(self, count: int) -> str | None:
        if self.transport.get_extra_info("sslcontext") is not None:
            return "upper_layer_protocol"
        return _unsuitable(self.transport.get_extra_info("socket"), count)

    async def ask(self, link: offload_asyncio.Link, file: int, offset: int, count: int) -> Reply:
        await local.drain(self.transport)
        resume = local.pause_reading(self.transport)
        sock = self.transport.get_extra_info("socket")
        return await link.request(
            sock, file, offset, count, self.priority, on_move=self.on_move, anticipate=self.foresight, when_over=resume
        )

    async def send(self, offset: int, count: int) -> int:
        return await local.send_on_transport(self.transport, self.file, offset, count)


_Way = _OfSocket | _OfTransport


async def _send_async(way: _Way, offset: int, count: int) -> Transfer:
    """By the host as far as it goes, from here as far as that goes, and whenever the share leaves, from where that was."""
    link, done, refused = offload_asyncio.link(), _Done(), False
    with _held(way.file, way.on_move) as hold:
        while True:
            file = await descriptor(hold, refused=refused) if hold is not None else way.file.fileno()
            start, left = offset + done.sent, count - done.sent
            reason = way.unsuitable(left)
            if reason is None and (hold is None or not hold.away):
                reason = await link.refusal(file, left)
            reply = here(reason) if reason else await way.ask(link, file, start, left)
            if reply.answered:
                return await _answered(way, reply, count)
            done.heard(reply)
            if reply.outcome != "local":
                return _conclude(reply, done)
            if hold is not None:
                link.attendance.let_go_of(hold)
                unknown = file == hold.stand_in and reply.reason not in _HOST_ALONE
                refused = hold.away and (unknown or way.unsuitable(left) is not None)
                if done.sent < count and (reply.away or hold.away):  # it may be back already
                    continue
                hold.check()
            absences = hold.absences if hold is not None else 0
            done.here += await way.send(offset + done.sent, count - done.sent) if count > done.sent else 0
            if done.sent == count or hold is None or hold.absences == absences:
                return _sent_here(reply, done)


async def _answered(way: _Way, reply: Reply, count: int) -> Transfer:
    """The host has sent all of the file, and more after it; the last of that may have come home in part."""
    told = way.foresight.told if way.foresight is not None else []
    if reply.answered[-1] >= len(told):
        raise lost(f"it answered number {reply.answered[-1]} of {len(told)}")
    answered = tuple(told[one] for one in reply.answered)
    if reply.outcome == "failed":
        return _conclude(reply, _Done(there=reply.sent))
    with _counting:
        _counters["offloaded"] += 1 + len(answered)
        _counters["bytes_offloaded"] += count + sum(one.count for one in answered[:-1]) + reply.sent
    if reply.sent < answered[-1].count:
        await _send_rest(way, answered[-1], reply.sent)
    return Transfer(count, "offloaded", None, "", answered)


async def _send_rest(way: _Way, answer: Anticipated, sent: int) -> None:
    """Of an answer. Raises OSError if the file is not what it was."""
    with await open(answer.path) as file:
        facts = os.fstat(file.fileno())
        if (facts.st_size, facts.st_mtime_ns) != (answer.size, answer.mtime_ns):
            raise OSError(errnos.ESTALE, f"{answer.path} was changed while it was sent. The connection must be closed")
        rest = await _send_async(replace(way, file=file, foresight=None), answer.offset + sent, answer.count - sent)
    if rest.sent < answer.count - sent:
        raise OSError(errnos.EIO, f"{answer.path} ended early. The connection must be closed")


@dataclass
class _Done:
    """How far a transfer is, in bytes: `there`, by the host, and `here`."""

    there: int = 0
    here: int = 0

    @property
    def sent(self) -> int:
        return self.there + self.here

    def heard(self, reply: Reply) -> Reply:
        """Count what the host sent."""
        self.there += reply.sent
        return reply


@contextlib.contextmanager
def _held(file: IO[bytes], on_move: str) -> Iterator[HeldFile | None]:
    """None: the share has to wait for this one."""
    if on_move == "local":
        yield None
        return
    with held(file.fileno()) as hold:
        yield hold


# The share leaves, with the VM.


def attend(on_leave: Notice | None = None, on_return: Notice | None = None) -> None:
    """Of an asyncio application that has files of the share open outside of its transfers: hear of the VM's leaving from now on.

    Files in `hold` need nothing more. `on_leave` is awaited before the share is unmounted: close there what else is open;
    `on_return` after it was mounted again. Between the two nothing on the share can be opened: see `present`."""
    link = offload_asyncio.link()
    link.attend()
    link.attendance.notify(on_leave, on_return)


async def present() -> None:
    """Wait until files on the share can be opened; mostly no wait at all."""
    await offload_asyncio.link().attendance.present()


def anticipate_nothing() -> None:
    """Of a server that stops: those connections of this event loop whose clients were expected to ask for more come home as soon as
    they have what they asked for."""
    offload_asyncio.link().anticipate_nothing()


def hold(fd: int) -> contextlib.AbstractContextManager[HeldFile]:
    """A file or folder that is open all the time: while the share is away its descriptor stands for an empty file, afterwards for
    the same again. It must stay open while the block lasts."""
    return held(fd)


def status() -> dict[str, Any]:
    """This process's counters, and the agent's own status (None: it does not answer)."""
    with _counting:
        counted = {
            "offloaded": _counters["offloaded"],
            "failed": _counters["failed"],
            "bytes_offloaded": _counters["bytes_offloaded"],
            "bytes_local": _counters["bytes_local"],
            "local": dict(_local_reasons),
        }
    return {"agent_socket": agent_path(), "agent": _blocking.status(), **counted}


def close() -> None:
    """Close idle connections to the agent. Later calls open new ones."""
    _blocking.close()
    offload_asyncio.close_idle()


def _bytes_to_send(file: IO[bytes], offset: int, count: int | None, priority: str, on_move: str) -> int:
    if on_move not in ON_MOVE:
        raise ValueError(f"on_move {on_move!r} is none of {', '.join(ON_MOVE)}")
    if priority not in PRIORITIES:
        raise ValueError(f"priority {priority!r} is none of {', '.join(PRIORITIES)}")
    if offset < 0 or (count is not None and count < 0):
        raise ValueError("offset and count must not be negative")
    facts = os.fstat(file.fileno())
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("only regular files can be sent")
    available = max(size_of(file.fileno()) - offset, 0)
    return available if count is None else min(count, available)


def _unsuitable(sock: Any, count: int) -> str | None:
    return unsuitable(sock) if count else "too_small"


_counting = threading.Lock()
_counters: Counter[str] = Counter()
_local_reasons: Counter[str] = Counter()


def _sent_here(reply: Reply, done: _Done) -> Transfer:
    with _counting:
        _local_reasons[reply.reason or "unknown"] += 1
        _counters["bytes_local"] += done.here
        _counters["bytes_offloaded"] += done.there
    return Transfer(done.sent, "local", reply.reason, reply.message)


def _conclude(reply: Reply, done: _Done) -> Transfer:
    """The host did it, or the connection is over."""
    with _counting:
        _counters[reply.outcome] += 1
        _counters["bytes_local"] += done.here
        _counters["bytes_offloaded"] += done.there
    if reply.outcome == "offloaded":
        return Transfer(done.sent, "offloaded", reply.reason, reply.message)
    number = reply.errno or errnos.EIO
    why = reply.message or reply.reason or "no reason given"
    raise OSError(number, f"{os.strerror(number)} after {done.sent} bytes: {why}. The connection must be closed")


_blocking = BlockingAgent()


def _after_fork() -> None:
    """A child shares none of its parent's connections: two readers of one connection would steal each other's replies."""
    global _blocking, _counting
    _counting = threading.Lock()
    _blocking.close()
    _blocking = BlockingAgent()
    offload_asyncio.abandon_all()


os.register_at_fork(after_in_child=_after_fork)
