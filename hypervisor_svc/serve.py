# SPDX-License-Identifier: Apache-2.0
"""Step 6a: serve. sendfile(2) from the shared folder's page cache to many clients at once, in one thread.

Connections that can take bytes take turns, a quantum each, in the order of `schedule.py`. Sockets sit in one
edge-triggered epoll. A part of a file that is not in the page cache is read in by a small pool of threads first, so the
disk never stops the loop (preadv2(2), RWF_NOWAIT).

A transfer is over when the client has acknowledged all of it: the kernel itself says when, through the socket's error
queue (SOF_TIMESTAMPING_TX_ACK, Documentation/networking/timestamping.rst), so nobody polls and nobody waits too long. Then its
client may ask for what was anticipated (`anticipate.py`), and is served on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import socket
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

from guest_agent.handoff import kernel
from guest_agent.handoff.errors import Reason
from guest_agent.handoff.restore import set_congestion
from guest_agent.handoff.state import Host
from hypervisor_svc.anticipate import NotAnticipated, begin
from hypervisor_svc.connection import Connection
from hypervisor_svc.schedule import PRIORITIES, Schedule

_SO_TIMESTAMPING = 37
_TX_ACK, _OPT_TSONLY = 1 << 9, 1 << 11
_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_READ_ERRORS = frozenset({errno.EIO, errno.ESTALE, errno.EUCLEAN, errno.EBADMSG})
SWEEP_INTERVAL = 0.05
UNSENT_BYTES = 1 << 19
"""What waits unsent in a socket at most (TCP_NOTSENT_LOWAT, tcp(7)): of a slow client it would be megabytes, and all of it is
looked at when the connection goes home."""
COLD_CONGESTION = "reno"
"""Of a socket that is to be BBR's: plain slow start (RFC 5681) for the first round trip."""


