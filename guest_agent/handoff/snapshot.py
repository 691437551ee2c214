# SPDX-License-Identifier: Apache-2.0
"""One TCP connection at rest: everything that another kernel needs to go on with it. Pure: no sockets here.

The two sequence spaces of a snapshot (RFC 9293 section 3.3.1)::

    send      send_sequence                                              receive    receive_sequence
              |<--- unacked --->|<--- unsent --->|                                  |<--- receive --->|
              SND.UNA           SND.NXT          write_seq                          copied_seq        RCV.NXT

`send_sequence` and `receive_sequence` name the first byte of each queue, so a queue may grow without touching them. A FIN
counts as one in both spaces (RFC 9293 section 3.4) and is in no queue: `state` tells whether there is one.

What only the `socket_offload` module can move (`state` other than ESTABLISHED, `segments`, `warm`) is left at its default by
the other backend, which refuses the first and goes without the rest.
"""

from __future__ import annotations

import functools
import ipaddress
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from guest_agent.handoff import warm as warm_state
from guest_agent.handoff.errors import GuestError, Reason
from guest_agent.handoff.warm import Warm

VERSION = 3
MAX_QUEUE = 16 << 20
"""Upper bound for the three queues of a snapshot together, bytes."""

MAX_SEGMENTS = 4096
"""Most segments in the out-of-order queue of a snapshot."""

MAX_WINDOW = 1 << 30
"""Largest window, bytes (RFC 7323 section 2.3)."""

MAX_BUFFER = (1 << 30) - 1
"""Largest socket buffer, bytes, as the kernel reports it: half of what fits."""

_U8, _U16, _U32 = 0xFF, 0xFFFF, 0xFFFFFFFF

ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING = 1, 4, 5, 8, 9, 11
"""States that a snapshot may have (include/net/tcp_states.h)."""
STATES = frozenset({ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING})
FIN_SENT = frozenset({FIN_WAIT1, CLOSING, LAST_ACK})
"""Our FIN is in the send space, unacknowledged."""
FIN_RECEIVED = frozenset({CLOSE_WAIT, CLOSING, LAST_ACK})


class Endpoint(NamedTuple):
    """An address as it is on the wire (IPv4 or IPv6, canonical text, never v4-mapped) and a port."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


@dataclass(frozen=True)
class Window:
    """`struct tcp_repair_window` of the kernel (TCP_REPAIR_WINDOW, tcp(7)): sequence numbers and bytes."""

    snd_wl1: int
    snd_wnd: int
    max_window: int
    rcv_wnd: int
    rcv_wup: int


@dataclass(frozen=True)
class Options:
    """The socket options that matter to a server. Times in seconds, user_timeout in milliseconds, buffers in bytes as
    the kernel reports them (twice what was set). `buffer_lock` is SO_BUF_LOCK: which buffers are fixed (no autotuning)."""

    nodelay: bool = False
    cork: bool = False
    keepalive: bool = False
    keepalive_idle: int = 7200
    keepalive_interval: int = 75
    keepalive_count: int = 9
    send_buffer: int = 0
    receive_buffer: int = 0
    buffer_lock: int = 0
    traffic_class: int = 0
    mark: int = 0
    priority: int = 0
    user_timeout: int = 0
    congestion: str = ""


class Segment(NamedTuple):
    """Bytes that were received before their turn."""

    sequence: int
    data: bytes


@dataclass(frozen=True)
class Snapshot:
    """A frozen connection. Sequence numbers and timestamps modulo 2**32; `mss` in bytes; window scales as shifts
    (`None`: the option was not negotiated, RFC 7323); `timestamp` is the next TSval, in microseconds if `timestamp_usec`
    (kernel 6.7 and later), else in milliseconds. `fin_unsent`: our FIN waits behind the unsent data; `fin_read`: the
    application has seen the peer's, and `receive_sequence` is behind it."""

    local: Endpoint
    peer: Endpoint
    send_sequence: int
    receive_sequence: int
    mss: int
    send_scale: int | None
    receive_scale: int | None
    sack: bool
    timestamps: bool
    timestamp: int
    timestamp_usec: bool
    window: Window
    options: Options
    v4_mapped: bool = False
    receive_queue: bytes = b""
    unacked: bytes = b""
    unsent: bytes = b""
    state: int = ESTABLISHED
    fin_unsent: bool = False
    fin_read: bool = False
    segments: tuple[Segment, ...] = ()
    warm: Warm | None = None
    version: int = VERSION

    @property
    def is_ipv6(self) -> bool:
        """Whether packets of this connection are IPv6 on the wire."""
        return ":" in self.local.address

    @property
    def receive_next(self) -> int:
        """RCV.NXT."""
        fin = self.state in FIN_RECEIVED and not self.fin_read
        return (self.receive_sequence + len(self.receive_queue) + fin) & _U32

    @property
    def send_next(self) -> int:
        """SND.NXT."""
        fin = self.state in FIN_SENT and not self.fin_unsent
        return (self.send_sequence + len(self.unacked) + fin) & _U32


