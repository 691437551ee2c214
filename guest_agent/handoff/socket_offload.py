# SPDX-License-Identifier: Apache-2.0
"""The kernel module `socket_offload`: a connection leaves a socket in one call and enters another in one. The only Python file
that knows the module's numbers; the manual is `host_module/socket_offload/uapi/socket_offload.h`, and a test compares the two."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import ipaddress
import os
import socket
import struct
from typing import NamedTuple

from guest_agent.handoff.errors import NotMovable, Reason
from guest_agent.handoff.segment import packed
from guest_agent.handoff.snapshot import MAX_QUEUE, Endpoint, Options, Segment, Snapshot, Window
from guest_agent.handoff.warm import NEVER, Warm

DEVICE = "/dev/socket_offload"
VERSION = 1

HANDSHAKE, FREEZE_EXPORT, IMPORT, THAW, ABORT = 0xC018B500, 0xC020B501, 0xC038B502, 0xC010B503, 0xC010B504
OWN = 1
BIND, OPTIONS = 1, 2

WSCALE, SACK, TIMESTAMPS, USEC_TS, MAPPED, FIN_UNSENT, FIN_READ, WARM, NODELAY, CORK, KEEPALIVE, ECN = (
    1 << bit for bit in range(12)
)

_HANDSHAKE = struct.Struct("=6I")
_EXPORT = struct.Struct("=IiiIQII")
_IMPORT = struct.Struct("=IiiIQII16sH6x")
_THAW = struct.Struct("=IiII")
_SNAPSHOT = struct.Struct("=IIBBBBHH16s16s26I16sII")
_WARM = struct.Struct("=22IQQQ104s")
_SEGMENT = struct.Struct("=II")
_AF_INET, _AF_INET6 = int(socket.AF_INET), int(socket.AF_INET6)
NO_UPPER_LAYER = (0, 0)
"""Kind and bytes: the place of kTLS, which nobody can move yet."""

_REASONS = {
    1: (Reason.NOT_TCP, "only TCP over IPv4 or IPv6 can be moved"),
    2: (Reason.NOT_ESTABLISHED, "the connection is not established, or over"),
    3: (Reason.MPTCP, "a multipath connection cannot be moved"),
    4: (Reason.UPPER_LAYER, "an upper layer protocol (kTLS, ...) sits on the socket"),
    5: (Reason.AUTHENTICATED, "segments are signed (TCP MD5 or TCP-AO); the key cannot be moved"),
    6: (Reason.URGENT_DATA, "urgent data is pending"),
    7: (Reason.SOCKET_FILTER, "the application attached a filter of its own to this socket"),
    8: (Reason.NOT_ESTABLISHED, "the socket is frozen already, or is not frozen"),
    9: (Reason.BAD_SNAPSHOT, "the kernel refuses the snapshot: it contradicts itself"),
    10: (Reason.BAD_SNAPSHOT, "this kernel cannot continue timestamps in microseconds"),
}


class Handshake(NamedTuple):
    """What the module says of itself. `kernel` as LINUX_VERSION_CODE."""

    version: int
    snapshot_size: int
    segment_size: int
    kernel: int
    features: int


class Device:
    """The module, opened. Raises OSError: ENOENT (not loaded), EPROTO (another version), EACCES."""

    def __init__(self, path: str = DEVICE) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._make_room(128 << 10)
        try:
            self.handshake = self._greet()
        except OSError:
            os.close(self._fd)
            raise

    def _greet(self) -> Handshake:
        call = bytearray(_HANDSHAKE.pack(_HANDSHAKE.size, VERSION, 0, 0, 0, 0))
        fcntl.ioctl(self._fd, HANDSHAKE, call)
        found = Handshake(*_HANDSHAKE.unpack(call)[1:])
        if (found.snapshot_size, found.segment_size) != (_SNAPSHOT.size + _WARM.size, _SEGMENT.size):
            raise OSError(errno.EPROTO, "the module's structures have other sizes than ours")
        return found

    def fileno(self) -> int:
        """The device's descriptor."""
        return self._fd

    def close(self) -> None:
        """Close the device; frozen sockets stay as they are."""
        os.close(self._fd)

    def freeze_export(self, sock: socket.socket, filter_fd: int = -1, *, own: bool = False) -> Snapshot:
        """Freeze the socket and describe it. On any error it is as it was. Raises NotMovable, OSError."""
        while True:
            room = self._room
            call = bytearray(_EXPORT.pack(_EXPORT.size, sock.fileno(), filter_fd, OWN * own, self._address, len(room), 0))
            try:
                self._call(FREEZE_EXPORT, call, reason_at=28)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                self._make_room(_movable(_length(call)))
                continue
            return unpack(memoryview(room)[: _length(call)])

    def _make_room(self, needed: int) -> None:
        """Memory for a blob, that the kernel writes to or reads from; it stays for the next call."""
        self._room = bytearray(2 * needed)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._room))

    def import_into(
        self,
        sock: socket.socket,
        snapshot: Snapshot,
        filter_fd: int = -1,
        *,
        bind: Endpoint | None = None,
        options: bool = False,
        mark: int | None = None,
    ) -> None:
        """The closed or frozen socket becomes what the snapshot says, frozen. Raises NotMovable, OSError."""
        self.import_blob(sock, pack(snapshot, mark=mark), filter_fd, bind=bind, options=options)

    def import_blob(
        self, sock: socket.socket, made: bytes, filter_fd: int = -1, *, bind: Endpoint | None = None, options: bool = False
    ) -> None:
        """The same with a blob as `pack` makes it."""
        length = len(made)
        if length > len(self._room):
            self._make_room(length)
        self._room[:length] = made
        flags = (BIND if bind else 0) | (OPTIONS if options else 0)
        local, port = (packed(bind.address), bind.port) if bind else (b"", 0)
        values = (_IMPORT.size, sock.fileno(), filter_fd, flags, self._address, length, 0, local, port)
        self._call(IMPORT, bytearray(_IMPORT.pack(*values)), reason_at=28)

    def thaw(self, sock: socket.socket) -> None:
        """The connection lives on here. Raises NotMovable if it is not frozen, OSError."""
        self._call(THAW, bytearray(_THAW.pack(_THAW.size, sock.fileno(), 0, 0)), reason_at=8)

    def abort(self, sock: socket.socket) -> None:
        """Nothing happened: undo `freeze_export`."""
        self._call(ABORT, bytearray(_THAW.pack(_THAW.size, sock.fileno(), 0, 0)), reason_at=8)

    def _call(self, number: int, call: bytearray, *, reason_at: int) -> None:
        try:
            fcntl.ioctl(self._fd, number, call)
        except OSError as error:
            reason = int.from_bytes(call[reason_at : reason_at + 4], "little")
            if error.errno == errno.EOPNOTSUPP and reason in _REASONS:
                raise NotMovable(*_REASONS[reason]) from None
            raise


