# SPDX-License-Identifier: Apache-2.0
"""Mounting and unmounting a share (mount(2), umount(2)), and who keeps one busy."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass

MOUNTS = "/proc/self/mounts"
_FLAGS = {
    "rw": 0,
    "ro": 1,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "sync": 16,
    "mand": 64,
    "dirsync": 128,
    "noatime": 1 << 10,
    "nodiratime": 1 << 11,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
    "lazytime": 1 << 25,
}
"""Words of the mount table that are flags of mount(2); all others are the file system's own."""
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Mount:
    """A row of the mount table (proc(5)): enough to mount the same again."""

    source: str
    target: str
    kind: str
    options: str


def mounts_at(targets: tuple[str, ...], table: str = MOUNTS) -> tuple[Mount, ...]:
    """Those of `targets` on which something is mounted now: the topmost of each."""
    with open(table, encoding="utf-8", errors="surrogateescape") as rows:
        found = {(mount := _read(row)).target: mount for row in rows}
    wanted = [target.rstrip("/") or "/" for target in targets]
    return tuple(found[target] for target in wanted if target in found)


def _read(row: str) -> Mount:
    fields = [field.encode("latin-1", "replace").decode("unicode_escape") for field in row.split(" ")]
    return Mount(*fields[:4])


def split_options(options: str) -> tuple[int, str]:
    """The flags and the rest, as mount(2) wants them."""
    words = options.split(",")
    flags = 0
    for word in words:
        flags |= _FLAGS.get(word, 0)
    return flags, ",".join(word for word in words if word not in _FLAGS)


def unmount(mount: Mount) -> None:
    """Raises OSError: EBUSY while somebody has something open there."""
    if _libc.umount2(os.fsencode(mount.target), 0) != 0:
        raise _failure(mount)


def mount_again(mount: Mount) -> None:
    """The opposite. Raises OSError: the host may refuse, for one while the VM migrates."""
    flags, data = split_options(mount.options)
    source, target, kind = (os.fsencode(text) for text in (mount.source, mount.target, mount.kind))
    if _libc.mount(source, target, kind, ctypes.c_ulong(flags), os.fsencode(data)) != 0:
        raise _failure(mount)


def _failure(mount: Mount) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), mount.target)


def holders(mount: Mount) -> Iterator[str]:
    """Processes that have something open there, for people: `name (pid): file`. Only root sees all."""
    own = mount.target.rstrip("/")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        path = next((path for path in _open_paths(pid) if path == own or path.startswith(own + "/")), None)
        if path is not None:
            yield f"{_name(pid)} ({pid}): {path}"


def _open_paths(pid: str) -> Iterator[str]:
    links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root"]
    try:
        links += [f"/proc/{pid}/fd/{number}" for number in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return  # it has ended, or is not ours to look at
    for link in links:
        try:
            yield os.readlink(link)
        except OSError:
            continue


def _name(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "a process"
