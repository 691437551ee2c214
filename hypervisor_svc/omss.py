# SPDX-License-Identifier: Apache-2.0
"""The kernel module `omss`: one source socket, any number of sink sockets, spliced in the kernel. The only Python file that knows
the module's numbers; the manual is `host_module/omss/uapi/omss.h`, and a test compares the two.

All calls take a socket as the door to the module: any TCP or UDP socket, whose own session is meant by `session=0`. They raise
OSError: ENOPROTOOPT (the module is not loaded), EPERM (no CAP_NET_ADMIN), EBUSY (in a session already), ENOTCONN, EOPNOTSUPP (kTLS,
other protocols), ENOSPC (too many sinks), ENOENT (no such session), EAGAIN (`remove_sink`: call again)."""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import socket
import struct
from dataclasses import dataclass

VERSION = 1

BASE = 0x6F00
SET_SOURCE, ADD_SINK, REMOVE_SINK, END = (BASE + number for number in range(4))
HELLO, GET_STATUS, ADOPT = (BASE + number for number in range(3))

MAX_RING, MAX_ENTRY, MAX_LATENCY, CLASSES = 65536, 65536, 1000, 8
DETACHED, COPY = 1, 2
ATTACH = 1
HALT = 1
ALL_NAMESPACES = 1
SHARED_DATAGRAMS = 1
SESSION, SINK, SINKS, SESSIONS = range(4)

_HELLO = struct.Struct("=18I")
_SOURCE = struct.Struct("=8I")
_ADD_SINK = struct.Struct("=QiIIIIIQ")
_REMOVE_SINK = struct.Struct("=QQiI")
_END = struct.Struct("=Q")
_ADOPT = struct.Struct("=QQIi")
_REQUEST = struct.Struct("=IIQQII")
_COUNTERS = struct.Struct("=6Q8Q")
_SESSION = struct.Struct("=QII8I5QII14Q8Q")
_SINK = struct.Struct("=QQ8IQQII14Q")

PAGE = 64 << 10
"""Bytes of one answer to a list."""

_HINTS = {
    errno.ENOPROTOOPT: "the kernel module omss is not loaded",
    errno.EPERM: "CAP_NET_ADMIN is needed in the sockets' network namespaces",
    errno.EBUSY: "the socket is in a session already, or in other use inside the kernel",
    errno.ENOTCONN: "TCP sockets and UDP sinks must be connected, UDP sources bound",
    errno.EOPNOTSUPP: "only plain TCP and UDP over IPv4 and IPv6 (no kTLS, MPTCP, UDP_GRO)",
    errno.ENOSPC: "the limit of sinks is reached",
    errno.ENOENT: "there is no such session or sink",
    errno.EPROTO: "the module speaks another version",
    errno.E2BIG: "the module is older than what is asked of it",
}


class Framing(enum.IntEnum):
    """Where entries begin, and sinks may join."""

    RAW = 0
    MPEGTS = 1


class Join(enum.IntEnum):
    """With which entry a sink begins: the next to come, the oldest in the ring, the next sync point, a certain one."""

    LATEST = 0
    OLDEST = 1
    NEXT_SYNC = 2
    FROM = 3


class OnLag(enum.IntEnum):
    """What happens to a sink that is more than `lag_soft` entries behind."""

    HEAD_DROP = 0
    DROP_TO_SYNC = 1
    DISCONNECT = 2


class State(enum.IntEnum):
    """Of a session. ENDED: the source came to its end, and each sink has all that it will get."""

    RUNNING = 1
    DRAINING = 2
    ENDED = 3


class SinkState(enum.IntEnum):
    """Of a sink. From FAILED on it gets nothing more."""

    STREAMING = 1
    WAITING = 2
    LEAVING = 3
    FAILED = 4
    DISCONNECTED = 5


@dataclass(frozen=True)
class Hello:
    """What the module says of itself. `features`: SHARED_DATAGRAMS; `kernel` as LINUX_VERSION_CODE; `max_sinks` 0: no limit."""

    version: int
    features: int
    kernel: int
    classes: int
    max_ring: int
    max_entry: int
    max_latency: int
    max_sinks: int
    workers: int


@dataclass(frozen=True)
class Drops:
    """Entries that were dropped, by reason: the ring had them no more, the sink's own limit, what could not be sent; at the
    source no memory, no packet, too long. `refused`: sent, and refused by the host over there (ICMP): not part of the total."""

    overrun: int
    lag: int
    error: int
    memory: int
    framing: int
    size: int
    refused: int

    @property
    def total(self) -> int:
        """That nobody got, for any reason."""
        return self.overrun + self.lag + self.error + self.memory + self.framing + self.size