def _movable(needed: int) -> int:
    """The bytes that a blob takes up, if they are not too many."""
    if needed > MAX_QUEUE:
        raise NotMovable(Reason.QUEUE_TOO_LARGE, f"{needed} bytes are queued, at most {MAX_QUEUE} can be moved")
    return needed


def _length(call: bytearray) -> int:
    return int.from_bytes(call[24:28], "little")


def pack(snapshot: Snapshot, *, mark: int | None = None) -> bytes:
    """A blob as `SKOFF_IMPORT` takes it; `mark` instead of the snapshot's."""
    segments = snapshot.segments
    headers = [_SEGMENT.pack(segment.sequence, len(segment.data)) for segment in segments]
    early = [segment.data for segment in segments]
    queues = (snapshot.receive_queue, snapshot.unacked, snapshot.unsent)
    return b"".join((_pack_fixed(snapshot, mark), _pack_warm(snapshot.warm), *headers, *queues, *early))


def _pack_flags(snapshot: Snapshot) -> int:
    options, warm = snapshot.options, snapshot.warm
    flags = WSCALE * (snapshot.send_scale is not None) | SACK * snapshot.sack | TIMESTAMPS * snapshot.timestamps
    flags |= USEC_TS * snapshot.timestamp_usec | MAPPED * snapshot.v4_mapped
    flags |= FIN_UNSENT * snapshot.fin_unsent | FIN_READ * snapshot.fin_read
    flags |= NODELAY * options.nodelay | CORK * options.cork | KEEPALIVE * options.keepalive
    return flags if warm is None else flags | WARM | ECN * warm.ecn


