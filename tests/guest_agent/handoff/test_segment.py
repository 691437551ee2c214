# SPDX-License-Identifier: Apache-2.0
"""What held segments are worth. Pure; the ring that holds them is in `test_tcp_repair.py`."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from guest_agent.handoff.segment import absorb, is_intact, is_stale, ones_sum, pseudo_sum
from tests.guest_agent.handoff.samples import SNAPSHOT

ACK, FIN, PSH, RST, SYN, URG = 16, 1, 8, 4, 2, 32
QUIET = replace(SNAPSHOT, receive_sequence=0xFFFFFFF0, receive_queue=b"GET /", unacked=b"", unsent=b"")
NEXT = 0xFFFFFFF5
ADDRESSES = [("198.51.100.7", "192.0.2.10"), ("2001:db8::7", "2001:db8::1")]


def segment(payload: bytes = b"", *, sequence: int = NEXT, acknowledge: int = 0, flags: int = ACK, options: bytes = b"") -> bytes:
    offset = (20 + len(options)) << 2
    return struct.pack("!HHIIBBHHH", 5000, 80, sequence, acknowledge, offset, flags, 512, 0, 0) + options + payload


def signed(data: bytes, checksum: int) -> bytes:
    return data[:16] + checksum.to_bytes(2, "big") + data[18:]


@pytest.mark.parametrize("options", [b"", b"\x01\x01\x08\x0a" + bytes(8)])
def test_an_old_acknowledgement_is_stale(options: bytes) -> None:
    assert is_stale(segment(acknowledge=99, options=options), 100)
    assert not is_stale(segment(acknowledge=100, options=options), 100), "it may carry a new window"
    assert not is_stale(segment(acknowledge=101, options=options), 100)
    assert is_stale(segment(acknowledge=0xFFFFFFFF), 5), "sequence numbers wrap"
    assert not is_stale(segment(acknowledge=5), 0xFFFFFFFF)


def test_what_says_more_is_not_stale() -> None:
    assert not is_stale(segment(b"data", acknowledge=1), 100)
    for flags in (FIN, SYN, RST):
        assert not is_stale(segment(acknowledge=1, flags=ACK | flags), 100)
    assert not is_stale(bytes(19), 100)


def test_what_continues_the_queue_is_absorbed_and_the_rest_is_kept() -> None:
    more, again = segment(b"index.mpd HT", flags=ACK | PSH), segment(b"GET /index", sequence=0xFFFFFFF0)
    last = segment(b"TP/1.1\r\n", sequence=1, options=b"\x01\x01\x08\x0a" + bytes(8))
    beyond, fin, bare = segment(b"x", sequence=500), segment(b"x", sequence=9, flags=ACK | FIN), segment()
    snapshot, rest = absorb(QUIET, [again, more, beyond, last, fin, bare])
    assert snapshot.receive_queue == b"GET /index.mpd HTTP/1.1\r\n"
    assert snapshot == replace(QUIET, receive_queue=snapshot.receive_queue)
    assert rest == [beyond, fin, bare]


@pytest.mark.parametrize("flags", [FIN, SYN, RST, URG])
def test_only_plain_data_is_absorbed(flags: int) -> None:
    odd = segment(b"data", flags=ACK | flags)
    assert absorb(QUIET, [odd]) == (QUIET, [odd])


def test_nothing_is_absorbed_while_an_acknowledgement_may_be_new() -> None:
    data = segment(b"data")
    for busy in (replace(QUIET, unacked=b"x"), replace(QUIET, unsent=b"x")):
        assert absorb(busy, [data]) == (busy, [data])


def test_a_queue_that_is_full_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guest_agent.handoff.segment.MAX_QUEUE", 8)
    big, small = segment(b"four"), segment(b"abc")
    snapshot, rest = absorb(QUIET, [big, small])
    assert (snapshot.receive_queue, rest) == (b"GET /abc", [big])


@pytest.mark.parametrize(("source", "to"), ADDRESSES)
@pytest.mark.parametrize("payload", [b"", b"odd", b"even"])
def test_a_damaged_segment_is_found(source: str, to: str, payload: bytes) -> None:
    plain = segment(payload)
    pseudo = pseudo_sum(source, to, len(plain))
    whole = signed(plain, ~ones_sum(pseudo.to_bytes(2, "big") + plain) & 0xFFFF)
    assert is_intact(whole, source, to)
    assert is_intact(signed(plain, pseudo), source, to), "left to hardware that it never met"
    assert not is_intact(signed(plain, pseudo ^ 0x0100), source, to)
    damaged = bytearray(whole)
    damaged[4] ^= 1
    assert not is_intact(bytes(damaged), source, to)
    assert not is_intact(whole[:19], source, to)
    assert is_intact(bytes(1501), source, to), "merged, and checked before that"


def test_ones_sum() -> None:
    """The example of RFC 1071 section 3."""
    assert ones_sum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2
