# SPDX-License-Identifier: Apache-2.0
"""The relays of this guest at the host: what applications ask for, and what the host says of it.

A relay lives at the host; here is only who asked. The connections of a relay are transfers like those of files
(`transfers.py`): they go out when the host has taken them, which the application is told at once, and their outcome is told
when they are home."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from guest_agent.hand_out import Outcome, Send, Transfer
from guest_agent.handoff.errors import GuestError, HostError, NotMovable, Reason
from guest_agent.handoff.snapshot import Snapshot
from guest_agent.handoff.wire import Header

Note = dict[str, Any]
RING_FIELDS = ("framing", "ring_entries", "entry_bytes", "budget_ms", "max_sinks", "first", "rest")
SINK_FIELDS = ("priority", "join", "on_lag", "lag_soft", "lag_hard_ms", "begin")


@dataclass
class RelayTransfer(Transfer):
    """A connection on its way to a relay. `told`: the application hears that the host has it."""

    relay: str = ""
    role: str = "sink"
    options: Header = field(default_factory=dict)
    told: Callable[[], None] = lambda: None

    def request(self) -> Header:
        """See `Transfer`."""
        return {"type": "relay_join", "token": self.token, "relay": self.relay, "role": self.role, **self.options}

    def expect(self) -> Snapshot | None:
        """Nobody knows how much a relay will send."""
        return None

    def taken(self) -> None:
        """See `Transfer`."""
        self.told()

    @property
    def any_host(self) -> bool:
        """See `Transfer`; the relay is at one."""
        return False


@dataclass(eq=False)
class _Asked:
    """Somebody who waits for what becomes of a relay, or of a UDP sink of one."""

    owner: object
    answer: Callable[[Note], None]
    finish: Callable[[Outcome], None]
    by_source: bool
    refusal: Outcome | None = None
    left: Outcome | None = None
    sinks: dict[str, _Asked] = field(default_factory=dict)


class Relays:
    """By token. `send` is the channel's; it raises ConnectionError while the host is away."""

    def __init__(self, *, send: Send, is_up: Callable[[], bool], is_here: Callable[[], bool]) -> None:
        self._send_frame, self._is_up, self._is_here = send, is_up, is_here
        self._open: dict[str, _Asked] = {}
        self._closed = asyncio.Event()
        self._closed.set()
        self._status: dict[str, list[Callable[[Note], None]]] = {}

    def _send(self, header: Header) -> None:
        try:
            self._send_frame(header, b"")
        except ConnectionError as error:
            raise HostError(Reason.HOST_AWAY, str(error)) from None

    async def all_closed(self) -> None:
        """Until none is open at the host."""
        await self._closed.wait()

    def _remove(self, token: str) -> _Asked | None:
        asked = self._open.pop(token, None)
        if not self._open:
            self._closed.set()
        return asked

    # From applications.

    def publish(
        self,
        token: str,
        source: Header,
        options: Header,
        *,
        owner: object,
        answer: Callable[[Note], None],
        finish: Callable[[Outcome], None],
    ) -> None:
        """Open a relay. `answer` hears {"taken": true} (of a connection: when the host has it, by `RelayTransfer`); `finish` the
        end, unless the source is a connection: then that comes home. Raises HandoffError."""
        if not self._is_up():
            raise NotMovable(Reason.HOST_AWAY, "the host's service does not answer")
        if not self._is_here():
            raise NotMovable(Reason.DRAINING, "this VM is leaving its host")
        if token in self._open:
            raise GuestError(Reason.DUPLICATE, "a relay with this token is open")
        by_source = source["source"] == "connection"
        self._open[token] = _Asked(owner, answer, finish, by_source)
        self._closed.clear()
        plan = {"path": "", "inode": 0, "offset": 0, "port": 0, **source, **options}
        self._send({"type": "relay_open", "token": token, **plan})

    def source_over(self, token: str, outcome: Outcome) -> Outcome:
        """A relay's source is no longer out: what its application is told."""
        asked = self._remove(token)
        if asked is None:
            return outcome
        if asked.left is not None and outcome.outcome == "local":
            return asked.left
        if asked.refusal is None and outcome.outcome == "local" and self._is_up():
            self._send({"type": "relay_close", "token": token})
        return asked.refusal or outcome

    def add_udp(
        self,
        token: str,
        relay: str,
        sock: socket.socket,
        options: Header,
        *,
        owner: object,
        answer: Callable[[Note], None],
        finish: Callable[[Outcome], None],
    ) -> None:
        """A connected UDP socket tells from where to where. Raises HandoffError, OSError."""
        known = self._open.get(relay)
        if known is None or not self._is_up():
            raise NotMovable(Reason.UNKNOWN_RELAY, "the host has no such relay")
        local, peer = sock.getsockname()[:2], sock.getpeername()[:2]
        known.sinks[token] = _Asked(owner, answer, finish, by_source=False)
        ends = {"local": _plain(local), "peer": _plain(peer)}
        self._send({"type": "relay_udp", "token": token, "relay": relay, **ends, **options})

    def remove_udp(self, relay: str, token: str) -> bool:
        """Whether there is such a sink."""
        known = self._open.get(relay)
        sink = known.sinks.pop(token, None) if known else None
        if sink is None:
            return False
        if self._is_up():
            self._send({"type": "relay_udp_remove", "token": token, "relay": relay})
        sink.finish(Outcome("offloaded"))
        return True

    def status(self, relay: str, answer: Callable[[Note], None]) -> None:
        """`answer` gets {"relay_status": {...}}, or null where there is none. Raises HandoffError."""
        if not self._is_up():
            answer({"relay_status": None})
            return
        self._status.setdefault(relay, []).append(answer)
        self._send({"type": "relay_status", "token": relay})

    def close(self, relay: str) -> None:
        """All connections come home; what is no connection ends. Raises HandoffError."""
        if self._is_up():
            self._send({"type": "relay_close", "token": relay})
        self._end(relay, Outcome("offloaded"))

    def owner_gone(self, owner: object) -> None:
        """An application died: so do its relays."""
        for token, asked in list(self._open.items()):
            if asked.owner is owner:
                self._remove(token)
                if self._is_up():
                    self._send({"type": "relay_close", "token": token})

    # From the channel.

    def host_up(self, *, same: bool) -> None:
        """A new service knows none of them."""
        if not same:
            for token in list(self._open):
                self._end(token, Outcome("failed", 0, Reason.HOST_LOST, "the host's service went away with the relay"))
        for answers in self._status.values():
            for answer in answers:
                answer({"relay_status": None})
        self._status.clear()

    def message(self, header: Header, body: bytes) -> None:
        """One of the host's; unknown ones are ignored."""
        handler: Callable[[str, Header, bytes], None] | None = getattr(self, f"_on_{header['type']}", None)
        if handler is not None:
            handler(str(header.get("relay")), header, body)

    def _on_relay_opened(self, relay: str, header: Header, body: bytes) -> None:
        asked = self._open.get(relay)
        if asked is not None and not asked.by_source:
            asked.answer({"taken": True})

    def _on_relay_refused(self, relay: str, header: Header, body: bytes) -> None:
        outcome = Outcome("local", 0, _reason(header), str(header.get("message", "")))
        if header.get("token") == relay:
            self._refuse(relay, outcome)
        elif relay in self._open:
            sink = self._open[relay].sinks.pop(str(header.get("token")), None)
            if sink is not None:
                sink.finish(outcome)

    def _on_relay_ended(self, relay: str, header: Header, body: bytes) -> None:
        self._end(relay, Outcome("offloaded", 0, None, str(header.get("message", ""))))

    def _on_relay_left(self, relay: str, header: Header, body: bytes) -> None:
        """The VM leaves the host, which tells where the source stands. A connection that is its source is still to come home."""
        cursor, rest = header.get("cursor"), header.get("rest")
        told = Outcome("local", 0, Reason.DRAINING, "the VM leaves its host", cursor=cursor if type(cursor) is int else None)
        told.rest = rest if type(rest) is str else ""
        asked = self._open.get(relay)
        if asked is not None and asked.by_source:
            asked.left = told
        else:
            self._end(relay, told)

    def _on_relay_udp_added(self, relay: str, header: Header, body: bytes) -> None:
        if relay in self._open:
            sink = self._open[relay].sinks.get(str(header.get("token")))
            if sink is not None:
                sink.answer({"taken": True})

    def _on_relay_udp_left(self, relay: str, header: Header, body: bytes) -> None:
        if relay in self._open:
            sink = self._open[relay].sinks.pop(str(header.get("token")), None)
            if sink is not None:
                reason, message = _reason(header), str(header.get("message", ""))
                outcome = "local" if reason is Reason.DRAINING else "offloaded"
                cursor = header.get("cursor")
                sink.finish(Outcome(outcome, 0, reason, message, cursor=cursor if type(cursor) is int else None))

    def _on_relay_status(self, relay: str, header: Header, body: bytes) -> None:
        waiting = self._status.pop(relay, [])
        for answer in waiting:
            answer({"relay_status": json.loads(body or b"null")})

    def _refuse(self, relay: str, outcome: Outcome) -> None:
        """A connection that was to be its source is still to come home, and its outcome is told then."""
        asked = self._open.get(relay)
        if asked is not None and asked.by_source:
            asked.refusal = outcome
        else:
            self._end(relay, outcome)

    def _end(self, relay: str, outcome: Outcome) -> None:
        asked = self._open.get(relay)
        if asked is None:
            return
        for sink in asked.sinks.values():
            sink.finish(Outcome("offloaded", 0, Reason.RELAY_ENDED, "the relay has ended"))
        asked.sinks.clear()
        if not asked.by_source:
            self._remove(relay)
            asked.finish(outcome)


def _plain(address: tuple[Any, ...]) -> list[Any]:
    """As the wire has it: never v4-mapped."""
    text = str(address[0])
    return [text.removeprefix("::ffff:") if "." in text else text, address[1]]


def _reason(header: Header) -> Reason:
    try:
        return Reason(header.get("reason"))
    except ValueError:
        return Reason.BAD_REQUEST
