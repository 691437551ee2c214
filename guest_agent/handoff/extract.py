# SPDX-License-Identifier: Apache-2.0
"""Step 2: extract. A frozen socket -> its `Snapshot`. The socket is only read (TCP_REPAIR, tcp(7))."""

from __future__ import annotations

import fcntl
import socket
import struct
from dataclasses import replace

from guest_agent.handoff import kernel
from guest_agent.handoff.errors import NotMovable, Reason
from guest_agent.handoff.snapshot import MAX_QUEUE, Endpoint, Options, Snapshot, Window

_TCP, _SOL = socket.IPPROTO_TCP, socket.SOL_SOCKET
_U32 = 0xFFFFFFFF
_MAPPED = "::ffff:"
_getsockopt = socket.socket.getsockopt
_setsockopt = socket.socket.setsockopt


def check_movable(sock: socket.socket) -> kernel.Info:
    """Raise NotMovable with the reason if this backend cannot move the socket; touch nothing. Call it before freezing."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        raise NotMovable(Reason.NOT_TCP, "only TCP over IPv4 or IPv6 can be moved")
    protocol = _getsockopt(sock, _SOL, kernel.SO_PROTOCOL)
    if protocol == kernel.IPPROTO_MPTCP:
        raise NotMovable(Reason.MPTCP, "a multipath connection cannot be moved")
    if protocol != _TCP:
        raise NotMovable(Reason.NOT_TCP, f"IP protocol {protocol} cannot be moved")
    info = kernel.parse_info(_getsockopt(sock, _TCP, socket.TCP_INFO, 20))
    if info.state != kernel.ESTABLISHED:
        raise _wrong_state(info.state)
    if _getsockopt(sock, _TCP, kernel.TCP_ULP, 16).strip(b"\0"):
        raise NotMovable(Reason.UPPER_LAYER, "an upper layer protocol (kTLS, ...) sits on the socket")
    return info


def _wrong_state(state: int) -> NotMovable:
    if state == kernel.LISTEN:
        return NotMovable(Reason.LISTENING, "a listening socket cannot be moved")
    if state in kernel.HALF_CLOSED_STATES:
        return NotMovable(Reason.HALF_CLOSED, "one side has closed already; this backend moves only open connections")
    return NotMovable(Reason.NOT_ESTABLISHED, f"TCP state {state} is not ESTABLISHED")


def extract(sock: socket.socket, *, known: Snapshot | None = None, spare: int = 0) -> Snapshot:
    """Return the state of a frozen socket, queues included. Raises NotMovable or OSError; the socket stays frozen.

    One whose peer has closed (CLOSE_WAIT) can be described, though TCP_REPAIR cannot restore it (`snapshot.before_fin`). What
    never changes (ends, options) is taken from `known`, if given: that spares two dozen system calls. Of the last `spare` bytes of
    the send queue those that were never sent are left out: whoever goes on has them from elsewhere."""
    info = kernel.parse_info(_getsockopt(sock, _TCP, socket.TCP_INFO, 20))
    closed = info.state == kernel.CLOSE_WAIT
    if info.state != kernel.ESTABLISHED and not closed:
        raise _wrong_state(info.state)
    local, peer, mapped = endpoints(sock) if known is None else (known.local, known.peer, known.v4_mapped)
    receive_queue, receive_next = _receive_queue(sock)
    sent, unsent_length, send_sequence = _send_queue(sock, spare)
    mss = _getsockopt(sock, _TCP, socket.TCP_MAXSEG)
    if known is None:
        _refuse_signed(sock, info, mss)
    unacked_length = len(sent) - unsent_length
    return Snapshot(
        local=local,
        peer=peer,
        send_sequence=send_sequence,
        receive_sequence=(receive_next - len(receive_queue) - closed) & _U32,
        mss=mss,
        send_scale=info.send_scale if info.scaling else None,
        receive_scale=info.receive_scale if info.scaling else None,
        sack=info.sack,
        timestamps=info.timestamps,
        timestamp=_getsockopt(sock, _TCP, kernel.TCP_TIMESTAMP) & _U32 if info.timestamps else 0,
        timestamp_usec=info.microseconds,
        window=_window(sock, receive_next),
        options=_options(sock) if known is None else known.options,
        v4_mapped=mapped,
        receive_queue=receive_queue,
        unacked=sent[:unacked_length],
        unsent=sent[unacked_length:],
        state=info.state,
    )


def endpoints(sock: socket.socket) -> tuple[Endpoint, Endpoint, bool]:
    """Local and peer end as they are on the wire, and whether the socket is IPv6 that carries IPv4."""
    local, peer = sock.getsockname(), sock.getpeername()
    if sock.family == socket.AF_INET:
        return Endpoint(local[0], local[1]), Endpoint(peer[0], peer[1]), False
    if not peer[0].startswith(_MAPPED):
        return Endpoint(local[0], local[1]), Endpoint(peer[0], peer[1]), False
    return Endpoint(_unmapped(local[0]), local[1]), Endpoint(_unmapped(peer[0]), peer[1]), True


def _unmapped(address: str) -> str:
    """getsockname(2) prints a v4-mapped address in dotted form (inet_ntop(3))."""
    if not address.startswith(_MAPPED):
        raise NotMovable(Reason.NOT_TCP, f"{address} is not a v4-mapped address")
    return address.removeprefix(_MAPPED)


def _receive_queue(sock: socket.socket) -> tuple[bytes, int]:
    """The bytes that the application has not read, and RCV.NXT."""
    _setsockopt(sock, _TCP, kernel.TCP_REPAIR_QUEUE, kernel.RECEIVE_QUEUE)
    sequence = _getsockopt(sock, _TCP, kernel.TCP_QUEUE_SEQ) & _U32
    return _peek(sock, _length(sock, kernel.SIOCINQ)), sequence


def _send_queue(sock: socket.socket, spare: int) -> tuple[bytes, int, int]:
    """The bytes not acknowledged (sent or not), how many of them were never sent, and the sequence of the first. The kernel gives
    all or none (tcp_peek_sndq)."""
    _setsockopt(sock, _TCP, kernel.TCP_REPAIR_QUEUE, kernel.SEND_QUEUE)
    after_last = _getsockopt(sock, _TCP, kernel.TCP_QUEUE_SEQ) & _U32
    length = _length(sock, kernel.SIOCOUTQ)
    unsent = _length(sock, kernel.SIOCOUTQNSD) if length else 0
    left_out = min(spare, unsent)
    return _peek(sock, length)[: length - left_out], unsent - left_out, (after_last - length) & _U32


def _window(sock: socket.socket, receive_next: int) -> Window:
    """rcv_wup is kept at or before RCV.NXT, as the kernel insists on restore (tcp_repair_set_window)."""
    window = Window(*struct.unpack("=5I", _getsockopt(sock, _TCP, kernel.TCP_REPAIR_WINDOW, 20)))
    if (receive_next - window.rcv_wup) & _U32 > 1 << 31:
        return replace(window, rcv_wup=receive_next)
    return window


def _length(sock: socket.socket, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(sock.fileno(), request, b"\0\0\0\0"), "little")


def _peek(sock: socket.socket, length: int) -> bytes:
    if length == 0:
        return b""
    if length > MAX_QUEUE:
        raise NotMovable(Reason.QUEUE_TOO_LARGE, f"{length} bytes are queued, at most {MAX_QUEUE} can be moved")
    data = sock.recv(length, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    if len(data) != length:
        raise NotMovable(Reason.URGENT_DATA, f"{len(data)} of {length} queued bytes can be read: urgent data?")
    return data


def _refuse_signed(sock: socket.socket, info: kernel.Info, mss: int) -> None:
    """A signed connection (RFC 2385, RFC 5925) keeps its key in the kernel. The signature takes at least 16 bytes of
    every segment, so most sockets are cleared by arithmetic alone; only a doubtful one costs a look at sock_diag."""
    if info.send_mss + (12 if info.timestamps else 0) + 16 > mss:
        return
    from guest_agent.handoff import signed

    if signed.is_signed(sock):
        raise NotMovable(Reason.AUTHENTICATED, "segments are signed (TCP MD5 or TCP-AO); the key cannot be moved")


def _options(sock: socket.socket) -> Options:
    level, name = (socket.IPPROTO_IP, socket.IP_TOS)
    if sock.family == socket.AF_INET6:
        level, name = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
    keepalive = bool(_getsockopt(sock, _SOL, socket.SO_KEEPALIVE))
    return Options(
        nodelay=bool(_getsockopt(sock, _TCP, socket.TCP_NODELAY)),
        cork=bool(_getsockopt(sock, _TCP, socket.TCP_CORK)),
        keepalive=keepalive,
        keepalive_idle=_getsockopt(sock, _TCP, socket.TCP_KEEPIDLE),
        keepalive_interval=_getsockopt(sock, _TCP, socket.TCP_KEEPINTVL),
        keepalive_count=_getsockopt(sock, _TCP, socket.TCP_KEEPCNT),
        send_buffer=_getsockopt(sock, _SOL, socket.SO_SNDBUF),
        receive_buffer=_getsockopt(sock, _SOL, socket.SO_RCVBUF),
        buffer_lock=_getsockopt(sock, _SOL, kernel.SO_BUF_LOCK),
        traffic_class=_getsockopt(sock, level, name) & 0xFF,
        mark=_getsockopt(sock, _SOL, socket.SO_MARK) & _U32,
        priority=_getsockopt(sock, _SOL, socket.SO_PRIORITY),
        user_timeout=_getsockopt(sock, _TCP, socket.TCP_USER_TIMEOUT),
        congestion=_getsockopt(sock, _TCP, socket.TCP_CONGESTION, 16).split(b"\0")[0].decode("ascii", "replace"),
    )