@dataclass(frozen=True)
class Counters:
    """What was sent: `entries` finished, in `sends` calls; `pages` by reference. `shared` and `copied` add up to `bytes`."""

    bytes: int
    entries: int
    sends: int
    pages: int
    shared: int
    copied: int
    drops: Drops


@dataclass(frozen=True)
class Source:
    """A session's settings as they are in effect. `entry` and `copy_below` in bytes, `latency` in ms."""

    flags: int
    framing: Framing
    ring: int
    entry: int
    latency: int
    service_class: int
    copy_below: int
    max_sinks: int


@dataclass(frozen=True)
class Status:
    """Of a session. `head` entries have come so far, `tail` is the oldest still there; `received` and `memory` in bytes; `sent` by
    all sinks; `dropped` by the source."""

    id: int
    state: State
    error: int
    source: Source
    head: int
    tail: int
    received: int
    memory: int
    syncs: int
    sinks: int
    namespace: int
    sent: Counters
    dropped: Drops


@dataclass(frozen=True)
class SinkStatus:
    """Of a sink. `lag` in entries, `left` bytes of an entry that it has begun, `quiet` ms since it took something."""

    id: int
    session: int
    state: SinkState
    error: int
    service_class: int
    join: Join
    on_lag: OnLag
    lag_soft: int
    lag_hard: int
    blocked: bool
    cursor: int
    lag: int
    left: int
    quiet: int
    sent: Counters


def hello(sock: socket.socket) -> Hello:
    """Is the module there, and does it speak our version? To be called before anything else."""
    room = bytearray(_HELLO.pack(VERSION, *[0] * 17))
    values = _HELLO.unpack(_get(sock, HELLO, room))
    ours = (_HELLO, _SOURCE, _ADD_SINK, _REMOVE_SINK, _END, _ADOPT, _REQUEST, _SESSION, _SINK)
    if any(size < known.size for size, known in zip(values[1:10], ours, strict=True)):
        raise OSError(errno.EPROTO, "the module's structures are smaller than ours")
    return Hello(values[0], *values[10:])


def set_source(
    sock: socket.socket,
    *,
    framing: Framing = Framing.RAW,
    ring: int = 0,
    entry: int = 0,
    latency: int = 0,
    service_class: int = 0,
    copy_below: int = 0,
    max_sinks: int = 0,
    copy: bool = False,
    detached: bool = False,
) -> int:
    """The socket becomes the source of a new session, whose id is returned. `entry` and `copy_below` in bytes, `latency` in ms; 0
    is the module's default."""
    flags = DETACHED * detached | COPY * copy
    values = (flags, framing, ring, entry, latency, service_class, copy_below, max_sinks)
    _set(sock, SET_SOURCE, _SOURCE.pack(*map(_u32, values)))
    return status(sock).id


def add_sink(
    sock: socket.socket,
    sink: socket.socket,
    *,
    session: int = 0,
    service_class: int = 0,
    join: Join = Join.LATEST,
    begin: int = 0,
    on_lag: OnLag = OnLag.HEAD_DROP,
    lag_soft: int = 0,
    lag_hard: int = 0,
) -> int:
    """The connected socket `sink` receives the stream from now on; its number in the session. `begin`: an entry, with `Join.FROM`.
    `lag_soft` in entries, `lag_hard` in ms."""
    numbers = map(_u32, (service_class, join, on_lag, lag_soft, lag_hard))
    _set(sock, ADD_SINK, _ADD_SINK.pack(session, sink.fileno(), *numbers, begin))
    return sink_status(sink).id


def halt_sink(sock: socket.socket, sink: socket.socket | int, *, session: int = 0) -> None:
    """The sink (a socket, or its number in the session) gets what is left of an entry and no other; it stays in the session, so
    that its last status can be read. EAGAIN: `left` bytes are left, call again."""
    _remove(sock, sink, session, HALT)


def remove_sink(sock: socket.socket, sink: socket.socket | int, *, session: int = 0) -> None:
    """The same, and it leaves: the socket is its owner's again."""
    _remove(sock, sink, session, 0)


def _remove(sock: socket.socket, sink: socket.socket | int, session: int, flags: int) -> None:
    number, fd = (sink, -1) if isinstance(sink, int) else (0, sink.fileno())
    _set(sock, REMOVE_SINK, _REMOVE_SINK.pack(session, number, fd, flags))


