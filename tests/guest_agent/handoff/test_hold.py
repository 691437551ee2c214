# SPDX-License-Identifier: Apache-2.0
"""Which held segments are worth another trip. Pure; the ring itself is in `test_tcp_repair.py`."""

from __future__ import annotations

import struct

import pytest

from guest_agent.handoff.hold import is_stale

ACK, FIN, PSH, RST, SYN = 16, 1, 8, 4, 2


def segment(acknowledge: int, *, flags: int = ACK, options: bytes = b"", payload: bytes = b"") -> bytes:
    offset = (20 + len(options)) << 2
    return struct.pack("!HHIIBBHHH", 5000, 80, 7, acknowledge, offset, flags, 512, 0, 0) + options + payload


@pytest.mark.parametrize("options", [b"", b"\x01\x01\x08\x0a" + bytes(8)])
def test_an_old_acknowledgement_is_stale(options: bytes) -> None:
    assert is_stale(segment(99, options=options), 100)
    assert not is_stale(segment(100, options=options), 100), "it may carry a new window"
    assert not is_stale(segment(101, options=options), 100)


def test_sequence_numbers_wrap() -> None:
    assert is_stale(segment(0xFFFFFFFF), 5)
    assert not is_stale(segment(5), 0xFFFFFFFF)


def test_what_says_more_is_not_stale() -> None:
    assert not is_stale(segment(1, payload=b"data"), 100)
    for flags in (FIN, SYN, RST):
        assert not is_stale(segment(1, flags=ACK | flags), 100)
    assert not is_stale(b"", 100)
    assert not is_stale(bytes(19), 100)
