# SPDX-License-Identifier: Apache-2.0
"""A ring in a file on the share: a program in the guest writes it (`guest_agent/ring.py`); who reads it, the host or another
program in the guest, takes the bytes from the page cache.

The ring keeps the last `size` bytes of a stream that is numbered from 0. Byte p is at `HEADER_BYTES + p % size`::

        stream      ··········tail░░░░░░░░░░░░░░░░░head▒▒▒▒▒▒reserved
                              ╰──────── size ────────────────╯
        file        [ header | the ring's `size` bytes ]

Header, little endian, the rest of its 4096 bytes is nobody's:

     0   8  magic, b"slring\\0\\1"       24  8  identity: a random number, new with every ring
     8   4  version, 1                  32  8  reserved: what is before it may be being written now
    12   4  CRC-32 of bytes 16 to 64    40  8  head: what is before it is written
    16   8  size, a multiple of 4096    48  8  flags; bit 0: nothing more will come
                                        56  8  0

The writer says what it is about to write (`reserved`), writes, and says that it has (`head`). So a reader that looks at the header
again after it has read knows which of its bytes were overwritten meanwhile: those before `tail`. It needs no lock and is not waited
for. A header that was read while it was being written has another checksum.

What a file says is the guest's word: `decode` checks every number, and `read` never takes more than it is asked for."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from dataclasses import dataclass

MAGIC = b"slring\0\1"
VERSION = 1
HEADER_BYTES = 4096
SIZE_UNIT = 4096
MAX_SIZE = 1 << 40
_LARGEST = 1 << 62
_ENDED = 1
_FRONT = struct.Struct("<8sII")
_FIELDS = struct.Struct("<6Q")
HEAD_BYTES = _FRONT.size + _FIELDS.size
"""Of the header, what says something."""
TRIES = 5
"""How often a header is read that makes no sense: its writer may be in the middle of it."""


@dataclass(frozen=True, slots=True)
class RingHeader:
    """See above. Raises ValueError for numbers that cannot be."""

    size: int
    identity: int
    reserved: int = 0
    head: int = 0
    ended: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.size <= MAX_SIZE or self.size % SIZE_UNIT:
            raise ValueError(f"a ring of {self.size} bytes: not a multiple of {SIZE_UNIT} up to {MAX_SIZE}")
        if not 0 <= self.identity < 1 << 64:
            raise ValueError(f"identity {self.identity} is no 64-bit number")
        if not 0 <= self.head <= self.reserved < _LARGEST or self.reserved - self.head > self.size:
            raise ValueError(f"a head at {self.head}, with what is being written up to {self.reserved}, in {self.size} bytes")

    @property
    def tail(self) -> int:
        """The first byte that is certainly not overwritten."""
        return max(self.reserved - self.size, 0)


def encode(header: RingHeader) -> bytes:
    """`HEAD_BYTES` bytes."""
    flags = _ENDED if header.ended else 0
    fields = _FIELDS.pack(header.size, header.identity, header.reserved, header.head, flags, 0)
    return _FRONT.pack(MAGIC, VERSION, zlib.crc32(fields)) + fields


def decode(data: bytes) -> RingHeader:
    """Raises ValueError for what is no ring's header, or one that is being written."""
    if len(data) < HEAD_BYTES or not data.startswith(MAGIC):
        raise ValueError("it is not a ring")
    _, version, checksum = _FRONT.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"a ring of version {version}, not {VERSION}")
    if zlib.crc32(data[_FRONT.size : HEAD_BYTES]) != checksum:
        raise ValueError("its header is damaged")
    size, identity, reserved, head, flags, zero = _FIELDS.unpack_from(data, _FRONT.size)
    if flags & ~_ENDED or zero:
        raise ValueError("its header has bits that nobody knows")
    return RingHeader(size, identity, reserved, head, bool(flags & _ENDED))


def pieces(size: int, position: int, count: int) -> tuple[tuple[int, int], ...]:
    """Where `count` bytes (at most `size`) from a position on are in the file: (offset, bytes), two if they pass the ring's end."""
    at = position % size
    first = min(count, size - at)
    parts = ((HEADER_BYTES + at, first), (HEADER_BYTES, count - first))
    return tuple(part for part in parts if part[1])


@dataclass(frozen=True, slots=True)
class Piece:
    """What was read. `position`: of its first byte, behind the one that was asked for if that is overwritten already. `ended`:
    nothing comes after it."""

    position: int
    data: bytes
    ended: bool


class RingReader:
    """Reads one ring, and notices if the file becomes another. The descriptor is the caller's, and may be another one each time."""

    def __init__(self) -> None:
        self._known: RingHeader | None = None

    def header(self, file: int) -> RingHeader:
        """What it says now. Raises OSError: ESTALE if it is not the same ring any more, EBADMSG if it is none."""
        for left in reversed(range(TRIES)):
            try:
                found = decode(os.pread(file, HEAD_BYTES, 0))
                break
            except ValueError as error:
                if not left:
                    raise OSError(errno.EBADMSG, str(error)) from None
        known, self._known = self._known, found
        if known is not None and (known.size, known.identity) != (found.size, found.identity):
            raise OSError(errno.ESTALE, "it is another ring now")
        if known is not None and found.head < known.head:
            raise OSError(errno.ESTALE, "its head went back")
        return found

    def read(self, file: int, position: int, most: int) -> Piece:
        """At most `most` bytes from a position on; none if nothing new is there. Raises OSError: ESTALE if the ring does not reach
        the position, is another or cut short; EBADMSG if it is none."""
        before = self.header(file)
        if position > before.head:
            raise OSError(errno.ESTALE, f"it ends at {before.head}, before {position}")
        begin = max(position, before.tail)
        count = min(most, before.head - begin)
        if not count:
            return Piece(begin, b"", before.ended and begin == before.head)
        data = b"".join(os.pread(file, length, at) for at, length in pieces(before.size, begin, count))
        if len(data) < count:
            raise OSError(errno.ESTALE, "it was cut short")
        after = self.header(file)
        torn = min(max(after.tail - begin, 0), count)
        return Piece(begin + torn, data[torn:], before.ended and begin + count == before.head)
