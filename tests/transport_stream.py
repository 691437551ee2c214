# SPDX-License-Identifier: Apache-2.0
"""Transport streams whose every packet is different, for tests."""

from __future__ import annotations

import os
import random
import struct

PACKET = 188
PAT_PID, PMT_PID, VIDEO_PID, SOUND_PID = 0, 0x100, 0x101, 0x102


def packet(pid: int, payload: bytes | None = None, *, start: bool = False, random_access: bool = False) -> bytes:
    """One packet, with padding after `payload`; with random bytes, none of which is a sync byte, if there is none."""
    flags = (0x40 if start else 0) | pid >> 8
    adaptation = (0x30, 1, 0x40) if random_access else (0x10,)
    head = bytes((0x47, flags, pid & 0xFF, *adaptation))
    body = os.urandom(PACKET).replace(b"\x47", b"\x48") if payload is None else payload.ljust(PACKET, b"\xff")
    return (head + body)[:PACKET]


def pat(*, stuffing: bytes = b"") -> bytes:
    """Names one programme; its PMT is on PMT_PID. The checksum is not looked at by anybody here."""
    section = struct.pack(">BHHBBBHHI", 0, 0xB00D, 1, 0xC1, 0, 0, 1, 0xE000 | PMT_PID, 0)
    return packet(PAT_PID, b"\0" + section + stuffing, start=True)


def pmt(*, video: bool = True, sound: bool = False) -> bytes:
    """Of that programme: H.264 on VIDEO_PID, AAC on SOUND_PID with a descriptor."""
    streams = b"\x1b\xe1\x01\xf0\0" if video else b""
    streams = b"\x0f\xe1\x02\xf0\x02\x0a\0" + streams if sound else streams
    length = 9 + len(streams) + 4
    return packet(PMT_PID, b"\0\x02\xb0%c\0\x01\xc1\0\0\xe1\x01\xf0\0" % length + streams + bytes(4), start=True)


def stream(groups: int, *, length: int = 20, seed: int = 1) -> list[bytes]:
    """Packets: `groups` of pictures, each begins with PAT, PMT and a random access point."""
    chance = random.Random(seed)
    packets = []
    for _ in range(groups):
        packets += [pat(), pmt(), packet(VIDEO_PID, chance.randbytes(100), start=True, random_access=True)]
        packets += [packet(VIDEO_PID, chance.randbytes(180)) for _ in range(length - 3)]
    return packets


def group(packets: int, *, key: bool = True) -> bytes:
    """A PAT like no other, and `packets` more: with a key frame a decoder can begin at the PAT."""
    head = [pat(stuffing=os.urandom(100).replace(b"\x47", b"\x48")), pmt(), packet(VIDEO_PID, start=True, random_access=key)]
    return b"".join([*head, *(packet(VIDEO_PID) for _ in range(packets - 2))])
