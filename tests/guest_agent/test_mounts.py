# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

from guest_agent.mounts import Mount, holders, mounts_at, split_options

TABLE = """\
/dev/vda / ext4 rw,relatime 0 0
streamlift /srv/share 9p rw,sync,dirsync,relatime,access=client,msize=524288,trans=virtio 0 0
other /srv/with\\040space 9p ro,trans=virtio 0 0
upper /srv/share 9p ro,trans=virtio 0 0
"""


def test_the_topmost_of_each_target(tmp_path: Path) -> None:
    table = tmp_path / "mounts"
    table.write_text(TABLE)
    found = mounts_at(("/srv/share/", "/srv/with space", "/srv/nothing"), str(table))
    assert found == (
        Mount("upper", "/srv/share", "9p", "ro,trans=virtio"),
        Mount("other", "/srv/with space", "9p", "ro,trans=virtio"),
    )


def test_options() -> None:
    flags, data = split_options("rw,sync,dirsync,relatime,access=client,msize=524288,trans=virtio")
    assert (flags, data) == (16 | 128 | 1 << 21, "access=client,msize=524288,trans=virtio")
    assert split_options("ro,nosuid,nodev,noexec") == (1 | 2 | 4 | 8, "")


def test_who_keeps_it_busy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (tmp_path / "file").open():
        mine = [words for words in holders(Mount("", str(tmp_path), "", "")) if words.endswith(str(tmp_path / "file"))]
    assert len(mine) == 1
    assert not list(holders(Mount("", str(tmp_path / "fil"), "", "")))