class Server:
    """`on_finished(connection)` when all is sent and acknowledged or the file ended; `on_gone(connection, errno)` when
    the client is. `next_request(connection)`: seconds that it waits for one."""

    def __init__(
        self,
        schedule: Schedule,
        *,
        quantum: int,
        next_request: Callable[[Connection], float],
        on_finished: Callable[[Connection], None],
        on_gone: Callable[[Connection, int], None],
    ) -> None:
        self._schedule, self._quantum, self._next_request = schedule, quantum, next_request
        self._on_finished, self._on_gone = on_finished, on_gone
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._by_fd: dict[int, _Sending] = {}
        self._waiting_for_ack: set[Connection] = set()
        self._fetching: set[Connection] = set()
        self._listening: dict[Connection, asyncio.TimerHandle] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="streamlift-read")
        self._loop.add_reader(self._epoll, self._events)

    def close(self) -> None:
        """Stop; the connections are the caller's."""
        self._loop.remove_reader(self._epoll)
        self._epoll.close()
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._sweep is not None:
            self._sweep.cancel()

    def add(self, connection: Connection) -> None:
        """Serve from now on; the first bytes leave before this returns."""
        assert connection.sock is not None
        fd = connection.sock.fileno()
        connection.sock.setsockopt(socket.IPPROTO_TCP, kernel.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self._by_fd[fd] = _Sending(connection, self._advance)
        if connection.finished:  # it was on its way home, and ends here
            self._await_acknowledgement(connection)
        else:
            self._advance(connection)
        if fd in self._by_fd:
            self._epoll.register(fd, _EVENTS)

    def serves(self, connection: Connection) -> bool:
        """Whether it is not sent and acknowledged yet."""
        return connection.sock is not None and connection.sock.fileno() in self._by_fd

    def remove(self, connection: Connection) -> None:
        """Stop serving at a byte boundary; idempotent."""
        self._waiting_for_ack.discard(connection)
        self._stop_listening(connection)
        sending = self._by_fd.pop(connection.sock.fileno(), None) if connection.sock is not None else None
        if sending is None or connection.sock is None:
            return
        with contextlib.suppress(OSError):
            self._epoll.unregister(connection.sock.fileno())
        self._schedule.remove(sending)

    def _events(self) -> None:
        for fd, events in self._epoll.poll(0, 256):
            sending = self._by_fd.get(fd)
            if sending is not None:
                self._event(sending.connection, events)

    def _event(self, connection: Connection, events: int) -> None:
        assert connection.sock is not None
        if events & (select.EPOLLERR | select.EPOLLHUP):
            error = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error or events & select.EPOLLHUP:
                self._gone(connection, error or errno.ECONNRESET)
                return
        if connection in self._listening:
            self._listen(connection)
        elif connection.finished:
            self._check_acknowledged(connection)
        elif events & select.EPOLLOUT:
            if connection.cold:
                _warm_up(connection)
            self._enqueue(connection)

    # Turns.

    def _enqueue(self, connection: Connection) -> None:
        assert connection.sock is not None
        sending = self._by_fd.get(connection.sock.fileno())
        if sending is not None:
            self._schedule.add(sending)

    def _advance(self, connection: Connection) -> None:
        """One quantum. The file's part is in memory, or is fetched first; meanwhile nothing else of it is sent."""
        assert connection.sock is not None
        if connection in self._fetching:
            return
        length = min(connection.job.count - connection.sent, self._quantum)
        offset = connection.job.offset + connection.sent
        if not _resident(connection.file, offset, length):
            self._fetch(connection, offset, length)
            return
        self._send(connection, offset, length)

    def _send(self, connection: Connection, offset: int, length: int) -> None:
        assert connection.sock is not None
        try:
            if length == connection.job.count - connection.sent:
                connection.sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPING, _TX_ACK | _OPT_TSONLY)
            sent = os.sendfile(connection.sock.fileno(), connection.file, offset, length)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in _READ_ERRORS:
                self._unreadable(connection, error)
            else:
                self._gone(connection, error.errno or errno.ECONNRESET)
            return
        self._account(connection, sent)

    def _account(self, connection: Connection, sent: int) -> None:
        connection.sent += sent
        connection.guest.bytes_sent += sent
        if sent == 0:
            connection.reason = Reason.FILE_SHORT
            connection.message = f"the file ended after {connection.sent} of {connection.job.count} bytes"
        if sent == 0 or connection.sent == connection.job.count:
            self._await_acknowledgement(connection)
        else:
            self._enqueue(connection)

    def _unreadable(self, connection: Connection, error: OSError) -> None:
        """The connection goes home with what was sent, and the application learns why."""
        connection.reason, connection.errno = Reason.READ_ERROR, error.errno or errno.EIO
        connection.message = f"reading {connection.job.path!r}: {error.strerror}"
        self._await_acknowledgement(connection)

    def _gone(self, connection: Connection, number: int) -> None:
        self.remove(connection)
        self._on_gone(connection, number)

    # Acknowledged?

    def _await_acknowledgement(self, connection: Connection) -> None:
        connection.finished = True
        self._waiting_for_ack.add(connection)
        self._check_acknowledged(connection)

    def _check_acknowledged(self, connection: Connection) -> None:
        assert connection.sock is not None
        if _unacknowledged(connection.sock) == 0:
            self._waiting_for_ack.discard(connection)
            self._acknowledged(connection)
        elif self._sweep is None:
            self._sweep = self._loop.call_later(SWEEP_INTERVAL, self._sweep_acknowledged)

    def _sweep_acknowledged(self) -> None:
        """A net below the error queue, whose notice the kernel drops when socket memory is short."""
        self._sweep = None
        for connection in list(self._waiting_for_ack):
            self._check_acknowledged(connection)

    def _acknowledged(self, connection: Connection) -> None:
        seconds = self._next_request(connection) if connection.goes_on and connection.reason is None else 0.0
        if seconds:
            self._listening[connection] = self._loop.call_later(seconds, self._over, connection)
            self._listen(connection)
        else:
            self._over(connection)

    def _over(self, connection: Connection) -> None:
        self.remove(connection)
        self._on_finished(connection)

    # Another request?

    def _listen(self, connection: Connection) -> None:
        try:
            if not begin(connection):
                return
        except NotAnticipated:
            self._over(connection)
        except OSError as error:
            self._gone(connection, error.errno or errno.ECONNRESET)
        else:
            self._stop_listening(connection)
            self._advance(connection)

    def listen_again(self, connection: Connection) -> None:
        """What it waits for, if it does, is another now, or nothing."""
        if connection in self._listening and connection.goes_on:
            self._listen(connection)
        elif connection in self._listening:
            self._over(connection)

    def _stop_listening(self, connection: Connection) -> None:
        timer = self._listening.pop(connection, None)
        if timer is not None:
            timer.cancel()

    # The disk.

    def _fetch(self, connection: Connection, offset: int, length: int) -> None:
        try:
            file = os.dup(connection.file)
        except OSError as error:
            self._unreadable(connection, error)
            return
        self._fetching.add(connection)
        future = self._loop.run_in_executor(self._readers, _read_in, file, offset, length)
        future.add_done_callback(lambda done: self._fetched(connection, offset, length, done))

    def _fetched(self, connection: Connection, offset: int, length: int, done: asyncio.Future[None]) -> None:
        """Send without asking again whether the part is resident: under memory pressure it might never be."""
        self._fetching.discard(connection)
        if connection.state is not Host.SERVING or connection.sock is None or done.cancelled():
            return
        if connection.sock.fileno() not in self._by_fd:
            return
        error = done.exception()
        if isinstance(error, OSError):
            self._unreadable(connection, error)
        else:
            self._send(connection, offset, length)


