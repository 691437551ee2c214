# SPDX-License-Identifier: Apache-2.0
"""Step 3 on the host: the channel of one VM, a Unix socket that QEMU opened for the VM's virtio-serial port.

Who speaks is known by the channel on which he speaks. A frame that makes no sense costs that frame; bytes that are no
frames cost the session, which starts anew; a guest that floods is not read until the next second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from guest_agent.handoff.errors import Reason
from guest_agent.handoff.stream import Stream
from guest_agent.handoff.wire import Established, Event, Header, Message, Session, Violation

log = logging.getLogger("streamlift.channel")

CONNECT_INTERVAL = 0.2
HELLO_INTERVAL = 0.25
STALL_LIMIT = 2.0
"""Seconds for one frame: longer, and its sender died in the middle of it."""
PING_INTERVAL = 5.0
SILENCE_LIMIT = 15.0


class Channel:
    """`on_event` gets what the guest says; `on_down` is called each time an established session ends."""

    def __init__(
        self,
        path: str,
        about: Header,
        *,
        max_frames_per_second: int,
        on_event: Callable[[Event], None],
        on_down: Callable[[], None],
    ) -> None:
        self._path, self._on_event, self._on_down = path, on_event, on_down
        self._session = Session(about)
        self._stream: Stream | None = None
        self._limit, self._frames, self._second = max_frames_per_second, 0, 0.0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._resume: asyncio.TimerHandle | None = None
        self._heard = self._progress = 0.0
        self.state = "down"
        self.violations = 0
        self._was_stalled = False

    @property
    def frames_per_second(self) -> int:
        """What came in the second that runs."""
        return self._frames if self._loop.time() - self._second < 1.0 else 0

    def start(self) -> None:
        """Connect, and connect again whenever the channel is lost."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(self._path)
        except OSError as error:
            connection.close()
            log.debug("%s: %s", self._path, error)
            self._timer = self._loop.call_later(CONNECT_INTERVAL, self.start)
            return
        self._stream = Stream(connection.detach(), on_data=self._received, on_lost=self._lost)
        self.state = "up"
        self._heard = self._progress = self._loop.time()
        self._session.start()
        self._flush()
        self._schedule()

    def stop(self) -> None:
        """Close; idempotent."""
        for timer in (self._timer, self._resume):
            if timer:
                timer.cancel()
        if self._stream:
            self._stream.close()
            self._stream = None
        self.state = "down"

    def greet(self) -> None:
        """The guest can hear now: do not wait with the next hello."""
        if self._stream is not None and self.state != "hello":
            self._session.say_hello()
            self._flush()

    def send(self, header: Header, body: bytes = b"") -> bool:
        """Send one message; False if the guest is not there to get it."""
        if self._stream is None or not self._session.established:
            return False
        self._session.send(header, body)
        self._flush()
        return True

    def _schedule(self) -> None:
        if self._stream is None:  # lost while something was sent: the timer is the next attempt's
            return
        if self._timer:
            self._timer.cancel()
        interval = PING_INTERVAL if self.state == "hello" else HELLO_INTERVAL
        if self._session.stalled():
            interval = STALL_LIMIT
        self._timer = self._loop.call_later(interval, self._tick)

    def _tick(self) -> None:
        if self._stream is None:
            return
        silent = self._loop.time() - self._heard
        stalled = self._session.stalled() and self._loop.time() - self._progress >= STALL_LIMIT
        if stalled or (self.state == "hello" and silent > SILENCE_LIMIT):
            self._restart_session()
        elif self.state == "hello":
            self._session.send({"type": "ping"})
        elif not self._stream.backlog:
            self._session.say_hello()
        self._flush()
        self._schedule()

    def _restart_session(self) -> None:
        self._set_down("up")
        self._session.start()
        self._progress = self._loop.time()

    def _received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        for event in self._session.receive(data):
            self._progress = self._heard
            self._one(event)
        if not self._session.stalled():
            self._progress = self._heard
        if self.state == "hello" and not self._session.established:
            self._set_down("up")
        self._flush()
        self._limit_flood()
        if (self._session.stalled() and not self._was_stalled) or self.state != "hello":
            self._schedule()
        self._was_stalled = self._session.stalled()

    def _one(self, event: Event) -> None:
        self._frames += 1
        if isinstance(event, Established):
            self._set_down("hello")
        elif isinstance(event, Violation):
            self.violations += 1
        self._flush()
        if isinstance(event, Message) and event.header["type"] in ("ping", "pong"):
            if event.header["type"] == "ping":
                self.send({"type": "pong"})
            return
        self._on_event(event)

    def _limit_flood(self) -> None:
        """More frames than allowed in this second: stop reading until the next; QEMU then holds the guest back."""
        now = self._loop.time()
        if now - self._second >= 1.0:
            self._second, self._frames = now, 0
        elif self._frames > self._limit and self._stream:
            self._on_event(Violation(Reason.FLOOD, f"more than {self._limit} frames a second"))
            self._stream.pause()
            self._resume = self._loop.call_later(self._second + 1.0 - now, self._stream.resume)

    def _flush(self) -> None:
        if self._stream and self._session.outgoing:
            data = bytes(self._session.outgoing)
            self._session.outgoing.clear()
            self._stream.write(data)

    def _lost(self) -> None:
        self._stream = None
        self._session.established = False
        self._set_down("down")
        for timer in (self._timer, self._resume):
            if timer:
                timer.cancel()
        self._timer = self._loop.call_later(CONNECT_INTERVAL, self.start)

    def _set_down(self, state: str) -> None:
        was_up, self.state = self.state == "hello", state
        if was_up:
            with contextlib.suppress(ConnectionError):
                self._on_down()
