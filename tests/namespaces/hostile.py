# SPDX-License-Identifier: Apache-2.0
"""A guest that speaks the channel's protocol and means ill: no agent, but whoever has root in a VM."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from guest_agent.handoff.snapshot import Endpoint, Snapshot, after, encode
from guest_agent.handoff.wire import Established, Header, Message, Session
from tests.guest_agent.handoff.samples import SNAPSHOT

ADDRESS, CLIENT = "10.77.1.66", "10.77.2.2"
"""The hostile VM's own address, and a client's."""


class HostileGuest:
    """Listens where QEMU would, at `path`. Methods raise TimeoutError if the host does not answer."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(10)
        self._ports = itertools.count(20000)
        self._events: list[Message] = []
        self.session = Session({"side": "guest", "agent_version": "hostile", "instance": "0"})
        self.channel: socket.socket

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        with contextlib.suppress(AttributeError):
            self.channel.close()

    def connect(self) -> None:
        """A new channel, up to the answered hello."""
        with contextlib.suppress(AttributeError):
            self.channel.close()
        self.channel, _ = self._listener.accept()
        self.channel.settimeout(0.05)
        self.session.start()
        self.meet()

    def meet(self) -> None:
        """Say hello until it is answered."""
        deadline = time.monotonic() + 10
        while not self.session.established:
            if time.monotonic() > deadline:
                raise TimeoutError("the host did not answer the hello")
            self.session.say_hello()
            self._flush()
            self._listen()

    def raw(self, data: bytes) -> None:
        """Bytes as they are."""
        self.channel.settimeout(10)
        self.channel.sendall(data)
        self.channel.settimeout(0.05)

    def say(self, header: Header, body: bytes = b"") -> None:
        """One message."""
        self.session.send(header, body)
        self._flush()

    def hear(self, *kinds: str, token: str, patience: float = 10) -> Header:
        """The next answer of one of these types about the transfer."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            for message in self._events:
                if message.header["type"] in kinds and message.header.get("token") == token:
                    self._events.remove(message)
                    return message.header
            self._listen()
        raise TimeoutError(f"no {kinds} for {token}")

    def offer(self, path: str, *, local: str = ADDRESS, snapshot: Snapshot | None = None, **changes: Any) -> Header:
        """Offer a connection that does not exist; the answer, `taken` or `refused`."""
        token = os.urandom(16).hex()
        message, body = hand_out(token, path, snapshot or self.snapshot(local))
        self.say(message | changes, body)
        return self.hear("taken", "refused", token=token)

    def look(self, path: str) -> Header:
        """Ask for a file; the answer."""
        token = os.urandom(16).hex()
        self.say({"type": "look", "token": token, "path": path})
        return self.hear("seen", token=token)

    def snapshot(self, local: str = ADDRESS) -> Snapshot:
        """A well-formed lie: a connection of `local` with a port of the client that nobody has."""
        there = after(SNAPSHOT, 0)
        return replace(there, local=Endpoint(local, 80), peer=Endpoint(CLIENT, next(self._ports)))

    def _flush(self) -> None:
        data = bytes(self.session.outgoing)
        self.session.outgoing.clear()
        self.raw(data)

    def _listen(self) -> None:
        with contextlib.suppress(TimeoutError):
            for event in self._received(self.channel.recv(1 << 16)):
                if isinstance(event, Message):
                    self._events.append(event)
        self._flush()

    def _received(self, data: bytes) -> Iterator[Message | Established | object]:
        if not data:
            raise ConnectionError("the host closed the channel")
        yield from self.session.receive(data)


def hand_out(token: str, path: str, snapshot: Snapshot) -> tuple[Header, bytes]:
    """The message as the agent builds it (`guest_agent/hand_out.py`)."""
    header, body = encode(snapshot)
    job = {"path": path, "inode": 0, "offset": 0, "count": 1000, "priority": "normal"}
    return {"type": "hand_out", "token": token, **job, "snapshot": header}, body
