# SPDX-License-Identifier: Apache-2.0
"""Files of the share that this process has open and need not close when the share leaves: what is open behind their descriptors is
exchanged for an empty file meanwhile (dup2(2)), and opened again when the share is back.

    with held(fd) as file: ...         # while the block lasts
    let_go(prefixes)                   # the share can be unmounted as far as these files are concerned
    take_up()                          # the same descriptors, with the same files at the same positions

A descriptor that is let go reads as the end of a file, so a transfer that is sent from it stops at a byte boundary: its sender asks
`HeldFile.absences` whether that was the end. For the whole process, and for any thread."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator

_KEPT = os.O_ACCMODE | os.O_PATH | os.O_DIRECTORY | os.O_NONBLOCK | os.O_APPEND
"""Flags of an open file that it is opened with again."""
_lock = threading.Lock()
_held: dict[int, HeldFile] = {}


class HeldFile:
    """One descriptor, however often it is held. `absences` counts how often it was let go; `error`: why it could not be opened
    again."""

    def __init__(self, fd: int) -> None:
        self.fd, self.absences, self.holders = fd, 0, 0
        self.error: OSError | None = None
        self._path = b""
        self._flags = self._position = self._size = 0

    @property
    def away(self) -> bool:
        """Whether it is let go now."""
        return bool(self._path)

    def check(self) -> None:
        """Raises OSError if it could not be opened again: the file is gone, or has become shorter."""
        if self.error is not None:
            raise self.error

    def let_go(self, prefixes: tuple[bytes, ...]) -> None:
        """If it lies beneath one of them."""
        path = os.readlink(b"/proc/self/fd/%d" % self.fd)
        if self.away or not (path + b"/").startswith(prefixes):
            return
        self._flags = fcntl.fcntl(self.fd, fcntl.F_GETFL) & _KEPT
        facts = os.fstat(self.fd)
        self._size = facts.st_size if stat.S_ISREG(facts.st_mode) else 0
        self._position = 0 if self._flags & os.O_PATH else os.lseek(self.fd, 0, os.SEEK_CUR)
        self._exchange(os.memfd_create("let-go", os.MFD_CLOEXEC))
        self._path = path
        self.absences += 1

    def take_up(self) -> None:
        """What cannot be opened stays empty, and `check` says why."""
        if not self.away:
            return
        path, self._path = self._path, b""
        try:
            fd = os.open(path, self._flags | os.O_CLOEXEC)
        except OSError as error:
            self.error = error
            return
        if os.fstat(fd).st_size < self._size:
            os.close(fd)
            self.error = OSError(errno.ESTALE, "the file has become shorter while the share was away", os.fsdecode(path))
            return
        if not self._flags & os.O_PATH:
            os.lseek(fd, self._position, os.SEEK_SET)
        self._exchange(fd)

    def _exchange(self, fd: int) -> None:
        os.dup2(fd, self.fd, inheritable=os.get_inheritable(self.fd))
        os.close(fd)


@contextlib.contextmanager
def held(fd: int) -> Iterator[HeldFile]:
    """It must stay open while the block lasts."""
    with _lock:
        file = _held.setdefault(fd, HeldFile(fd))
        file.holders += 1
    try:
        yield file
    finally:
        with _lock:
            file.holders -= 1
            if not file.holders:
                del _held[fd]


def let_go(prefixes: tuple[str, ...]) -> None:
    """Of all held files whose path begins with one of `prefixes` ("/srv/share/"). Idempotent."""
    beneath = tuple(os.fsencode(prefix) for prefix in prefixes)
    with _lock:
        for file in _held.values():
            with contextlib.suppress(OSError):
                file.let_go(beneath)


def take_up() -> None:
    """Open them again. Idempotent."""
    with _lock:
        for file in _held.values():
            file.take_up()
