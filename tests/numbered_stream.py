# SPDX-License-Identifier: Apache-2.0
"""A transport stream without end whose every packet says which one it is: whoever gets a part of it can prove that the part has
each packet once, in order and unchanged, without having what was sent.

A group of pictures is GROUP packets and begins with a sync point: PAT, PMT, and a packet that can be decoded alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from tests.transport_stream import PACKET, VIDEO_PID, packet, pat, pmt

GROUP = 20
GROUP_BYTES = GROUP * PACKET
_NUMBERED = 160
"""Bytes at a packet's end that repeat its number."""
_DIGITS = 16


def packet_at(number: int) -> bytes:
    """The packet with this number, from 0 on. Digits are no sync bytes."""
    place = number % GROUP
    tables = (pat(), pmt())
    head = tables[place] if place < 2 else packet(VIDEO_PID, b"", start=place == 2, random_access=place == 2)
    return head[: PACKET - _NUMBERED] + b"%016x" % number * (_NUMBERED // _DIGITS)


@functools.lru_cache(maxsize=256)
def group_at(index: int) -> bytes:
    """The packets from index * GROUP on."""
    return b"".join(packet_at(index * GROUP + place) for place in range(GROUP))


@dataclass
class Checker:
    """Takes what a receiver gets. `gaps`: the packet that was due and the one that came instead, which begins a group;
    `fault`: the first thing that cannot be, after which nothing more is looked at."""

    due: int | None = None
    packets: int = 0
    gaps: list[tuple[int, int]] = field(default_factory=list)
    fault: str = ""
    _rest: bytes = b""

    @property
    def lost(self) -> int:
        """Packets in all gaps."""
        return sum(came - due for due, came in self.gaps)

    def feed(self, data: bytes) -> None:
        """The next bytes."""
        self._rest += data
        while len(self._rest) >= PACKET and not self.fault:
            taken = self._whole() or self._begin()
            self._rest = self._rest[taken:]

    def _whole(self) -> int:
        """Bytes that are what was due, up to the end of its group."""
        if self.due is None:
            return 0
        place = self.due % GROUP
        expected = group_at(self.due // GROUP)[place * PACKET :]
        count = min(len(expected), len(self._rest) // PACKET * PACKET)
        while count and self._rest[:count] != expected[:count]:
            count = count // PACKET // 2 * PACKET
        self.due += count // PACKET
        self.packets += count // PACKET
        return count

    def _begin(self) -> int:
        """The first packet, or the first after a gap: 0 bytes, for it is due now."""
        seen = self._rest[:PACKET]
        number = _number(seen)
        if number is None or packet_at(number) != seen:
            self.fault = f"no packet of the stream where {self.due} was due: {seen[:32].hex()}"
        elif self.due is None:
            self.due = number
        elif number < self.due:
            self.fault = f"{number} again, {self.due} was due"
        elif number % GROUP:
            self.fault = f"{number} came, {self.due} was due, and it is no sync point"
        else:
            self.gaps.append((self.due, number))
            self.due = number
        return 0


def _number(seen: bytes) -> int | None:
    try:
        return int(seen[-_DIGITS:], 16)
    except ValueError:
        return None
