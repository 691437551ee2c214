# SPDX-License-Identifier: Apache-2.0
"""Files of a share that is not mounted, as the host sees them: their size and time, and that the host may send them.

    application -> agent  {"v":1,"op":"look","id":7,"path":"/srv/share/film/1.m4s"}
    agent -> host         {"type":"look","token":"<32 hex>","path":"film/1.m4s"}
    host -> agent         {"type":"seen","token":"...","size":N,"mtime_ns":N,"inode":N,"public":true} or {...,"errno":2}
    agent -> application  {"v":1,"id":7,"looked":0} with a descriptor, or {"v":1,"id":7,"looked":2}

The descriptor stands for the file: it has its size and its time, nothing can be read from it (O_PATH), and a transfer of it is
one of the file. Whoever has it was allowed to: root, or anybody if everybody may read the file."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable

from guest_agent.handoff.errors import NotMovable
from guest_agent.handoff.recent import Recent
from guest_agent.handoff.wire import Header
from guest_agent.share import SharedFile, beneath_share

Answer = Callable[..., None]
"""Of `answer(errno)`, or `answer(0, descriptor)`; the descriptor is closed afterwards."""
_LARGEST = 1 << 62
_REMEMBERED = 65536
"""What stands for files; of one that is forgotten a transfer waits for the share."""


class Looks:
    """What was asked and what was seen. `send` is the channel's; it raises ConnectionError while the host is away."""

    def __init__(self, *, send: Callable[[Header, bytes], None]) -> None:
        self._send = send
        self._asked: dict[str, tuple[str, bool, Answer]] = {}
        self._seen: Recent[tuple[int, int], SharedFile] = Recent(_REMEMBERED)

    def ask(self, path: object, shares: tuple[str, ...], *, everything: bool, answer: Answer) -> None:
        """`everything`: the asker may read all files. Raises ValueError for what is no path."""
        if type(path) is not str:
            raise ValueError("path is no text")
        try:
            token, relative = os.urandom(16).hex(), beneath_share(path, shares)
        except NotMovable:
            answer(errno.EXDEV)
            return
        self._asked[token] = relative, everything, answer
        try:
            self._send({"type": "look", "token": token, "path": relative}, b"")
        except (ConnectionError, ValueError) as error:
            del self._asked[token]
            answer(errno.EAGAIN if isinstance(error, ConnectionError) else errno.EINVAL)

    def message(self, header: Header) -> None:
        """The host has looked."""
        asked = self._asked.pop(str(header.get("token")), None)
        if asked is None:
            return
        path, everything, answer = asked
        size, mtime_ns, inode, number = (_number(header.get(name)) for name in ("size", "mtime_ns", "inode", "errno"))
        if size is None or mtime_ns is None or inode is None:
            answer(number or errno.EIO)
        elif not (everything or header.get("public") is True):
            answer(errno.EACCES)
        else:
            self._stand_in(SharedFile(path, inode, size), mtime_ns, answer)

    def _stand_in(self, file: SharedFile, mtime_ns: int, answer: Answer) -> None:
        """The kernel gives no number of such a file twice (mm/shmem.c, shmem_reserve_inode)."""
        with open(os.memfd_create("streamlift", os.MFD_CLOEXEC), "wb", buffering=0) as memory:
            os.truncate(memory.fileno(), file.size)
            os.utime(memory.fileno(), ns=(mtime_ns, mtime_ns))
            given = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_PATH | os.O_CLOEXEC)
        try:
            facts = os.fstat(given)
            self._seen[facts.st_dev, facts.st_ino] = file
            answer(0, given)
        finally:
            os.close(given)

    def find(self, fd: int) -> SharedFile | None:
        """What a descriptor stands for; None if it is any other."""
        if not self._seen:
            return None
        facts = os.fstat(fd)
        return self._seen.get((facts.st_dev, facts.st_ino))

    def host_down(self) -> None:
        """Nobody answers what was asked."""
        asked, self._asked = self._asked, {}
        for _, _, answer in asked.values():
            with contextlib.suppress(OSError):
                answer(errno.EAGAIN)

    def clear(self) -> None:
        """The share is back: what stood for its files means nothing any more."""
        self._seen.clear()


def _number(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _LARGEST else None
