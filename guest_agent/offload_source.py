# SPDX-License-Identifier: Apache-2.0
"""What a relay reads (`offload_relay.py`), how the agent is asked for it, and how this process reads it where the host does not."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from guest_agent import local, local_relay, offload_asyncio
from guest_agent.held_files import held
from guest_agent.local_relay import LocalRelay
from guest_agent.offload_wire import unsuitable
from guest_agent.ring import Ring

PACKET = 188
"""Bytes of one of a transport stream."""
Target = socket.socket | asyncio.WriteTransport | asyncio.StreamWriter


class Source:
    """What a relay reads, as long as it does: a file of ours stays open, and is let go of while the share is away."""

    def __init__(self, given: Target | IO[bytes] | Ring | int, options: dict[str, Any]) -> None:
        self.given, self.options = given, options
        self.file: IO[bytes] | None = None
        self._held = contextlib.ExitStack()
        if not isinstance(given, int | Ring | socket.socket | asyncio.WriteTransport | asyncio.StreamWriter | asyncio.StreamReader):
            self.file = os.fdopen(os.dup(given.fileno()), "rb", buffering=0)
            self._held.callback(self.file.close)
            self._hold = self._held.enter_context(held(self.file.fileno()))

    def close(self) -> None:
        """Idempotent."""
        self._held.close()

    def check(self) -> None:
        """Raises OSError if a file could not be opened again."""
        if self.file is not None:
            self._hold.check()

    @property
    def of_bytes(self) -> bool:
        """Whether positions in it are those of bytes, which hold for any relay of it."""
        return self.file is not None or isinstance(self.given, Ring)

    @property
    def readable(self) -> Readable | None:
        """This process can read it while the host does."""
        if isinstance(self.given, Ring):
            return Readable(self.given, self.options)
        return Readable(self.file, self.options) if self.file is not None else None

    def go_on(self, position: int, rest: bytes, cursors: list[int]) -> None:
        """The next relay of it begins where the sinks need it; of what is not kept anywhere it counts on."""
        if self.of_bytes:
            self.options["offset"] = min([position, *cursors])
        else:
            self.options["first"], self.options["rest"] = position, rest.hex()

    def relay_meanwhile(self) -> LocalRelay | None:
        """By this process, if what it reads is not on the share."""
        return self.relay_here() if isinstance(self.given, socket.socket) else None

    def relay_here(self) -> LocalRelay:
        """By this process."""
        options = self.options
        first = options["offset"] if self.of_bytes else options["first"]
        rest = bytes.fromhex(options["rest"])
        return local_relay.begin(self.file or self.given, offset=first, rest=rest, **_ring_of(options))


def _ring_of(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("ring_entries", "entry_bytes")}


@dataclass(frozen=True)
class Readable:
    """A source that this process can read while the host does."""

    source: IO[bytes] | Ring
    options: dict[str, Any]

    def newest(self) -> int:
        """The position where a client begins that wants what comes: at the end, and at a packet's beginning. Raises OSError."""
        source, first = self.source, int(self.options["offset"])
        at = Ring(source.path).position if isinstance(source, Ring) else os.fstat(source.fileno()).st_size
        return at - ((at - first) % PACKET if self.options["framing"] == "mpegts" else 0)

    def oldest(self) -> int:
        """The same for one that wants all that is kept."""
        kept = self.options["ring_entries"] * (self.options["entry_bytes"] // PACKET * PACKET)
        return max(int(self.options["offset"]), self.newest() - int(kept))

    def relay(self, position: int) -> LocalRelay:
        """From a position on."""
        return local_relay.begin(self.source, offset=position, **_ring_of(self.options))


@dataclass(frozen=True)
class Plan:
    """How the host is asked. `resume` undoes what was done to the source for that, when it is back; `opened` is closed as soon as
    the host has it."""

    reason: str | None
    fields: dict[str, object]
    fds: tuple[int, ...] = ()
    sock: Any = None
    resume: Callable[[], None] | None = None
    opened: IO[bytes] | None = None


async def plan_of(wanted: Source, link: offload_asyncio.Link, absent: str | None) -> Plan:
    source: Any = wanted.given
    if isinstance(source, int):
        return Plan(absent, {"source": "udp", "port": source})
    if isinstance(source, Ring):
        reason = absent or link.elsewhere(source.path)
        file = None if reason else open(source.path, "rb", buffering=0)  # noqa: SIM115
        return Plan(reason, {"source": "ring"}, (file.fileno(),) if file else (), opened=file)
    if wanted.file is not None:
        reason = absent or link.elsewhere(os.readlink(f"/proc/self/fd/{wanted.file.fileno()}"))
        return Plan(reason, {"source": "file"}, (wanted.file.fileno(),))
    if absent is not None:
        _must_not_block(source)
        return Plan(absent, {})
    sock, resume = await prepared(source)
    return Plan(unsuitable_target(source, sock), {"source": "connection"}, (sock.fileno(),), sock, resume)


def unsuitable_target(target: Target, sock: Any) -> str | None:
    if not isinstance(target, socket.socket) and target.get_extra_info("sslcontext") is not None:
        return "upper_layer_protocol"
    return unsuitable(sock)


async def prepared(target: Target) -> tuple[Any, Callable[[], None] | None]:
    """A target's socket, with nothing left in its transport; and what lets the transport read again."""
    _must_not_block(target)
    if isinstance(target, socket.socket):
        return target, None
    transport: Any = target.transport if isinstance(target, asyncio.StreamWriter) else target
    if transport.is_closing():
        raise ConnectionResetError(errno.ECONNRESET, "the transport is closing")
    await local.drain(transport)
    return transport.get_extra_info("socket"), local.pause_reading(transport)


def _must_not_block(target: Any) -> None:
    if isinstance(target, socket.socket) and target.gettimeout() != 0 and target.type == socket.SOCK_STREAM:
        raise ValueError("the socket must be non-blocking")
