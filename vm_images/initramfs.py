# SPDX-License-Identifier: Apache-2.0
"""The initramfs: busybox, the early modules and one script, written as a cpio archive (newc, as in the
kernel's Documentation/driver-api/early-userspace/buffer-format.rst) with no tool's help."""

import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vm_images.command import EPOCH

INIT = """#!/bin/busybox sh
# Loads what the root file system needs, mounts it and goes there.
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
while read -r module; do
    /bin/busybox insmod "/modules/$module" || echo "initramfs: cannot load $module"
done < /modules/order
tries=0
until [ -b /dev/vda ] || [ $tries -ge 500 ]; do
    /bin/busybox usleep 10000
    tries=$((tries + 1))
done
/bin/busybox mount -t ext4 -o noatime /dev/vda /root || echo "initramfs: no root file system on /dev/vda"
for place in dev proc sys; do
    /bin/busybox mount -o move "/$place" "/root/$place"
done
exec /bin/busybox switch_root /root /lib/systemd/systemd
"""


@dataclass(frozen=True)
class Entry:
    """One name in the archive; `device` is (major, minor) of a character device."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def write_initramfs(path: Path, *, busybox: Path, modules: Sequence[Path], init: str = INIT) -> None:
    """Write the archive; `modules` are loaded in the order given, by `init`."""
    order = "".join(f"{module.name}\n" for module in modules)
    entries = [
        *(Entry(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", "modules", "proc", "root", "sys")),
        # Without it the first process has no standard output before devtmpfs is mounted.
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()),
        Entry("init", stat.S_IFREG | 0o755, init.encode()),
        Entry("modules/order", stat.S_IFREG | 0o644, order.encode()),
        *(Entry(f"modules/{module.name}", stat.S_IFREG | 0o644, module.read_bytes()) for module in modules),
    ]
    path.write_bytes(archive(entries))


def archive(entries: Iterable[Entry]) -> bytes:
    """The entries as one newc archive, trailer included."""
    parts = [_record(entry, inode=number) for number, entry in enumerate(entries, start=1)]
    parts.append(_record(Entry("TRAILER!!!", 0), inode=0))
    return b"".join(parts)


def _record(entry: Entry, *, inode: int) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        inode,
        entry.mode,
        0,
        0,
        links,
        EPOCH if entry.mode else 0,
        len(entry.data),
        0,
        0,
        *entry.device,
        len(name),
        0,
    )
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