def _pack_fixed(snapshot: Snapshot, mark: int | None) -> bytes:
    options, window, warm = snapshot.options, snapshot.window, snapshot.warm
    return _SNAPSHOT.pack(
        _SNAPSHOT.size + _WARM.size,
        _pack_flags(snapshot),
        snapshot.state,
        _AF_INET6 if snapshot.is_ipv6 else _AF_INET,
        snapshot.send_scale or 0,
        snapshot.receive_scale or 0,
        snapshot.local.port,
        snapshot.peer.port,
        packed(snapshot.local.address),
        packed(snapshot.peer.address),
        snapshot.send_sequence,
        snapshot.receive_sequence,
        len(snapshot.segments),
        len(snapshot.receive_queue),
        len(snapshot.unacked),
        len(snapshot.unsent),
        snapshot.mss,
        warm.mss_cache if warm else 0,
        window.snd_wl1,
        window.snd_wnd,
        window.max_window,
        window.rcv_wnd,
        window.rcv_wup,
        next_timestamp(snapshot),
        warm.ts_recent if warm else 0,
        warm.ts_recent_age if warm else NEVER,
        options.keepalive_idle,
        options.keepalive_interval,
        options.keepalive_count,
        options.send_buffer,
        options.receive_buffer,
        options.buffer_lock,
        options.traffic_class,
        options.mark if mark is None else mark,
        options.priority,
        options.user_timeout,
        options.congestion.encode("ascii"),
        *NO_UPPER_LAYER,
    )


def next_timestamp(snapshot: Snapshot) -> int:
    """One more than the last TSval: it must never go back (PAWS, RFC 7323 section 5)."""
    return (snapshot.timestamp + 1) & 0xFFFFFFFF


def _pack_warm(warm: Warm | None) -> bytes:
    return bytes(_WARM.size) if warm is None else _WARM.pack(*warm[_WARM_FROM:])


_WARM_FROM = Warm._fields.index("snd_cwnd")


def unpack(blob: memoryview) -> Snapshot:
    """What `SKOFF_FREEZE_EXPORT` wrote. Raises NotMovable: a newer module has put in what this program does not know."""
    fixed = _SNAPSHOT.unpack_from(blob)
    _, flags, state, family, send_scale, receive_scale, local_port, peer_port, local, peer = fixed[:10]
    numbers, congestion = fixed[10:36], fixed[36]
    if fixed[37:] != NO_UPPER_LAYER:
        raise NotMovable(*_REASONS[4])
    sequence, received, segments, *lengths, mss, mss_cache, wl1, snd, most, rcv, wup, stamp, recent, age = numbers[:16]
    size = 16 if family == socket.AF_INET6 else 4
    queues, early = _unpack_queues(blob, _SNAPSHOT.size + _WARM.size, segments, lengths)
    warm = Warm(mss_cache, recent, age, int(flags & ECN > 0), *_WARM.unpack_from(blob, _SNAPSHOT.size)) if flags & WARM else None
    return Snapshot(
        local=Endpoint(_text(local[:size]), local_port),
        peer=Endpoint(_text(peer[:size]), peer_port),
        send_sequence=sequence,
        receive_sequence=received,
        mss=mss,
        send_scale=send_scale if flags & WSCALE else None,
        receive_scale=receive_scale if flags & WSCALE else None,
        timestamp=stamp,
        window=Window(wl1, snd, most, rcv, wup),
        options=_unpack_options(flags, numbers[16:], congestion),
        receive_queue=queues[0],
        unacked=queues[1],
        unsent=queues[2],
        state=state,
        segments=early,
        warm=warm,
        sack=bool(flags & SACK),
        timestamps=bool(flags & TIMESTAMPS),
        timestamp_usec=bool(flags & USEC_TS),
        v4_mapped=bool(flags & MAPPED),
        fin_unsent=bool(flags & FIN_UNSENT),
        fin_read=bool(flags & FIN_READ),
    )


def _unpack_options(flags: int, numbers: tuple[int, ...], congestion: bytes) -> Options:
    """The numbers are in the order of `Options`' fields."""
    switches = bool(flags & NODELAY), bool(flags & CORK), bool(flags & KEEPALIVE)
    return Options(*switches, *numbers, _name(congestion))  # type: ignore[call-arg, arg-type]


@functools.lru_cache(maxsize=64)
def _name(congestion: bytes) -> str:
    return congestion.split(b"\0")[0].decode("ascii", "replace")


@functools.lru_cache(maxsize=4096)
def _text(address: bytes) -> str:
    return str(ipaddress.ip_address(address))


def _unpack_queues(blob: memoryview, at: int, count: int, lengths: list[int]) -> tuple[list[bytes], tuple[Segment, ...]]:
    headers = [_SEGMENT.unpack_from(blob, at + _SEGMENT.size * number) for number in range(count)]
    at += _SEGMENT.size * count
    pieces = []
    for length in (*lengths, *(length for _, length in headers)):
        pieces.append(bytes(blob[at : at + length]))
        at += length
    early = (Segment(sequence, data) for (sequence, _), data in zip(headers, pieces[3:], strict=True))
    return pieces[:3], tuple(early)
