# SPDX-License-Identifier: Apache-2.0
"""Files of the share that this process has open and need not close when the share leaves: what is open behind their descriptors is
exchanged for an empty file meanwhile (dup2(2)), and opened again when the share is back.

    with held(fd) as file: ...         # while the block lasts
    let_go(prefixes)                   # the share can be unmounted as far as these files are concerned
    take_up()                          # the same descriptors, with the same files at the same positions

A descriptor that is let go reads as the end of a file, so a transfer that is sent from it stops at a byte boundary: its sender asks
`HeldFile.absences` whether that was the end. Another descriptor may stand in for it meanwhile, by which the host knows the file
(`offload_open.py`). For the whole process, and for any thread."""

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
    again; `stand_in`: what names it to the host while it is away, if anything does (-1). That number means no other file as long as
    this one is held."""

    def __init__(self, fd: int) -> None:
        self.fd, self.absences, self.holders = fd, 0, 0
        self.error: OSError | None = None
        self._stand_in, self._named = -1, False
        self._path = b""
        self._flags = self._position = self._size = 0

    @property
    def away(self) -> bool:
        """Whether it is let go now."""
        return bool(self._path)

    @property
    def stand_in(self) -> int:
        return self._stand_in if self._named else -1

    @property
    def path(self) -> str:
        """Of one that is away."""
        return os.fsdecode(self._path)

    @property
    def size(self) -> int:
        """Bytes; while it is away, those that it had."""
        return self._size if self.away else os.fstat(self.fd).st_size

    def check(self) -> None:
        """Raises OSError if it could not be opened again: the file is gone, or has become shorter."""
        if self.error is not None:
            raise self.error

    def let_go(self, prefixes: tuple[bytes, ...]) -> None:
        """If it lies beneath one of them."""
        if self.away:
            return
        path = os.readlink(b"/proc/self/fd/%d" % self.fd)
        if not (path + b"/").startswith(prefixes):
            return
        self._flags = fcntl.fcntl(self.fd, fcntl.F_GETFL) & _KEPT
        facts = os.fstat(self.fd)
        self._size = facts.st_size if stat.S_ISREG(facts.st_mode) else 0
        self._position = 0 if self._flags & os.O_PATH else os.lseek(self.fd, 0, os.SEEK_CUR)
        self._exchange(os.memfd_create("let-go", os.MFD_CLOEXEC))
        self._path = path
        self.absences += 1

    def begin_away(self, path: str) -> None:
        """Its share is away, and all that there is of it is a descriptor that stands in for it."""
        self._path, self._flags = os.fsencode(path), os.O_RDONLY | os.O_NONBLOCK
        self._size, self._position = os.fstat(self.fd).st_size, 0
        self.name(os.dup(self.fd))

    def name(self, stand_in: int) -> None:
        """Take a descriptor that stands in for it."""
        if self._stand_in < 0:
            self._stand_in = stand_in
        else:
            os.dup2(stand_in, self._stand_in, inheritable=False)
            os.close(stand_in)
        self._named = True

    def close(self) -> None:
        """Nobody holds it any more."""
        if self._stand_in >= 0:
            os.close(self._stand_in)

    def take_up(self) -> None:
        """What cannot be opened stays empty, and `check` says why."""
        if not self.away:
            return
        self._named = False
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
                file.close()
                del _held[fd]


def size_of(fd: int) -> int:
    """Bytes of an open file, whether or not it is held and away."""
    with _lock:
        file = _held.get(fd)
        return file.size if file is not None else os.fstat(fd).st_size


def let_go(prefixes: tuple[str, ...]) -> None:
    """Of all held files whose path begins with one of `prefixes` ("/srv/share/"). Idempotent."""
    with _lock:
        for file in _held.values():
            _let_go(file, prefixes)


def let_go_of(file: HeldFile, prefixes: tuple[str, ...]) -> None:
    """Of that one."""
    with _lock:
        _let_go(file, prefixes)


def _let_go(file: HeldFile, prefixes: tuple[str, ...]) -> None:
    with contextlib.suppress(OSError):
        file.let_go(tuple(map(os.fsencode, prefixes)))


def take_up(*files: HeldFile) -> None:
    """Open these again, or all. Idempotent."""
    with _lock:
        for file in files or _held.values():
            file.take_up()


def take_up_one() -> bool:
    """Open any of them again. Whether there was one."""
    with _lock:
        file = next((file for file in _held.values() if file.away), None)
        if file is not None:
            file.take_up()
    return file is not None
