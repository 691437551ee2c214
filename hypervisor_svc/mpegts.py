# SPDX-License-Identifier: Apache-2.0
"""MPEG transport streams (ISO/IEC 13818-1 section 2.4): where to cut one, and where a receiver can begin. Pure.

A *sync point* is the packet of a PAT after which a PMT and then a packet with the random_access_indicator follow before the
next PAT: whoever begins there learns what the stream holds, and can decode soon. Where there is video, the indicator must be
its: every packet of sound may be one to begin with. A sync point is known when the indicator is seen."""

from __future__ import annotations

from collections.abc import Iterator

PACKET = 188
"""Bytes (section 2.4.3.2)."""
RTP_HEADER = 12
"""Bytes before the packets of a datagram, where there are any (RFC 2250 section 2, RFC 3550 section 5.1)."""
SYNC_BYTE = 0x47
_VIDEO = frozenset({0x01, 0x02, 0x10, 0x1B, 0x1E, 0x1F, 0x20, 0x21, 0x24, 0x33, 0x42, 0xD1, 0xEA})
"""Stream types (table 2-34): MPEG-1 and 2, MPEG-4, H.264 and its kin, JPEG 2000, HEVC, VVC, AVS, Dirac, VC-1."""
_START, _ADAPTATION, _RANDOM_ACCESS = 0x40, 0x20, 0x40


class Framer:
    """Cuts a byte stream into entries of whole packets, at most `largest` bytes each; a PAT begins an entry. Bytes that belong
    to no packet are an entry of their own: nothing is left out."""

    def __init__(self, largest: int) -> None:
        self._largest = max(largest - largest % PACKET, PACKET)
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What is complete now."""
        self._rest += data
        while self._rest:
            at = _aligned(self._rest)
            if at:
                yield self._take(at)
                continue
            end = self._end()
            if not end:
                return
            yield self._take(end)

    @property
    def rest(self) -> bytes:
        """What has come of the entry after those."""
        return bytes(self._rest)

    def flush(self) -> bytes:
        """What is left when the source ends."""
        return self._take(len(self._rest))

    def _take(self, count: int) -> bytes:
        taken = bytes(self._rest[:count])
        del self._rest[:count]
        return taken

    def _end(self) -> int:
        """Where the entry that begins here ends: before a PAT, before what is no packet, or where it is full. 0: not yet."""
        rest, end = self._rest, PACKET
        limit = min(self._largest, len(rest))
        while end + PACKET <= limit and rest[end] == SYNC_BYTE and not _is_pat(rest, end):
            end += PACKET
        return end if end <= len(rest) else 0


def _aligned(data: bytearray) -> int:
    """Bytes before the first packet; 0 also if nobody can tell yet."""
    if data[0] == SYNC_BYTE:
        return 0
    at = 0
    while (at := data.find(SYNC_BYTE, at)) >= 0:
        if at + PACKET >= len(data) or data[at + PACKET] == SYNC_BYTE:
            return at
        at += 1
    return len(data)


def _pid(data: bytes | bytearray, at: int) -> int:
    return (data[at + 1] & 0x1F) << 8 | data[at + 2]


def _is_pat(data: bytes | bytearray, at: int) -> bool:
    return _pid(data, at) == 0 and bool(data[at + 1] & _START)


class SyncPoints:
    """Looks at entries in their order and says which of them receivers can begin with."""

    def __init__(self) -> None:
        self._pat: int | None = None
        self._tables: frozenset[int] = frozenset()
        self._streams: frozenset[int] = frozenset()

    def look(self, sequence: int, payload: bytes) -> int | None:
        """The sequence number of the entry that this one proves to be a sync point, if it does."""
        found = None
        if len(payload) % PACKET == RTP_HEADER:
            payload = payload[RTP_HEADER:]
        for at in range(0, len(payload) - PACKET + 1, PACKET):
            if payload[at] != SYNC_BYTE:
                break
            if self._proves(sequence, payload, at):
                found, self._pat = self._pat, None
        return found

    def _proves(self, sequence: int, payload: bytes, at: int) -> bool:
        if _is_pat(payload, at):
            self._pat, self._streams = sequence, frozenset()
            self._tables = _program_tables(payload[at : at + PACKET])
        elif _pid(payload, at) in self._tables and payload[at + 1] & _START:
            self._streams |= _decisive_streams(payload[at : at + PACKET])
        return self._pat is not None and _pid(payload, at) in self._streams and _is_random_access(payload, at)


def _is_random_access(data: bytes, at: int) -> bool:
    """Section 2.4.3.5."""
    return bool(data[at + 3] & _ADAPTATION and data[at + 4] and data[at + 5] & _RANDOM_ACCESS)


def _section(packet: bytes, *, head: int) -> tuple[int, int, int]:
    """Where the section that begins in a packet is (section 2.4.4): its first byte, the first after its head, and its end without
    the checksum, or the packet's. Empty if it makes no sense."""
    at = 4 + (packet[4] + 1 if packet[3] & _ADAPTATION else 0)
    begin = at + 1 + packet[at] if at < PACKET else PACKET  # after the pointer_field
    if begin + head > PACKET:
        return 0, 0, 0
    length = (packet[begin + 1] & 0x0F) << 8 | packet[begin + 2]
    return begin, begin + head, min(begin + 3 + length - 4, PACKET)


def _program_tables(packet: bytes) -> frozenset[int]:
    """The PIDs of the PMTs that a PAT names (section 2.4.4.3); none if it makes no sense."""
    _, first, end = _section(packet, head=8)
    programs = range(first, end - 3, 4)
    return frozenset((packet[p + 2] & 0x1F) << 8 | packet[p + 3] for p in programs if packet[p] or packet[p + 1])


def _decisive_streams(packet: bytes) -> frozenset[int]:
    """The PIDs of a PMT's video streams, of all its streams if none is video (section 2.4.4.8); none if it makes no sense."""
    begin, at, end = _section(packet, head=12)
    if not end:
        return frozenset()
    at += (packet[begin + 10] & 0x0F) << 8 | packet[begin + 11]
    streams = {}
    while at + 5 <= end:
        streams[(packet[at + 1] & 0x1F) << 8 | packet[at + 2]] = packet[at] in _VIDEO
        at += 5 + ((packet[at + 3] & 0x0F) << 8 | packet[at + 4])
    video = frozenset(pid for pid, is_video in streams.items() if is_video)
    return video or frozenset(streams)
