# SPDX-License-Identifier: Apache-2.0
"""Frames and sessions: golden bytes, restarts at any byte, nonsense of every kind."""

from __future__ import annotations

import struct
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.handoff.errors import Reason
from guest_agent.handoff.wire import (
    HELLO_TAG,
    MAX_BODY,
    MAX_HEADER,
    Established,
    Event,
    Message,
    Session,
    Violation,
    encode_frame,
)


def test_golden_frame() -> None:
    header = b'{"type":"late","token":"00"}'
    start = b"SLF1" + bytes(range(8)) + struct.pack(">III", len(header), 3, crc32(header + b"abc"))
    expected = start + struct.pack(">I", crc32(start)) + header + b"abc"
    assert encode_frame(bytes(range(8)), {"type": "late", "token": "00"}, b"abc") == expected


def prefix(tag: bytes, header_length: int, body_length: int, checksum: int) -> bytes:
    start = b"SLF1" + tag + struct.pack(">III", header_length, body_length, checksum)
    return start + struct.pack(">I", crc32(start))


def test_caps_are_for_the_sender_too() -> None:
    with pytest.raises(ValueError, match="too large"):
        encode_frame(HELLO_TAG, {"type": "x" * MAX_HEADER})
    with pytest.raises(ValueError, match="too large"):
        encode_frame(HELLO_TAG, {"type": "x"}, bytes(MAX_BODY + 1))


class Line:
    """Two sessions and the bytes between them."""

    def __init__(self) -> None:
        self.host, self.guest = Session({"side": "host"}), Session({"side": "guest"})
        self.host.start()
        self.guest.start()

    def run(self, piece: int = 1 << 20) -> tuple[list[Event], list[Event]]:
        at_host: list[Event] = []
        at_guest: list[Event] = []
        for _ in range(50):
            up, down = bytes(self.guest.outgoing), bytes(self.host.outgoing)
            self.guest.outgoing.clear()
            self.host.outgoing.clear()
            if not up and not down:
                break
            for at in range(0, len(up), piece):
                at_host += self.host.receive(up[at : at + piece])
            for at in range(0, len(down), piece):
                at_guest += self.guest.receive(down[at : at + piece])
        return at_host, at_guest


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_hello_then_messages(piece: int) -> None:
    line = Line()
    at_host, at_guest = line.run(piece)
    assert isinstance(at_host[-1], Established) and isinstance(at_guest[-1], Established)
    assert at_host[-1].hello["side"] == "guest"
    line.guest.send({"type": "hand_out"}, b"queue")
    assert line.run(piece)[0] == [Message({"type": "hand_out"}, b"queue")]


@given(cut=st.integers(min_value=0, max_value=600))
def test_an_agent_that_dies_at_any_byte_is_replaced(cut: int) -> None:
    line = Line()
    line.run()
    line.guest.send({"type": "hand_out"}, b"SLF1" * 100)
    list(line.host.receive(bytes(line.guest.outgoing[:cut])))
    line.guest = Session({"side": "new"})
    line.guest.start()
    for _ in range(12):
        line.guest.say_hello()
        line.run()
    assert line.guest.established and line.host.established
    line.guest.send({"type": "hand_out"}, b"again")
    assert Message({"type": "hand_out"}, b"again") in line.run()[0]


def test_bytes_of_a_client_cannot_pass_for_frames() -> None:
    """A client's bytes travel in bodies; a session that begins in the middle of one must not take them for frames."""
    line = Line()
    forged = encode_frame(bytes(8), {"type": "hello", "v": 1, "nonce": "11" * 8, "answer": "22" * 8})
    forged += encode_frame(b"\x22" * 8, {"type": "taken", "token": "0" * 32})
    events = list(line.host.receive(forged))
    assert not any(isinstance(event, Message | Established) for event in events)
    line.host.outgoing.clear()
    for _ in range(3):
        line.guest.say_hello()
        line.run()
    assert line.host.established


@pytest.mark.parametrize("version", [0, 999, "1", None])
def test_other_versions_are_named(version: object) -> None:
    session = Session({})
    session.start()
    hello = {"type": "hello", "v": version, "nonce": "11" * 8, "answer": ""}
    (event,) = session.receive(encode_frame(HELLO_TAG, hello))
    assert isinstance(event, Violation) and event.reason is Reason.BAD_VERSION


def test_oversized_frames_cost_the_session_not_the_memory() -> None:
    line = Line()
    line.run()
    huge = prefix(line.host.nonce, MAX_HEADER, 0xFFFFFFFF, 0)
    (event,) = line.host.receive(huge)
    assert isinstance(event, Violation) and event.lost_sync


def test_a_bad_header_costs_one_frame() -> None:
    line = Line()
    line.run()
    raw = b"[1]"
    frame = prefix(line.host.nonce, len(raw), 0, crc32(raw)) + raw
    (event,) = line.host.receive(frame)
    assert isinstance(event, Violation) and not event.lost_sync and line.host.established


@given(st.binary(max_size=2000), st.booleans())
def test_noise_never_crashes(noise: bytes, established: bool) -> None:
    line = Line()
    if established:
        line.run()
    list(line.host.receive(noise))
    for _ in range(60):
        line.guest.say_hello()
        line.run()
        if line.host.established and line.guest.established:
            break
    assert line.host.established


@given(st.data())
def test_mutated_frames_never_crash(data: st.DataObject) -> None:
    line = Line()
    line.run()
    line.guest.send({"type": "hand_out", "x": [1, {"y": None}]}, b"body" * 20)
    frame = bytearray(line.guest.outgoing)
    for _ in range(data.draw(st.integers(1, 5))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    list(line.host.receive(bytes(frame)))


@given(st.lists(st.sampled_from(["frame", "hello", "mutated", "cut", "noise"]), max_size=12), st.data())
def test_mutated_stream_never_crashes(pieces: list[str], data: st.DataObject) -> None:
    """Good and bad pieces in any order, in chunks of any size; in the end an honest guest is still understood."""
    line = Line()
    line.run()
    for piece in pieces:
        tag = HELLO_TAG if piece == "hello" else line.host.nonce
        frame = bytearray(encode_frame(tag, {"type": piece, "v": 1, "nonce": "11" * 8, "answer": "22" * 8}, b""))
        if piece == "mutated":
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
        elif piece == "cut":
            del frame[data.draw(st.integers(0, len(frame))) :]
        elif piece == "noise":
            frame = bytearray(data.draw(st.binary(max_size=200)))
        size = data.draw(st.integers(1, len(frame) + 1))
        for at in range(0, len(frame), size):
            list(line.host.receive(bytes(frame[at : at + size])))
    for _ in range(60):
        line.guest.say_hello()
        line.run()
        if line.host.established and line.guest.established:
            break
    line.guest.send({"type": "hand_out"}, b"honest")
    assert Message({"type": "hand_out"}, b"honest") in line.run()[0]