def after(snapshot: Snapshot, count: int) -> Snapshot:
    """The connection as it will stand when all that is queued and `count` bytes more are sent and acknowledged, and before
    anything is read. What the peer may send until then is not in it."""
    start = snapshot.receive_sequence
    return replace(
        snapshot,
        send_sequence=(snapshot.send_next + len(snapshot.unsent) + count) & _U32,
        window=replace(snapshot.window, snd_wl1=start, rcv_wup=start),
        receive_queue=b"",
        unacked=b"",
        unsent=b"",
        segments=(),
        warm=None,
    )


def without_unsent(snapshot: Snapshot, spare: int) -> Snapshot:
    """The connection as it was before the last `spare` bytes were queued, as far as they were not sent. One whose FIN waits behind
    them is left alone."""
    if not spare or not snapshot.unsent or snapshot.fin_unsent:
        return snapshot
    return replace(snapshot, unsent=snapshot.unsent[: max(0, len(snapshot.unsent) - spare)])


def before_fin(snapshot: Snapshot) -> Snapshot:
    """The connection as it was before the peer's FIN came, for a backend that cannot restore one that has received it; whoever
    restores it must see to it that the FIN comes again."""
    if snapshot.state != CLOSE_WAIT:
        return snapshot
    start = (snapshot.receive_sequence - snapshot.fin_read) & _U32
    following = (snapshot.receive_next - 1) & _U32
    window = snapshot.window
    if _is_after(window.rcv_wup, following):
        window = replace(window, rcv_wup=following)
    return replace(snapshot, state=ESTABLISHED, fin_read=False, receive_sequence=start, window=window)


_QUEUES = ("receive_queue", "unacked", "unsent")
_WINDOW_NAMES = tuple(field.name for field in fields(Window))
_OPTION_NAMES = tuple(field.name for field in fields(Options))
UPPER_LAYER = "upper_layer"
"""The place of kTLS in the header: null, as nobody can move it yet. Who can will say so in the hello, and put an object there."""
_SNAPSHOT_NAMES = frozenset(field.name for field in fields(Snapshot)) - set(_QUEUES) | {"queues", UPPER_LAYER}

_RANGES = {
    "send_sequence": _U32,
    "receive_sequence": _U32,
    "timestamp": _U32,
    "mss": _U16,
    **dict.fromkeys(_WINDOW_NAMES, _U32),
    **dict.fromkeys(("max_window", "rcv_wnd"), MAX_WINDOW),
    "keepalive_idle": 32767,
    "keepalive_interval": 32767,
    "keepalive_count": 127,
    "send_buffer": MAX_BUFFER,
    "receive_buffer": MAX_BUFFER,
    "buffer_lock": 3,
    "traffic_class": _U8,
    "mark": _U32,
    "priority": 0x7FFFFFFF,
    "user_timeout": 0x7FFFFFFF,
}
_FLAGS = ("nodelay", "cork", "keepalive")
MIN_MSS, MAX_SCALE = 48, 14
"""TCP_MIN_MSS of the kernel; the largest shift of RFC 7323 section 2.3."""


def encode(snapshot: Snapshot) -> tuple[dict[str, Any], bytes]:
    """Return the snapshot as a JSON-able header and the bytes of its queues, one after the other."""
    header = {
        "version": snapshot.version,
        "local": list(snapshot.local),
        "peer": list(snapshot.peer),
        "send_sequence": snapshot.send_sequence,
        "receive_sequence": snapshot.receive_sequence,
        "mss": snapshot.mss,
        "send_scale": snapshot.send_scale,
        "receive_scale": snapshot.receive_scale,
        "sack": snapshot.sack,
        "timestamps": snapshot.timestamps,
        "timestamp": snapshot.timestamp,
        "timestamp_usec": snapshot.timestamp_usec,
        "v4_mapped": snapshot.v4_mapped,
        "window": [getattr(snapshot.window, name) for name in _WINDOW_NAMES],
        "options": [getattr(snapshot.options, name) for name in _OPTION_NAMES],
        "queues": [len(snapshot.receive_queue), len(snapshot.unacked), len(snapshot.unsent)],
        "state": snapshot.state,
        "fin_unsent": snapshot.fin_unsent,
        "fin_read": snapshot.fin_read,
        "segments": [[segment.sequence, len(segment.data)] for segment in snapshot.segments],
        "warm": warm_state.encode(snapshot.warm),
        UPPER_LAYER: None,
    }
    early = b"".join(segment.data for segment in snapshot.segments)
    return header, snapshot.receive_queue + snapshot.unacked + snapshot.unsent + early


