# SPDX-License-Identifier: Apache-2.0
"""The frames of the channel, and how two ends that may restart at any byte find each other again. Pure: no I/O.

A frame::

    "SLF1" | tag, 8 bytes | header length, u32 | body length, u32 | CRC-32 of both, u32 | CRC-32 of all so far, u32
    header: JSON object | body: raw

(big endian; the checksums are there because a new program's first bytes may complete a dead one's last frame).
The channel is a byte stream that survives the programs at its ends, so either may come up in the middle of the other's
frame. Each end draws a random nonce; a frame carries its *receiver's* nonce as its tag, so bytes of an earlier life are
never taken for a frame, and neither are bytes that a client placed in a queue: it cannot know the nonce. Only a hello has
the tag zero::

    A: hello(nonce=a, answer=-)  ->
                                 <-  B: hello(nonce=b, answer=a)     A is established: B knows A's nonce
    A: hello(nonce=a, answer=b)  ->                                  B is established

An end that loses the thread takes a new nonce, says hello and skips bytes until it is answered.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from guest_agent.handoff.errors import Reason
from guest_agent.handoff.snapshot import MAX_QUEUE

VERSION = 1
MAGIC = b"SLF1"
PREFIX = struct.Struct(">4s8sIIII")
_CHECKED = struct.Struct(">4s8sIII")
MAX_HEADER = 16 << 10
MAX_BODY = MAX_QUEUE + (1 << 20)
HELLO_TAG = bytes(8)

Header = dict[str, Any]


@dataclass(frozen=True)
class Established:
    """The peer knows our nonce and we know its: `hello` is what it said of itself."""

    hello: Header


@dataclass(frozen=True)
class Message:
    """One frame of an established session."""

    header: Header
    body: bytes


@dataclass(frozen=True)
class Violation:
    """The peer said what no correct peer says. `lost_sync`: the session starts anew."""

    reason: Reason
    message: str
    lost_sync: bool = False


Event = Established | Message | Violation

_dumps = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True).encode


def encode_frame(tag: bytes, header: Header, body: bytes = b"") -> bytes:
    """Return one frame. Raises ValueError if header or body is over its cap: the caller's defect."""
    raw = _dumps(header).encode("ascii")
    if len(raw) > MAX_HEADER or len(body) > MAX_BODY:
        raise ValueError(f"frame too large: header {len(raw)}, body {len(body)} bytes")
    checked = _CHECKED.pack(MAGIC, tag, len(raw), len(body), crc32(body, crc32(raw)))
    return b"".join((checked, crc32(checked).to_bytes(4, "big"), raw, body))


def _parse_header(raw: bytes) -> Header:
    """Raises ValueError unless `raw` is a JSON object with a string `type`."""
    try:
        header = _loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if type(header) is not dict or type(header.get("type")) is not str:
        raise ValueError("not an object with a type")
    return header


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_loads = json.JSONDecoder(parse_constant=_refuse_constant).decode


def _new_nonce() -> bytes:
    return os.urandom(8)


