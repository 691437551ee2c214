# SPDX-License-Identifier: Apache-2.0
"""Step 4: restore. `Snapshot` -> a socket, still frozen; `freeze.thaw` and `send_unsent` bring it to life.

`restore_fresh` makes a new socket (host). `restore_in_place` rebuilds the connection inside a socket that the application
already holds (guest): same `struct sock`, so the file descriptor, its duplicates and its epoll registrations stay valid.
Both are the same list of steps (tcp(7), TCP_REPAIR); only the first one differs. The order matters: sequence numbers go in
while the socket is closed, options before data, the window last.
"""

from __future__ import annotations

import errno
import socket
import struct

from guest_agent.handoff import hold, kernel
from guest_agent.handoff.errors import HostError, NotMovable, Reason
from guest_agent.handoff.hold import Hold
from guest_agent.handoff.snapshot import ESTABLISHED, Endpoint, Options, Snapshot

_TCP, _SOL = socket.IPPROTO_TCP, socket.SOL_SOCKET
_setsockopt = socket.socket.setsockopt
_OVERHEAD = 65536
_SMALLEST_CHUNK = 256
_LEAST_MAXSEG, _MOST_MAXSEG = 88, 32767  # TCP_MIN_MSS and MAX_TCP_WINDOW of the kernel
TIMESTAMP_STEP = 2
"""The lowest bit of TCP_TIMESTAMP is a flag (tcp_usec_ts), so a stamp is rounded up: it must never go back (PAWS,
RFC 7323 section 5)."""


def restore_fresh(
    snapshot: Snapshot, keep: Hold | None, *, bind: Endpoint | None = None, transparent: bool = False, mark: int = 0
) -> socket.socket:
    """Return a new frozen socket that continues `snapshot`, bound to `bind` (default: the snapshot's own local end).

    `mark` replaces the snapshot's SO_MARK, which means something only on the machine it came from. Raises OSError."""
    _check_state(snapshot)
    sock = new_socket(snapshot, transparent=transparent)
    try:
        hold.attach(sock, keep)
        _setsockopt(sock, _TCP, kernel.TCP_REPAIR, kernel.REPAIR_ON)
        if mark:
            _setsockopt(sock, _SOL, socket.SO_MARK, mark)
        apply_options(sock, snapshot.options)
        _continue(sock, snapshot, bind or snapshot.local)
    except BaseException:
        sock.close()
        raise
    return sock


