# SPDX-License-Identifier: Apache-2.0
"""`offload.Ring`: a program in the guest writes a stream into a file of fixed size on the share, and the host relays it from there.

    ring = offload.Ring("/srv/share/radio", size=16 << 20)
    ring.write(data)                          # the oldest bytes make room
    relay = await offload.publish(ring)       # this program or another; before or after
    ring.close()                              # let go of the file: its share can be unmounted; the next write opens it again
    ring.end()                                # the stream is over

`handoff/ring_file.py` is the format."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from types import TracebackType
from typing import Self

from guest_agent.handoff.ring_file import HEADER_BYTES, SIZE_UNIT, RingHeader, RingReader, encode, pieces

STRIDES = 16
"""A ring's size in strides. What is about to be written is announced one stride ahead: most writes need not say it."""


class Ring:
    """One ring and its writer: there must be only one at a time, and one thread; anybody may read. A writer that comes back goes on
    where the last one stopped.

    `path`: of a file; one that is not there is made if `size` says how many bytes it keeps (rounded up to whole pages). Raises
    OSError: no such file and no `size`, or EBADMSG: the file is no ring; ValueError: it is a ring of another size."""

    def __init__(self, path: str | os.PathLike[str], *, size: int = 0) -> None:
        self.path = os.path.abspath(os.fspath(path))
        size = -(-size // SIZE_UNIT) * SIZE_UNIT
        self._file = -1
        if size:
            _make(self.path, size)
        self._header = self._read_header()
        if size and self._header.size != size:
            raise ValueError(f"{self.path} is a ring of {self._header.size} bytes")

    def _read_header(self) -> RingHeader:
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return RingReader().header(file)
        finally:
            os.close(file)

    @property
    def position(self) -> int:
        """Bytes that were written since it was made: where the next one will be."""
        return self._header.head

    @property
    def size(self) -> int:
        """How many of them it keeps."""
        return self._header.size

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """All of it is for the readers to see when this returns. Raises OSError: what was written before it is seen, and nothing
        of the rest."""
        view = memoryview(data).cast("B")
        stride = self.size // STRIDES
        for at in range(0, len(view), stride):
            self._append(view[at : at + stride], stride)

    def _append(self, data: memoryview, stride: int) -> None:
        self._open()
        header = self._header
        end = header.head + len(data)
        if end > header.reserved:
            header = self._say(replace(header, reserved=min(end + stride, header.head + header.size), ended=False))
        for offset, length in pieces(header.size, header.head, len(data)):
            _write(self._file, data[:length], offset)
            data = data[length:]
        self._say(replace(header, head=end, ended=False))

    def end(self) -> None:
        """Readers that have everything end; writing on begins it again. The file is let go of."""
        self._open()
        self._say(replace(self._header, ended=True))
        self.close()

    def _say(self, header: RingHeader) -> RingHeader:
        _write(self._file, memoryview(encode(header)), 0)
        self._header = header
        return header

    def _open(self) -> None:
        if self._file < 0:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go of the file, for the share cannot be unmounted before; the next write opens it. Idempotent."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make(path: str, size: int) -> None:
    """A new ring, all at once, unless something is there."""
    if os.path.exists(path):
        return
    new = f"{path}.{os.getpid()}.new"
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        try:
            os.ftruncate(file, HEADER_BYTES + size)
            _write(file, memoryview(encode(RingHeader(size, int.from_bytes(os.urandom(8), "little")))), 0)
        finally:
            os.close(file)
        os.rename(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
