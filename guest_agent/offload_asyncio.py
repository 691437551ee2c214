# SPDX-License-Identifier: Apache-2.0
"""Asking the agent from asyncio: one connection per event loop, replies matched to requests by number."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from guest_agent.handoff.anticipated import Anticipated, within_limits
from guest_agent.offload_move import Attendance
from guest_agent.offload_wire import (
    CROWDED,
    HELLO_LIMIT,
    MAX_MESSAGE,
    RECLAIM_LIMIT,
    RECLAIM_PAUSE,
    REFRESH_INTERVAL,
    RETRY_INTERVAL,
    Hello,
    Message,
    Refused,
    Reply,
    connect,
    decode,
    encode_anticipate,
    encode_attend,
    encode_let_go_of,
    encode_look,
    encode_reclaim,
    encode_sendfile,
    encode_status,
    here,
    lost,
    new_token,
    next_number,
    read_greeting,
    read_hello,
    read_reply,
    send_message,
)


class _Pending:
    """A request under way. `asked`: the agent may have acted on it, so only the agent can say how it ended.
    `when_over` runs once, also if nobody waits any more. `on_note` hears what the agent says meanwhile. `sent`: bytes that are
    delivered beside what the host of `token` sends, which was asked at `begun`."""

    __slots__ = ("anticipates", "asked", "begun", "fds", "future", "message", "on_note", "sent", "sock", "token", "when_over")

    def __init__(
        self,
        token: str,
        sock: Any,
        message: bytes,
        fds: tuple[int, ...],
        *,
        future: asyncio.Future[Reply],
        when_over: Callable[[], None] | None,
        on_note: Callable[[Message], None] | None = None,
    ) -> None:
        self.on_note = on_note
        self.token, self.sock, self.message, self.fds = token, sock, message, fds
        self.future, self.when_over, self.asked, self.anticipates = future, when_over, False, False
        self.begun, self.sent = time.monotonic(), 0

    def carry(self, token: str, sent: int) -> None:
        """Its VM moves, and it goes on at the next host."""
        self.token, self.sent, self.begun = token, sent, time.monotonic()

    def end(self, outcome: Reply | Exception) -> None:
        """Tell the caller, if it still waits."""
        if self.when_over is not None:
            self.when_over()
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class Link:
    """The one connection of an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._connection: socket.socket | None = None
        self._hello: Hello | None = None
        self._absent = "no_agent"
        self._retry_at = self._refreshed_at = 0.0
        self._opening: asyncio.Task[None] | None = None
        self._reclaiming: asyncio.Task[None] | None = None
        self._pending: dict[int, _Pending] = {}
        self._unsent: deque[int] = deque()
        self._untold: deque[bytes] = deque()
        self._looks: dict[int, asyncio.Future[int]] = {}
        self._attending: asyncio.Task[None] | None = None
        self.attendance = Attendance(answer=lambda: self.tell(encode_let_go_of(next_number())))

    async def refusal(self, file_fd: int, count: int) -> str | None:
        """Why the file is not for the host, mostly without asking anybody."""
        if self._hello is None:
            await self._open()
        hello = self._hello
        if hello is None:
            return self._absent
        reason = hello.refusal(file_fd, count)
        if reason is not None and hello.stale():
            self._refresh()
        return reason

    async def request(
        self,
        sock: Any,
        file_fd: int,
        offset: int,
        count: int,
        priority: str,
        *,
        on_move: str = "local",
        anticipate: Callable[[], Iterator[Anticipated]] | None = None,
        when_over: Callable[[], None] | None = None,
    ) -> Reply:
        """Ask the agent; `anticipate` is asked when the file is on its way. A cancelled caller leaves the request under way: its
        reply is still consumed."""
        number, token = next_number(), new_token()
        anticipates = anticipate is not None and self._hello is not None and self._hello.anticipates
        message = encode_sendfile(number, token, offset, count, priority, on_move=on_move, anticipates=anticipates)
        reply = self.begin(number, token, message, sock=sock, fds=(sock.fileno(), file_fd), when_over=when_over)
        if anticipates and anticipate is not None:
            self._foresee(number, within_limits(anticipate()))
        return await reply

    def anticipate_nothing(self) -> None:
        """What is out comes home as soon as it is delivered."""
        for pending in self._pending.values():
            if pending.anticipates:
                self.tell(encode_anticipate(pending.token, 0, ()))

    def _foresee(self, number: int, ahead: Iterator[Anticipated], first: int = 0) -> None:
        """Tell what may come after request `number`, as soon as that is with the agent, unless it is over before. In growing parts:
        the client may ask for the first at once, and others want to be served meanwhile."""
        pending = self._pending.get(number)
        if pending is None:
            return
        if not pending.asked:
            self.loop.call_later(RECLAIM_PAUSE, self._foresee, number, ahead, first)
            return
        pending.anticipates = True
        part = tuple(islice(ahead, 2 * first + 1))
        more = len(part) == 2 * first + 1
        message = encode_anticipate(pending.token, first, part, more=more)
        if len(message) > MAX_MESSAGE:
            more, message = False, encode_anticipate(pending.token, first, ())
        self.tell(message)
        if more:
            self.loop.call_soon(self._foresee, number, ahead, first + len(part))

    def begin(
        self,
        number: int,
        token: str,
        message: bytes,
        *,
        sock: Any,
        fds: tuple[int, ...],
        when_over: Callable[[], None] | None = None,
        on_note: Callable[[Message], None] | None = None,
    ) -> asyncio.Future[Reply]:
        """Send any request. `sock`: what is to be asked back from another agent, if this one is lost; None: nothing."""
        future: asyncio.Future[Reply] = self.loop.create_future()
        self._pending[number] = _Pending(token, sock, message, fds, future=future, when_over=when_over, on_note=on_note)
        self._send(number)
        return future

    def tell(self, message: bytes) -> None:
        """Send what has no answer. A lost agent has nothing to be told; one that is behind is told later, in this order."""
        if self._connection is not None:
            self._untold.append(message)
            self._tell_all()

    def _tell_all(self) -> None:
        while self._untold and self._connection is not None:
            try:
                send_message(self._connection, self._untold[0])
            except BlockingIOError:
                self.loop.add_writer(self._connection, self._writable)
                return
            except OSError:
                self._lose()
                return
            self._untold.popleft()

    async def look(self, path: str) -> int:
        """A descriptor that stands in for a file of the share that is away (`look.py`): the caller's to close. Raises OSError:
        what the host says, or EAGAIN if it cannot be asked."""
        number, seen = next_number(), self.loop.create_future()
        if self._connection is None or not self.attendance.may_look:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
        self._looks[number] = seen
        self.tell(encode_look(number, path))
        try:
            return int(await seen)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        finally:
            self._looks.pop(number, None)

    async def ready(self) -> str | None:
        """Why the agent cannot be asked anything now."""
        if self._hello is None:
            await self._open()
        return None if self._hello is not None else self._absent

    def elsewhere(self, path: str) -> str | None:
        """Why the host cannot read the file at this path; None: it is on a share."""
        hello = self._hello
        if hello is not None and path.startswith(hello.prefixes):
            return None
        if hello is not None and hello.stale():
            self._refresh()
        return "not_on_share"

    # Opening and losing the connection.

    async def _open(self) -> None:
        """Connect, unless the agent was absent a moment ago; concurrent callers share one attempt."""
        if self.loop.time() < self._retry_at or self._reclaiming is not None:
            return
        if self._opening is None:
            self._opening = self.loop.create_task(self._try_open())
        await asyncio.shield(self._opening)

    async def _try_open(self) -> None:
        try:
            connection = connect()
            try:
                data = await asyncio.wait_for(self.loop.sock_recv(connection, MAX_MESSAGE), HELLO_LIMIT)
                self._hello = decode(data, read_greeting)
            except BaseException:
                connection.close()
                raise
        except (OSError, TimeoutError, Refused) as error:
            self._absent = "not_allowed" if isinstance(error, Refused) else "no_agent"
            self._retry_at = self.loop.time() + RETRY_INTERVAL
        else:
            self._connection = connection
            self.loop.add_reader(connection, self._readable)
            self.tell(encode_attend(next_number()))
        finally:
            self._opening = None

    def _disconnect(self) -> None:
        connection, self._connection, self._hello = self._connection, None, None
        self._untold.clear()
        if connection is not None:
            self.loop.remove_reader(connection)
            self.loop.remove_writer(connection)
            connection.close()

    def _lose(self) -> None:
        """The agent went away: what it never got is sent from here, the rest is asked back from its next life."""
        self._disconnect()
        self._unsent.clear()
        self.attendance.lost()
        for seen in self._looks.values():
            _refuse(seen, errno.EAGAIN)
        for number in [number for number, pending in self._pending.items() if not pending.asked]:
            self._end(number, here("no_agent"))
        if (self._pending or self.attendance.away) and self._reclaiming is None:
            self._reclaiming = self.loop.create_task(self._reclaim())

    async def _reclaim(self) -> None:
        until = self.loop.time() + RECLAIM_LIMIT
        await self._try_open()
        while self._connection is None and self.loop.time() < until:
            await asyncio.sleep(RECLAIM_PAUSE)
            await self._try_open()
        self._reclaiming = None
        if self._connection is None:
            self.attendance.come_back()
        waiting, self._pending = self._pending, {}
        for pending in waiting.values():
            self._renew(pending)
        for number in list(self._pending):
            self._send(number)

    def _renew(self, pending: _Pending) -> None:
        """Turn a request into a reclaim, if there is somebody to ask and something to give."""
        fd = pending.sock.fileno() if pending.sock is not None else -1
        if self._connection is None or fd < 0:  # below zero: closed by the application, after a cancelled call
            pending.end(lost(self._absent))
            return
        number = next_number()
        pending.message, pending.fds = encode_reclaim(number, pending.token, pending.begun, sent=pending.sent), (fd,)
        self._pending[number] = pending

    def close_idle(self) -> None:
        """Close the connection if no request is under way."""
        if self.loop.is_closed():
            self.abandon()
        elif not self._pending and self._attending is None:
            self._disconnect()

    def abandon(self) -> None:
        """After fork, or when the loop is closed. The loop is left alone: a child shares its epoll with the parent."""
        if self._connection is not None:
            self._connection.close()

    def attend(self) -> None:
        """Keep a connection open from now on, whether or not anything is to be asked."""
        if self._attending is None:
            self._attending = self.loop.create_task(self._attend())

    async def _attend(self) -> None:
        while True:
            if self._hello is None and self._opening is None and self._reclaiming is None:
                await self._try_open()
            await asyncio.sleep(RECLAIM_PAUSE)

    # Messages out.

    def _send(self, number: int) -> None:
        """Send a pending request now, or as soon as the agent has caught up."""
        if self._connection is None:
            self._not_sent(number, ConnectionResetError())
        elif self._unsent or not self._try_send(number):
            self._unsent.append(number)
            self.loop.add_writer(self._connection, self._writable)

    def _try_send(self, number: int) -> bool:
        """False: the agent is behind. The descriptors stay open, for the caller waits and keeps socket and file."""
        pending = self._pending.get(number)
        if pending is None or self._connection is None:
            return True
        if pending.future.done() and not pending.asked:
            self._end(number, here("agent_busy"))  # cancelled meanwhile: its descriptors may be other files by now
            return True
        try:
            send_message(self._connection, pending.message, *pending.fds)
            pending.asked = True
        except BlockingIOError:
            return False
        except OSError as error:
            self._not_sent(number, error)
        return True

    def _writable(self) -> None:
        self._tell_all()
        while self._unsent and self._try_send(self._unsent[0]):
            if self._unsent:  # losing the connection empties it
                self._unsent.popleft()
        if not self._unsent and not self._untold and self._connection is not None:
            self.loop.remove_writer(self._connection)

    def _not_sent(self, number: int, error: OSError) -> None:
        """A dead connection concerns all requests, anything else this one."""
        if isinstance(error, ConnectionError):
            self._lose()
        elif self._pending[number].asked:
            self._end(number, lost(error))
        else:
            self._end(number, here("agent_busy") if error.errno in CROWDED else error)

    def _refresh(self) -> None:
        """Ask for the shares there are now; this transfer does not wait for the answer."""
        now = self.loop.time()
        if now - self._refreshed_at > REFRESH_INTERVAL and self._connection is not None and not self._unsent:
            self._refreshed_at = now
            with contextlib.suppress(OSError):
                send_message(self._connection, encode_status(next_number()))

    # Messages in.

    def _readable(self) -> None:
        """Take every reply that is there."""
        while self._connection is not None:
            try:
                data, fds, _, _ = socket.recv_fds(self._connection, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
                decode(data, partial(self._message, fds))
            except BlockingIOError:
                return
            except OSError:
                self._lose()

    def _message(self, fds: list[int], message: Message) -> None:
        told = message.get("hello") or message.get("status")
        if "presence" in message:
            self.attendance.hear(message, read_hello(message["hello"]).prefixes)
        if told:
            self._hello = read_hello(told)
        elif "looked" in message:
            self._looked(message, fds)
        elif "taken" in message or "relay_status" in message:
            self._note(message)
        elif "carried" in message:
            self._carried(message)
        else:
            reply = read_reply(message)
            self._end(message["id"], reply)

    def _looked(self, message: Message, fds: list[int]) -> None:
        seen = self._looks.get(message["id"])
        if seen is None or seen.done():
            for fd in fds:
                os.close(fd)
        elif fds:
            seen.set_result(fds[0])
        else:
            _refuse(seen, int(message["looked"]))

    def _carried(self, message: Message) -> None:
        pending = self._pending.get(message["id"])
        if pending is not None:
            pending.carry(str(message["token"]), int(message["carried"]))

    def _note(self, message: Message) -> None:
        pending = self._pending.get(message["id"])
        if pending is not None and pending.on_note is not None:
            pending.on_note(message)
            if "relay_status" in message:
                self._pending.pop(message["id"])

    def _end(self, number: int, outcome: Reply | Exception) -> None:
        pending = self._pending.pop(number, None)
        if pending is not None:
            pending.end(outcome)


def _refuse(seen: asyncio.Future[int], number: int) -> None:
    if not seen.done():
        seen.set_exception(OSError(number, os.strerror(number)))


_links: dict[asyncio.AbstractEventLoop, Link] = {}


def link() -> Link:
    """The running loop's connection; those of closed loops are dropped when a new loop comes."""
    loop = asyncio.get_running_loop()
    found = _links.get(loop)
    if found is None:
        for old in [old for old in list(_links) if old.is_closed()]:
            _links.pop(old).abandon()
        found = _links[loop] = Link(loop)
    return found


def close_idle() -> None:
    """Close the connections on which nothing is under way; the running loop's, and those of closed loops."""
    for loop, known in list(_links.items()):
        if loop.is_closed() or loop is _running():
            known.close_idle()


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def abandon_all() -> None:
    """In a forked child: the parent's connections are not ours."""
    for known in _links.values():
        known.abandon()
    _links.clear()