def end(sock: socket.socket, session: int = 0) -> None:
    """End a session; its sinks are their owners' again."""
    _set(sock, END, _END.pack(session))


def adopt(sock: socket.socket, session: int, *, sink: int = 0, attach: bool = False) -> socket.socket:
    """A socket object for the source, or a sink, of a detached session. `attach`: it ends from now on with its source."""
    room = bytearray(_ADOPT.pack(session, sink, ATTACH * attach, -1))
    return socket.socket(fileno=_ADOPT.unpack(_get(sock, ADOPT, room))[3])


def status(sock: socket.socket, session: int = 0) -> Status:
    """Of one session."""
    return _session(_ask(sock, SESSION, _SESSION, session=session)[0])


def sink_status(sink: socket.socket) -> SinkStatus:
    """Of the sink that this socket is."""
    return _sink(_ask(sink, SINK, _SINK)[0])


def sinks(sock: socket.socket, session: int = 0) -> list[SinkStatus]:
    """Of all sinks of a session."""
    found: list[SinkStatus] = []
    while records := _ask(sock, SINKS, _SINK, session=session, after=found[-1].id if found else 0):
        found += map(_sink, records)
    return found


def sessions(sock: socket.socket, *, all_namespaces: bool = False) -> list[Status]:
    """Of all sessions whose source is in the socket's network namespace, or wherever the caller may look."""
    found: list[Status] = []
    flags = ALL_NAMESPACES * all_namespaces
    while records := _ask(sock, SESSIONS, _SESSION, flags=flags, after=found[-1].id if found else 0):
        found += map(_session, records)
    return found


def _session(record: tuple[int, ...]) -> Status:
    number, state, error, flags, framing, ring, entry, latency, service_class, below, most = record[:11]
    source = Source(flags, Framing(framing), ring, entry, latency, service_class, below, most)
    head, tail, received, memory, syncs, count, namespace = record[11:18]
    sent, dropped = _counters(record[18:32]), _drops(record[32:])
    return Status(number, State(state), error, source, head, tail, received, memory, syncs, count, namespace, sent, dropped)


def _sink(record: tuple[int, ...]) -> SinkStatus:
    number, session, state, error, service_class, join, on_lag, soft, hard, blocked = record[:10]
    policy = service_class, Join(join), OnLag(on_lag), soft, hard, bool(blocked)
    cursor, lag, left, quiet = record[10:14]
    return SinkStatus(number, session, SinkState(state), error, *policy, cursor, lag, left, quiet, _counters(record[14:]))


def _counters(values: tuple[int, ...]) -> Counters:
    taken, entries, sends, pages, shared, copied = values[:6]
    return Counters(taken, entries, sends, pages, shared, copied, _drops(values[6:]))


def _drops(values: tuple[int, ...]) -> Drops:
    return Drops(*values[:7])


def _u32(value: int) -> int:
    if not 0 <= value < 1 << 32:
        raise OSError(errno.EINVAL, f"{value} is no 32-bit number")
    return value


def _ask(
    sock: socket.socket, what: int, record: struct.Struct, *, session: int = 0, after: int = 0, flags: int = 0
) -> list[tuple[int, ...]]:
    """The records of one page."""
    room = bytearray(_REQUEST.size + (PAGE if what in (SINKS, SESSIONS) else record.size))
    _REQUEST.pack_into(room, 0, what, flags, session, after, record.size, 0)
    answer = _get(sock, GET_STATUS, room)
    return list(record.iter_unpack(answer[_REQUEST.size :]))


_libc = ctypes.CDLL(None, use_errno=True)


def _get(sock: socket.socket, option: int, room: bytearray) -> bytes:
    """getsockopt(2) with what is in `room` as the question (socket.getsockopt has no way in)."""
    buffer = (ctypes.c_char * len(room)).from_buffer(room)
    length = ctypes.c_uint32(len(room))
    if _libc.getsockopt(sock.fileno(), socket.IPPROTO_IP, option, buffer, ctypes.byref(length)):
        raise _explained(ctypes.get_errno())
    return bytes(room[: length.value])


def _set(sock: socket.socket, option: int, call: bytes) -> None:
    try:
        sock.setsockopt(socket.IPPROTO_IP, option, call)
    except OSError as error:
        raise _explained(error.errno or errno.EIO) from None


def _explained(number: int) -> OSError:
    hint = _HINTS.get(number)
    return OSError(number, f"{os.strerror(number)}: {hint}" if hint else os.strerror(number))