def decode(header: object, body: bytes) -> Snapshot:
    """The inverse of `encode`, for input that nobody vouches for: raises `GuestError` (BAD_SNAPSHOT, BAD_VERSION, UPPER_LAYER)
    unless every field is there, of its type, in its range and consistent with the others."""
    try:
        return _decode(header, body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GuestError(Reason.BAD_SNAPSHOT, f"snapshot: {error}") from None


def _decode(header: object, body: bytes) -> Snapshot:
    if type(header) is not dict:
        raise TypeError("not an object")
    if header.get("version") != VERSION:
        raise GuestError(Reason.BAD_VERSION, f"snapshot version {header.get('version')!r}, this side speaks {VERSION}")
    if header.keys() != _SNAPSHOT_NAMES:
        raise ValueError(f"fields {sorted(header.keys() ^ _SNAPSHOT_NAMES)} are missing or unknown")
    if header[UPPER_LAYER] is not None:
        raise GuestError(Reason.UPPER_LAYER, "the state of an upper layer protocol (kTLS, ...) cannot be moved")
    receive, unacked, unsent, segments = _queues(header["queues"], header["segments"], body)
    snapshot = Snapshot(
        local=_endpoint(header["local"]),
        peer=_endpoint(header["peer"]),
        send_sequence=_number("send_sequence", header["send_sequence"]),
        receive_sequence=_number("receive_sequence", header["receive_sequence"]),
        mss=_number("mss", header["mss"], MIN_MSS),
        send_scale=_scale(header["send_scale"]),
        receive_scale=_scale(header["receive_scale"]),
        sack=_flag("sack", header["sack"]),
        timestamps=_flag("timestamps", header["timestamps"]),
        timestamp=_number("timestamp", header["timestamp"]),
        timestamp_usec=_flag("timestamp_usec", header["timestamp_usec"]),
        v4_mapped=_flag("v4_mapped", header["v4_mapped"]),
        window=_window(header["window"]),
        options=_options(header["options"]),
        receive_queue=receive,
        unacked=unacked,
        unsent=unsent,
        state=_state(header["state"]),
        fin_unsent=_flag("fin_unsent", header["fin_unsent"]),
        fin_read=_flag("fin_read", header["fin_read"]),
        segments=segments,
        warm=warm_state.decode(header["warm"]),
    )
    _check_consistent(snapshot)
    return snapshot


def _check_consistent(snapshot: Snapshot) -> None:
    if (":" in snapshot.peer.address) != snapshot.is_ipv6:
        raise ValueError("local and peer are of different families")
    if (snapshot.send_scale is None) != (snapshot.receive_scale is None):
        raise ValueError("window scaling is for both directions or for none")
    if snapshot.is_ipv6 and snapshot.v4_mapped:
        raise ValueError("an IPv6 address cannot be v4-mapped")
    _check_fins(snapshot)
    _check_segments(snapshot)
    _check_window(snapshot.window, snapshot.receive_next)


def _check_window(window: Window, receive_next: int) -> None:
    """What the kernel insists on (tcp_repair_set_window)."""
    if window.max_window < window.snd_wnd:
        raise ValueError("window: snd_wnd is more than max_window")
    if _is_after(window.snd_wl1, receive_next + window.rcv_wnd) or _is_after(window.rcv_wup, receive_next):
        raise ValueError("window: snd_wl1 or rcv_wup lies beyond what was received")


def _check_fins(snapshot: Snapshot) -> None:
    if snapshot.fin_unsent and snapshot.state not in FIN_SENT:
        raise ValueError("fin_unsent: there is no FIN to send")
    if snapshot.fin_read and (snapshot.state not in FIN_RECEIVED or snapshot.receive_queue):
        raise ValueError("fin_read: the application cannot have seen a FIN")
    if snapshot.unsent and snapshot.state in FIN_SENT and not snapshot.fin_unsent:
        raise ValueError("the FIN cannot overtake unsent data")
    if snapshot.state == FIN_WAIT2 and (snapshot.unacked or snapshot.unsent):
        raise ValueError("everything was acknowledged in FIN_WAIT2")
    if snapshot.segments and snapshot.state in FIN_RECEIVED:
        raise ValueError("nothing comes after a FIN")


def _check_segments(snapshot: Snapshot) -> None:
    """Ascending, apart from what was received in order, within the window."""
    end, limit = snapshot.receive_next + 1, snapshot.receive_next + snapshot.window.rcv_wnd
    for segment in snapshot.segments:
        following = segment.sequence + len(segment.data)
        if not segment.data or _is_after(end, segment.sequence) or _is_after(following, limit):
            raise ValueError(f"segment at {segment.sequence}: empty, not in order, or outside the window")
        end = following


def _is_after(one: int, other: int) -> bool:
    """In sequence space (RFC 9293 section 3.4)."""
    return 0 < (one - other) & _U32 < 1 << 31


def _queues(lengths: object, headers: object, body: bytes) -> tuple[bytes, bytes, bytes, tuple[Segment, ...]]:
    if type(lengths) is not list or len(lengths) != 3 or any(type(n) is not int or n < 0 for n in lengths):
        raise ValueError("queues: three lengths are needed")
    first, second, third = lengths
    whole = first + second + third
    segments = _segments(headers, body[whole:])
    announced = whole + sum(len(segment.data) for segment in segments)
    if announced != len(body):
        raise ValueError(f"queues: {announced} bytes announced, {len(body)} came")
    if len(body) > MAX_QUEUE:
        raise ValueError(f"queues: more than {MAX_QUEUE} bytes")
    return body[:first], body[first : first + second], body[first + second : whole], segments


def _segments(headers: object, body: bytes) -> tuple[Segment, ...]:
    if type(headers) is not list or len(headers) > MAX_SEGMENTS:
        raise ValueError(f"segments: not a list of at most {MAX_SEGMENTS}")
    found, at = [], 0
    for header in headers:
        if type(header) is not list or [type(number) for number in header] != [int, int]:
            raise ValueError("segments: each is [sequence, length]")
        sequence, length = header
        if not 0 <= sequence <= _U32 or not 0 < length <= len(body) - at:
            raise ValueError("segments: a sequence number or a length is out of range")
        found.append(Segment(sequence, body[at : at + length]))
        at += length
    return tuple(found)


def _state(value: object) -> int:
    if type(value) is not int or value not in STATES:
        raise ValueError(f"state {value!r} is not one of {sorted(STATES)}")
    return value


def _endpoint(value: object) -> Endpoint:
    if type(value) is not list or len(value) != 2 or type(value[0]) is not str or type(value[1]) is not int:
        raise ValueError("an endpoint is [address, port]")
    if not 0 < value[1] <= _U16:
        raise ValueError(f"port {value[1]} is out of range")
    return Endpoint(_address(value[0]), value[1])


@functools.lru_cache(maxsize=4096)
def _address(text: str) -> str:
    address = ipaddress.ip_address(text)
    if str(address) != text or "%" in text:
        raise ValueError(f"address {text!r} is not in canonical form")
    if address.is_multicast or address.is_unspecified or getattr(address, "ipv4_mapped", None):
        raise ValueError(f"address {text} cannot be an end of a connection")
    return text


def _number(name: str, value: object, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= _RANGES[name]:
        raise ValueError(f"{name}: {value!r} is not a number from {least} to {_RANGES[name]}")
    return value


def _scale(value: object) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value <= MAX_SCALE):
        raise ValueError(f"window scale {value!r} is not null or 0 to {MAX_SCALE}")
    return value


def _flag(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{name}: {value!r} is not true or false")
    return value


def _window(values: object) -> Window:
    if type(values) is not list or len(values) != len(_WINDOW_NAMES):
        raise ValueError("window: five numbers are needed")
    return Window(*(_number(name, value) for name, value in zip(_WINDOW_NAMES, values, strict=True)))


def _options(values: object) -> Options:
    if type(values) is not list or len(values) != len(_OPTION_NAMES):
        raise ValueError(f"options: {len(_OPTION_NAMES)} values are needed")
    named = dict(zip(_OPTION_NAMES, values, strict=True))
    congestion = named.pop("congestion")
    if type(congestion) is not str or len(congestion) > 15 or not congestion.isascii():
        raise ValueError(f"congestion: {congestion!r} is not a name of a congestion control")
    checked: dict[str, Any] = {name: _flag(name, named.pop(name)) for name in _FLAGS}
    checked |= {name: _number(name, value) for name, value in named.items()}
    return Options(**checked, congestion=congestion)
