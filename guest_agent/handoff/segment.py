# SPDX-License-Identifier: Apache-2.0
"""TCP segments that a frozen socket did not take (`hold.py`): what they are worth to its successor. Pure.

A segment is the TCP header and the payload as the socket filter saw them (RFC 9293 section 3.1); the kernel may have merged
several into one (GRO). It had not been checked for anything yet, so the checksum is checked here."""

from __future__ import annotations

import array
import functools
import socket
import struct
import sys
from dataclasses import replace

from guest_agent.handoff.snapshot import MAX_QUEUE, Snapshot

_FIN, _SYN, _RST, _URG = 1, 2, 4, 32
_HEADER = struct.Struct("!HHIIBBHHH")
_LARGEST_UNMERGED = 1500
_HALF = 1 << 31
_U32 = 0xFFFFFFFF


@functools.lru_cache(maxsize=4096)
def packed(address: str) -> bytes:
    """4 or 16 bytes, network order."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def ones_sum(data: bytes) -> int:
    """The one's complement sum of 16-bit words (RFC 1071)."""
    words = array.array("H", data + bytes(len(data) & 1))
    if sys.byteorder == "little":
        words.byteswap()
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_sum(source: str, to: str, length: int) -> int:
    """The sum of the pseudo header of `length` bytes of TCP (RFC 9293 section 3.1, RFC 8200 section 8.1)."""
    return ones_sum(packed(source) + packed(to) + struct.pack("!II", length, socket.IPPROTO_TCP))


def is_intact(segment: bytes, source: str, to: str) -> bool:
    """Whether the checksum is right, or is still to be completed by hardware that the packet never met (CHECKSUM_PARTIAL:
    the field holds the pseudo header's sum). A merged one was checked when it was merged."""
    if len(segment) < _HEADER.size:
        return False
    if len(segment) > _LARGEST_UNMERGED:
        return True
    pseudo = pseudo_sum(source, to, len(segment))
    return int.from_bytes(segment[16:18], "big") == pseudo or ones_sum(pseudo.to_bytes(2, "big") + segment) == 0xFFFF


def is_stale(segment: bytes, unacknowledged: int) -> bool:
    """Whether it is a bare acknowledgement of what was acknowledged before; `unacknowledged` is SND.UNA. Such a one has
    nothing more to say, and would be held and sent again at every handoff."""
    if len(segment) < _HEADER.size:
        return False
    _, _, _, acknowledged, offset, flags, *_ = _HEADER.unpack_from(segment)
    bare = len(segment) <= offset >> 4 << 2 and not flags & (_FIN | _SYN | _RST)
    return bare and bool((acknowledged - unacknowledged) & _HALF)


def absorb(snapshot: Snapshot, segments: list[bytes]) -> tuple[Snapshot, list[bytes]]:
    """Add to the receive queue what the segments continue it with; the snapshot, and the segments that must take the road.

    Only where nothing of ours is unacknowledged: what the segments acknowledge is then nothing new."""
    if snapshot.unacked or snapshot.unsent:
        return snapshot, segments
    queue, following, rest = bytearray(snapshot.receive_queue), snapshot.receive_next, []
    for segment in segments:
        fresh = _continuation(segment, following)
        if not fresh or len(queue) + len(fresh) > MAX_QUEUE:
            rest.append(segment)
            continue
        queue += fresh
        following = (following + len(fresh)) & _U32
    if len(rest) == len(segments):
        return snapshot, segments
    return replace(snapshot, receive_queue=bytes(queue)), rest


def _continuation(segment: bytes, following: int) -> bytes:
    """The part of a plain data segment that begins at the sequence number `following`."""
    if len(segment) < _HEADER.size:
        return b""
    _, _, sequence, _, offset, flags, *_ = _HEADER.unpack_from(segment)
    seen = (following - sequence) & _U32
    if flags & (_FIN | _SYN | _RST | _URG) or seen >= _HALF:
        return b""
    return segment[(offset >> 4 << 2) + seen :]