@dataclass
class Session:
    """One end's view of the channel. `about` is what this end says of itself in its hello (JSON-able).

    `outgoing` collects bytes to be written; `receive()` returns events; `send()` queues a message."""

    about: Header
    outgoing: bytearray = field(default_factory=bytearray)
    established: bool = False
    nonce: bytes = field(default_factory=_new_nonce)
    peer_nonce: bytes = b""
    _answered: bytes = b""
    _buffer: bytearray = field(default_factory=bytearray)
    _scanning: bool = True

    def start(self) -> None:
        """Begin anew: with a fresh nonce, forgetting what was buffered."""
        self.nonce, self.peer_nonce, self._answered = _new_nonce(), b"", b""
        self.established, self._scanning = False, True
        self._buffer.clear()
        self.outgoing.clear()
        self.say_hello()

    def say_hello(self) -> None:
        """Queue a hello; to be repeated until the session is established."""
        self._answered = self.peer_nonce
        hello = {"type": "hello", "v": VERSION, "nonce": self.nonce.hex(), "answer": self.peer_nonce.hex(), **self.about}
        self.outgoing += encode_frame(HELLO_TAG, hello)

    def send(self, header: Header, body: bytes = b"") -> None:
        """Queue one message; only in an established session."""
        if not self.established:
            raise ConnectionError("the channel's session is not established")
        self.outgoing += encode_frame(self.peer_nonce, header, body)

    def receive(self, data: bytes) -> Iterator[Event]:
        """Yield what `data` completes."""
        self._buffer += data
        while True:
            if self._scanning and not self._find_frame():
                return
            if len(self._buffer) < PREFIX.size:
                return
            _, tag, header_length, body_length, checksum, _ = PREFIX.unpack_from(self._buffer)
            fault = self._fault(bytes(self._buffer[: PREFIX.size]))
            if fault:
                yield self._lose_sync(fault)
                continue
            end = PREFIX.size + header_length + body_length
            if len(self._buffer) < end:
                return
            raw = bytes(self._buffer[PREFIX.size : PREFIX.size + header_length])
            body = bytes(self._buffer[PREFIX.size + header_length : end])
            if crc32(body, crc32(raw)) != checksum:
                yield self._lose_sync("a frame with a wrong checksum")
                continue
            del self._buffer[:end]
            yield from self._frame(tag, raw, body)

    def stalled(self) -> bool:
        """Whether part of a frame is waiting for its rest."""
        return bool(self._buffer)

    def _fault(self, prefix: bytes) -> str:
        magic, tag, header_length, body_length, _, check = PREFIX.unpack(prefix)
        if magic != MAGIC or crc32(prefix[: _CHECKED.size]) != check:
            return "no frame where one should begin"
        if tag not in (HELLO_TAG, self.nonce):
            return "a frame of another session"
        if header_length > MAX_HEADER or body_length > (MAX_BODY if tag == self.nonce else 0):
            return f"a frame of {header_length} + {body_length} bytes"
        return ""

    def _find_frame(self) -> bool:
        """Skip to the first plausible frame; False if there is none yet."""
        at = 0
        while (at := self._buffer.find(MAGIC, at)) >= 0:
            if len(self._buffer) - at < PREFIX.size:
                break
            if not self._fault(bytes(self._buffer[at : at + PREFIX.size])):
                self._scanning = False
                break
            at += 1
        del self._buffer[: at if at >= 0 else max(0, len(self._buffer) - len(MAGIC) + 1)]
        return not self._scanning

    def _lose_sync(self, what: str) -> Violation:
        was_established = self.established
        rest = bytes(self._buffer[1:])
        self.start()
        self._buffer += rest
        detail = f"{what}; the session starts anew" if was_established else what
        return Violation(Reason.BAD_FRAME, detail, lost_sync=True)

    def _frame(self, tag: bytes, raw: bytes, body: bytes) -> Iterator[Event]:
        try:
            header = _parse_header(raw)
        except ValueError as error:
            yield Violation(Reason.BAD_FRAME, f"frame header: {error}")
            return
        if tag == HELLO_TAG:
            yield from self._hello(header)
        elif not self.established:
            yield Violation(Reason.BAD_FRAME, f"{header['type']!r} before the hello was answered")
        else:
            yield Message(header, body)

    def _hello(self, header: Header) -> Iterator[Event]:
        if header["type"] != "hello":
            yield Violation(Reason.BAD_FRAME, f"{header['type']!r} without the session's tag")
            return
        if header.get("v") != VERSION:
            yield Violation(Reason.BAD_VERSION, f"channel version {header.get('v')!r}, this side speaks {VERSION}")
            return
        try:
            nonce, answer = bytes.fromhex(header["nonce"]), bytes.fromhex(header["answer"])
        except (KeyError, TypeError, ValueError):
            yield Violation(Reason.BAD_FRAME, "a hello without nonce and answer")
            return
        if len(nonce) != 8 or nonce == HELLO_TAG:
            yield Violation(Reason.BAD_FRAME, "a hello with a bad nonce")
            return
        yield from self._meet(nonce, answer, header)

    def _meet(self, nonce: bytes, answer: bytes, header: Header) -> Iterator[Event]:
        known = self.established and nonce == self.peer_nonce
        self.peer_nonce = nonce
        self.established = answer == self.nonce
        if self._answered != nonce or not self.established:
            self.say_hello()
        if self.established and not known:
            yield Established(header)
