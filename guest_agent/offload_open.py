# SPDX-License-Identifier: Apache-2.0
"""Files of the share, also while it is away: then the host is asked, which has them all the time (`look.py`).

    file = await open_file("/srv/share/film/1.m4s")      # there, or a file that is away: its size and time are known
    fd = await descriptor(hold)                          # what names a held file to the host, now

What the host cannot tell waits for the share."""

from __future__ import annotations

import contextlib
import errno
import io
import os

from guest_agent import offload_asyncio
from guest_agent.held_files import HeldFile, held

_FINAL = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG})
"""What the host says of a path that would be no other with the share here."""
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
"""O_NONBLOCK: opening a FIFO must not wait for its writer."""


class File(io.FileIO):
    """Open for reading, unbuffered, and held as long as it is: the share may leave and come back, and the file is the same
    afterwards. While it is away it can be asked for its size and time, and sent, but not read."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "rb")
        self._held = contextlib.ExitStack()
        self.hold = self._held.enter_context(held(fd))

    def close(self) -> None:
        """Idempotent."""
        if not self.closed:
            self._held.close()
        super().close()


async def open_file(path: str, *, beneath: str = "/") -> File:
    """Raises OSError as open(2); FileNotFoundError too for what a link leads out of `beneath`."""
    attendance = offload_asyncio.link().attendance
    while attendance.away and attendance.misses(real := os.path.realpath(path)):
        _check(real, beneath, path)
        await attendance.askable()
        try:
            fd = await offload_asyncio.link().look(real)
        except OSError as error:
            if error.errno in _FINAL:
                raise
            await attendance.another(error)
            continue
        if not attendance.away:
            os.close(fd)
            break
        file = File(fd)
        file.hold.begin_away(real)
        return file
    file = File(os.open(path, _FLAGS))
    try:
        _check(os.readlink(f"/proc/self/fd/{file.fileno()}"), beneath, path)
    except BaseException:
        file.close()
        raise
    return file


def _check(real: str, beneath: str, path: str) -> None:
    if not real.startswith(beneath.rstrip("/") + "/"):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


async def descriptor(hold: HeldFile, *, refused: bool = False) -> int:
    """Of a held file, to be handed to the agent; `refused`: the host did not take what stood in for it. Raises OSError if it could
    not be opened again."""
    attendance = offload_asyncio.link().attendance
    attendance.let_go_of(hold)
    if attendance.away and refused:
        await attendance.present()
    while not await _is_open(hold):
        try:
            await _stand_in(hold)
        except OSError as error:
            await attendance.another(error)
        else:
            if hold.stand_in >= 0:
                return hold.stand_in
    hold.check()
    return hold.fd


async def _is_open(hold: HeldFile) -> bool:
    """As soon as the host can be asked for it, or the share is here."""
    attendance = offload_asyncio.link().attendance
    await attendance.askable()
    attendance.take_up(hold)
    return not hold.away


async def _stand_in(hold: HeldFile) -> None:
    """It has one, if it is still away. Raises OSError."""
    if hold.stand_in >= 0:
        return
    fd = await offload_asyncio.link().look(hold.path)
    if hold.away and hold.holders:
        hold.name(fd)
    else:
        os.close(fd)
