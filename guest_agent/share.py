# SPDX-License-Identifier: Apache-2.0
"""Which files the host can serve: those on a share that it exports to this guest (VirtFS, 9p over virtio).

The file comes as an open descriptor: that the application could open it is its permission. The kernel tells the path."""

from __future__ import annotations

import functools
import os
import stat
from dataclasses import dataclass

from guest_agent.handoff.errors import NotMovable, Reason

MOUNTS = "/proc/self/mounts"


@dataclass(frozen=True)
class SharedFile:
    """A file as the host knows it: path relative to the share's root, the host's inode number, and size in bytes."""

    path: str
    inode: int
    size: int


NO_FILE = SharedFile("", 0, 0)
"""Of a transfer that sends none."""


def find_shares(mounts: str = MOUNTS) -> tuple[str, ...]:
    """Mount points of 9p file systems, as /proc/self/mounts lists them (octal escapes of proc(5) undone)."""
    with open(mounts, encoding="utf-8", errors="surrogateescape") as table:
        rows = [line.split(" ") for line in table]
    return tuple(row[1].encode("latin-1", "replace").decode("unicode_escape") for row in rows if row[2] == "9p")


def locate(file_fd: int, shares: tuple[str, ...]) -> SharedFile:
    """Where on a share an open file lies. Raises NotMovable: NOT_ON_SHARE, NOT_A_REGULAR_FILE."""
    status = os.fstat(file_fd)
    if not stat.S_ISREG(status.st_mode):
        raise NotMovable(Reason.NOT_A_REGULAR_FILE, "only regular files can be served by the host")
    path = os.readlink(f"/proc/self/fd/{file_fd}")
    if path.endswith(" (deleted)"):
        raise NotMovable(Reason.NOT_ON_SHARE, f"{path} is not on a share of the host any more")
    return SharedFile(beneath_share(path, shares), _host_inode(status), status.st_size)


def beneath_share(path: str, shares: tuple[str, ...]) -> str:
    """A path as the host knows it. Raises NotMovable(NOT_ON_SHARE)."""
    for share in shares:
        if path.startswith(share.rstrip("/") + "/"):
            return path[len(share.rstrip("/")) + 1 :]
    raise NotMovable(Reason.NOT_ON_SHARE, f"{path} is not on a share of the host ({', '.join(shares) or 'none mounted'})")


def _host_inode(status: os.stat_result) -> int:
    """The host's number: Linux's 9p client shows each of them plus 2, so that none is 0 (fs/9p: v9fs_qid2ino, QID2INO)."""
    return status.st_ino - 2 if _is_9p(status.st_dev) else status.st_ino


@functools.lru_cache(maxsize=64)
def _is_9p(device: int) -> bool:
    """By the mount table: statfs(2) on 9p reports the type of the host's file system."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        rows = [line.split(" ") for line in table]
    return any(row[2] == wanted and row[row.index("-") + 1] == "9p" for row in rows)