def new_socket(snapshot: Snapshot, *, transparent: bool) -> socket.socket:
    """A closed socket of the snapshot's family. Raises OSError."""
    sock = socket.socket(socket.AF_INET6 if snapshot.is_ipv6 else socket.AF_INET, socket.SOCK_STREAM, _TCP)
    try:
        sock.setblocking(False)
        if transparent:
            _make_transparent(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def restore_in_place(sock: socket.socket, snapshot: Snapshot) -> None:
    """Rebuild `snapshot` inside a frozen socket, whose options are still its own (tcp_disconnect keeps them). For some 40 us
    the kernel does not know the connection: a packet that comes then is answered with a RST. Raises OSError; the socket is
    then closed (TCP_CLOSE) but its descriptor valid, and may be tried again."""
    _check_state(snapshot)
    kernel.disconnect(sock.fileno())
    sock.getsockopt(_SOL, socket.SO_ERROR)  # ECONNABORTED of our own disconnect
    _setsockopt(sock, _SOL, socket.SO_MARK, snapshot.options.mark)  # the route is looked up with it
    _continue(sock, snapshot, snapshot.local)
    resume_keepalive(sock, snapshot)


def resume_keepalive(sock: socket.socket, snapshot: Snapshot) -> None:
    """A place-holder's was switched off (`guest_agent/hand_out.py`)."""
    if snapshot.options.keepalive:
        _setsockopt(sock, _SOL, socket.SO_KEEPALIVE, 1)


def _check_state(snapshot: Snapshot) -> None:
    if snapshot.state != ESTABLISHED:
        raise NotMovable(Reason.HALF_CLOSED, "one side has closed already; TCP_REPAIR restores only open connections")


def arrives_at(snapshot: Snapshot, expected: Snapshot) -> bool:
    """Whether a place-holder that was rebuilt as `expected` needs no more than `arrive`."""
    here = (snapshot.send_sequence, snapshot.receive_sequence, snapshot.unacked, snapshot.unsent)
    return here == (expected.send_sequence, expected.receive_sequence, b"", b"")


def arrive(sock: socket.socket, snapshot: Snapshot) -> None:
    """Complete a frozen place-holder that stands where `snapshot` does (`arrives_at`): what the peer has sent meanwhile, the
    clock and the window. The connection is known to the kernel all the time. Raises OSError."""
    if snapshot.receive_queue:
        _make_room(sock, snapshot)
        _fill(sock, kernel.RECEIVE_QUEUE, snapshot.receive_queue)
        _setsockopt(sock, _TCP, kernel.TCP_REPAIR_QUEUE, kernel.NO_QUEUE)
        _setsockopt(sock, _SOL, kernel.SO_BUF_LOCK, snapshot.options.buffer_lock)
        _wake_readers(sock)
    if snapshot.timestamps:
        _setsockopt(sock, _TCP, kernel.TCP_TIMESTAMP, struct.pack("=I", next_timestamp(snapshot)))
    _set_window(sock, snapshot)
    resume_keepalive(sock, snapshot)


def _wake_readers(sock: socket.socket) -> None:
    """Writing into a receive queue tells nobody; setting SO_RCVLOWAT, even to what it is, does (tcp_set_rcvlowat)."""
    _setsockopt(sock, _SOL, socket.SO_RCVLOWAT, sock.getsockopt(_SOL, socket.SO_RCVLOWAT))


def send_unsent(sock: socket.socket, snapshot: Snapshot, *, more: bool = False) -> None:
    """Queue the bytes that the old owner had not sent; to be called on a thawed socket, before anything else is sent. `more`:
    something else follows at once, and shares their last packet."""
    flags = socket.MSG_DONTWAIT | (socket.MSG_MORE if more else 0)
    data = memoryview(snapshot.unsent)
    while data:
        try:
            data = data[sock.send(data, flags) :]
        except BlockingIOError as error:
            raise HostError(Reason.RESTORE_FAILED, "the send buffer cannot take back what it held") from error


def _continue(sock: socket.socket, snapshot: Snapshot, local: Endpoint) -> None:
    """The list of steps that both ways share."""
    _set_sequences(sock, snapshot)
    _connect(sock, snapshot, local)
    _negotiate(sock, snapshot)
    _make_room(sock, snapshot)
    _fill(sock, kernel.RECEIVE_QUEUE, snapshot.receive_queue)
    _fill(sock, kernel.SEND_QUEUE, snapshot.unacked)
    _set_window(sock, snapshot)
    _setsockopt(sock, _TCP, kernel.TCP_REPAIR_QUEUE, kernel.NO_QUEUE)
    _setsockopt(sock, _SOL, kernel.SO_BUF_LOCK, snapshot.options.buffer_lock)


def _make_transparent(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        _setsockopt(sock, socket.IPPROTO_IPV6, kernel.IPV6_TRANSPARENT, 1)
    else:
        _setsockopt(sock, socket.IPPROTO_IP, kernel.IP_TRANSPARENT, 1)


def _set_sequences(sock: socket.socket, snapshot: Snapshot) -> None:
    for queue, sequence in (
        (kernel.RECEIVE_QUEUE, snapshot.receive_sequence),
        (kernel.SEND_QUEUE, snapshot.send_sequence),
    ):
        _setsockopt(sock, _TCP, kernel.TCP_REPAIR_QUEUE, queue)
        _setsockopt(sock, _TCP, kernel.TCP_QUEUE_SEQ, struct.pack("=I", sequence))


def _connect(sock: socket.socket, snapshot: Snapshot, local: Endpoint) -> None:
    """Bind and connect; in repair mode no packet is sent and the socket is ESTABLISHED at once. A socket that was
    restored in place before is still bound (SOCK_BINDPORT_LOCK), and binding twice is EINVAL."""
    mapped = sock.family == socket.AF_INET6 and not snapshot.is_ipv6
    prefix = "::ffff:" if mapped else ""
    try:
        sock.bind((prefix + local.address, local.port))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # connect() computes the segment size once, from this or from a default of 536 (tcp_connect_init, tcp_sync_mss): what
    # TCP_REPAIR_OPTIONS says afterwards is only a limit, and the connection would go on in small segments.
    _setsockopt(sock, _TCP, socket.TCP_MAXSEG, min(max(snapshot.mss, _LEAST_MAXSEG), _MOST_MAXSEG))
    sock.connect((prefix + snapshot.peer.address, snapshot.peer.port))


def _negotiate(sock: socket.socket, snapshot: Snapshot) -> None:
    options = [(kernel.TCPOPT_MSS, snapshot.mss)]
    if snapshot.send_scale is not None and snapshot.receive_scale is not None:
        options.append((kernel.TCPOPT_WINDOW, snapshot.send_scale | snapshot.receive_scale << 16))
    if snapshot.sack:
        options.append((kernel.TCPOPT_SACK_PERMITTED, 0))
    if snapshot.timestamps:
        options.append((kernel.TCPOPT_TIMESTAMP, 0))
    packed = b"".join(struct.pack("=II", *option) for option in options)
    _setsockopt(sock, _TCP, kernel.TCP_REPAIR_OPTIONS, packed)
    if snapshot.timestamps:
        _setsockopt(sock, _TCP, kernel.TCP_TIMESTAMP, struct.pack("=I", next_timestamp(snapshot)))


def next_timestamp(snapshot: Snapshot) -> int:
    """The first TSval of the new owner, with the flag for microseconds in its lowest bit."""
    rounded = (snapshot.timestamp + TIMESTAMP_STEP) & ~1 & 0xFFFFFFFF
    return rounded | snapshot.timestamp_usec


def _make_room(sock: socket.socket, snapshot: Snapshot) -> None:
    """Buffers that surely hold the queues: without room, send() in repair mode waits for ever."""
    options = snapshot.options
    unacknowledged = len(snapshot.unacked) + len(snapshot.unsent)
    send = max(options.send_buffer // 2, 2 * unacknowledged + _OVERHEAD)
    receive = max(options.receive_buffer // 2, 2 * len(snapshot.receive_queue) + _OVERHEAD)
    _setsockopt(sock, _SOL, kernel.SO_SNDBUFFORCE, send)
    _setsockopt(sock, _SOL, kernel.SO_RCVBUFFORCE, receive)


def _fill(sock: socket.socket, queue: int, data: bytes) -> None:
    """Write a queue in chunks, halved when the kernel has no contiguous memory for one (tcp_send_rcvq)."""
    if not data:
        return
    _setsockopt(sock, _TCP, kernel.TCP_REPAIR_QUEUE, queue)
    rest, chunk = memoryview(data), 1 << 16
    while rest:
        try:
            rest = rest[sock.send(rest[:chunk]) :]
        except OSError:
            chunk //= 2
            if chunk < _SMALLEST_CHUNK:
                raise


def _set_window(sock: socket.socket, snapshot: Snapshot) -> None:
    window = snapshot.window
    packed = struct.pack("=5I", window.snd_wl1, window.snd_wnd, window.max_window, window.rcv_wnd, window.rcv_wup)
    _setsockopt(sock, _TCP, kernel.TCP_REPAIR_WINDOW, packed)


def apply_options(sock: socket.socket, options: Options) -> None:
    """Set the application's options on a new socket that is not connected yet: the route is looked up and the congestion
    control begins with them. The buffers' sizes come with the queues (`_make_room`)."""
    if options.nodelay:
        _setsockopt(sock, _TCP, socket.TCP_NODELAY, 1)
    if options.cork:
        _setsockopt(sock, _TCP, socket.TCP_CORK, 1)
    if options.keepalive:
        _setsockopt(sock, _TCP, socket.TCP_KEEPIDLE, max(1, options.keepalive_idle))
        _setsockopt(sock, _TCP, socket.TCP_KEEPINTVL, max(1, options.keepalive_interval))
        _setsockopt(sock, _TCP, socket.TCP_KEEPCNT, max(1, options.keepalive_count))
        _setsockopt(sock, _SOL, socket.SO_KEEPALIVE, 1)
    if options.traffic_class:
        _set_traffic_class(sock, options.traffic_class)
    if options.user_timeout:
        _setsockopt(sock, _TCP, socket.TCP_USER_TIMEOUT, options.user_timeout)
    if options.priority:
        _setsockopt(sock, _SOL, socket.SO_PRIORITY, options.priority)
    set_congestion(sock, options.congestion)


def _set_traffic_class(sock: socket.socket, traffic_class: int) -> None:
    if sock.family == socket.AF_INET6:
        _setsockopt(sock, socket.IPPROTO_IPV6, socket.IPV6_TCLASS, traffic_class)
    else:
        _setsockopt(sock, socket.IPPROTO_IP, socket.IP_TOS, traffic_class)


def set_congestion(sock: socket.socket, name: str) -> None:
    """TCP_CONGESTION; one that this kernel lacks is left at its default."""
    if not name:
        return
    try:
        _setsockopt(sock, _TCP, socket.TCP_CONGESTION, name.encode("ascii"))
    except OSError:
        return