class _Sending:
    """A connection that is served, as a `schedule.Task`."""

    def __init__(self, connection: Connection, advance: Callable[[Connection], None]) -> None:
        self.connection, self._advance = connection, advance

    @property
    def owner(self) -> Hashable:
        """See `schedule.Task`."""
        return self.connection.guest

    @property
    def rank(self) -> tuple[int, int]:
        """See `schedule.Task`."""
        return self.connection.guest.level, PRIORITIES.index(self.connection.job.priority)

    def turn(self) -> None:
        """See `schedule.Task`."""
        self._advance(self.connection)


def paces(congestion: str) -> bool:
    """Whether a congestion control paces by a model of the path (BBR and its successors). Without a round-trip time it takes
    one of 1 ms for granted (tcp_bbr.c, bbr_init_pacing_rate_from_rtt), and a segment crawls at a tenth of a LAN's speed."""
    return congestion.startswith("bbr")


def _warm_up(connection: Connection) -> None:
    """The application's own congestion control takes over once a round trip has been measured, and begins with it."""
    assert connection.sock is not None
    if int.from_bytes(connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 72)[68:], "little"):
        connection.cold = False
        set_congestion(connection.sock, connection.job.snapshot.options.congestion)


def _unacknowledged(sock: socket.socket) -> int:
    return int.from_bytes(fcntl.ioctl(sock.fileno(), kernel.SIOCOUTQ, b"\0\0\0\0"), "little")


def _resident(file: int, offset: int, length: int) -> bool:
    """Whether first and last byte are in the page cache. True where the file system cannot tell (no RWF_NOWAIT)."""
    probe = bytearray(1)
    try:
        os.preadv(file, [probe], offset, os.RWF_NOWAIT)
        os.preadv(file, [probe], offset + length - 1, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno in (errno.EOPNOTSUPP, errno.EINVAL)
    return True


def _read_in(file: int, offset: int, length: int) -> None:
    """Bring a part of a file into the page cache; runs in a thread. Closes `file`."""
    try:
        buffer = bytearray(1 << 17)
        for at in range(offset, offset + length, len(buffer)):
            os.preadv(file, [buffer], at)
    finally:
        os.close(file)
