# SPDX-License-Identifier: Apache-2.0
"""A small MPEG transport stream: groups of PAT, PMT, a packet with random_access_indicator, and filling."""

from __future__ import annotations

import os
import struct

PACKET = 188
PMT_PID, VIDEO_PID = 0x100, 0x101


def packet(pid: int, *, start: bool = False, random_access: bool = False, payload: bytes | None = None) -> bytes:
    """One packet; its payload is random if none is given."""
    head = struct.pack("!BHB", 0x47, pid | (0x4000 if start else 0), 0x30 if random_access else 0x10)
    if random_access:
        head += b"\x01\x40"
    room = PACKET - len(head)
    return (
        head + (payload or b"").ljust(room, b"\xff") if payload is not None else head + os.urandom(room).replace(b"\x47", b"\x48")
    )


def pat() -> bytes:
    """With one program; the stuffing makes each another."""
    section = b"\x00" + struct.pack("!HHBBB", 0xB000 | 13, 1, 0xC1, 0, 0) + struct.pack("!HH", 1, 0xE000 | PMT_PID) + b"CRC!"
    return packet(0, start=True, payload=b"\x00" + section + os.urandom(PACKET - 5 - len(section)).replace(b"\x47", b"\x48"))


def group(packets: int, *, key: bool = True) -> bytes:
    """A PAT, and `packets` more: with a key frame a decoder can begin at the PAT."""
    head = [pat(), packet(PMT_PID, start=True), packet(VIDEO_PID, start=True, random_access=key)]
    return b"".join([*head, *(packet(VIDEO_PID) for _ in range(packets - 2))])
