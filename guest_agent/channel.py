# SPDX-License-Identifier: Apache-2.0
"""Step 3 in the guest: the channel to the host's service over a virtio-serial port.

The port is there whether or not anybody listens on the host: the channel opens it, says hello until it is answered and
starts over when the other end goes away. Virtio ports say "host away" by reading nothing (drivers/char/virtio_console.c).
`unix:PATH` in the port's place listens on a Unix socket, as QEMU does for its chardev."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable

from guest_agent.handoff.stream import Stream
from guest_agent.handoff.wire import Established, Event, Header, Session

HELLO_INTERVAL = 0.2
REOPEN_INTERVAL = 0.1
PING_INTERVAL = 5.0
SILENCE_LIMIT = 15.0
STALL_LIMIT = 2.0
"""Seconds for one frame: longer, and its sender died in the middle of it."""


class Channel:
    """`on_event` gets every event of the session; `on_down` is called once each time an established session ends."""

    def __init__(
        self, port: str, about: Header, *, on_event: Callable[[Event], None], on_down: Callable[[], None]
    ) -> None:
        self._port, self._on_event, self._on_down = port, on_event, on_down
        self._session = Session(about)
        self._stream: Stream | None = None
        self._listener: socket.socket | None = None
        self._heard = self._progress = 0.0
        self._up = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def up(self) -> bool:
        """Whether the host answered our hello."""
        return self._up

    def start(self) -> None:
        """Open the port and say hello; never raises for an absent host."""
        if self._port.startswith("unix:"):
            self._listen(self._port.removeprefix("unix:"))
        else:
            self._open()

    def stop(self) -> None:
        """Close the port."""
        if self._timer:
            self._timer.cancel()
        if self._listener:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        if self._stream:
            self._stream.close()

    def send(self, header: Header, body: bytes = b"") -> None:
        """Send one message. Raises ConnectionError while the host is away."""
        self._session.send(header, body)
        self._flush()

    def _listen(self, path: str) -> None:
        if os.path.exists(path):
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(1)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        if self._stream:
            self._stream.close()
            self._lost()
        self._begin(connection.detach())

    def _open(self) -> None:
        try:
            fd = os.open(self._port, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT, errno.ENXIO):
                raise
            self._timer = self._loop.call_later(REOPEN_INTERVAL, self._open)
            return
        self._begin(fd)

    def _begin(self, fd: int) -> None:
        self._stream = Stream(fd, on_data=self._received, on_lost=self._lost)
        self._session.start()
        self._heard = self._progress = self._loop.time()
        self._flush()
        self._schedule()

    def _schedule(self) -> None:
        if self._stream is None:  # lost while something was sent: the timer is the next attempt's
            return
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(PING_INTERVAL if self._up else HELLO_INTERVAL, self._tick)

    def _tick(self) -> None:
        if self._stream is None:
            return
        stalled = self._session.stalled() and self._loop.time() - self._progress > STALL_LIMIT
        if stalled or (self._up and self._loop.time() - self._heard > SILENCE_LIMIT):
            self._set_down()
            self._session.start()
            self._heard = self._progress = self._loop.time()
        elif self._up:
            self._session.send({"type": "ping"})
        elif not self._stream.backlog:
            self._session.say_hello()
        self._flush()
        self._schedule()

    def _received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        for event in self._session.receive(data):
            self._progress = self._heard
            if isinstance(event, Established):
                self._set_down()
                self._up = True
            elif not self._session.established:
                self._set_down()
            self._flush()
            self._on_event(event)
        if self._up and not self._session.established:
            self._set_down()
        self._flush()
        if not self._session.stalled():
            self._progress = self._heard
        if not self._up:
            self._schedule()

    def _flush(self) -> None:
        if self._stream and self._session.outgoing:
            data = bytes(self._session.outgoing)
            self._session.outgoing.clear()
            self._stream.write(data)

    def _lost(self) -> None:
        self._stream = None
        self._session.established = False
        self._set_down()
        if self._timer:
            self._timer.cancel()
        if not self._listener:
            self._timer = self._loop.call_later(REOPEN_INTERVAL, self._open)

    def _set_down(self) -> None:
        if self._up:
            self._up = False
            self._on_down()
