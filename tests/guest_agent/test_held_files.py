# SPDX-License-Identifier: Apache-2.0
"""Files that are let go of and taken up again behind their descriptors."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agent.held_files import held, let_go, size_of, take_up, take_up_one


@pytest.fixture(autouse=True)
def _here() -> Iterator[None]:
    yield
    take_up()


def _open_beneath(folder: Path) -> list[str]:
    return [path for number in os.listdir("/proc/self/fd") if (path := _path(number)).startswith(f"{folder}/")]


def _path(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


def test_the_same_file_at_the_same_position(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    with path.open("rb", buffering=0) as file, held(file.fileno()) as hold:
        file.seek(100)
        let_go((f"{tmp_path}/",))
        assert (hold.away, hold.absences, file.read(10)) == (True, 1, b"")
        assert (hold.path, size_of(file.fileno())) == (str(path), 200)
        assert _open_beneath(tmp_path) == []
        let_go((f"{tmp_path}/",))
        assert hold.absences == 1
        take_up()
        hold.check()
        assert (hold.away, file.read(10)) == (False, bytes(range(100, 110)))


def test_one_after_another(tmp_path: Path) -> None:
    """Whoever needs one opens that one."""
    with contextlib.ExitStack() as stack:
        holds = []
        for name in "abc":
            (tmp_path / name).write_text(name)
            holds.append(stack.enter_context(held(stack.enter_context((tmp_path / name).open("rb")).fileno())))
        let_go((f"{tmp_path}/",))
        take_up(holds[1])
        assert [hold.away for hold in holds] == [True, False, True]
        assert take_up_one() and take_up_one() and not take_up_one()
        assert not any(hold.away for hold in holds)


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "file").write_bytes(b"x")
    folder = os.open(tmp_path / "share", os.O_PATH | os.O_DIRECTORY)
    try:
        with held(folder):
            let_go((f"{tmp_path}/share/",))
            with pytest.raises(NotADirectoryError):
                os.open("file", os.O_RDONLY, dir_fd=folder)
            take_up()
            os.close(os.open("file", os.O_RDONLY, dir_fd=folder))
    finally:
        os.close(folder)


def test_what_is_elsewhere_stays(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "sharedfile").write_bytes(b"x")
    with (tmp_path / "sharedfile").open("rb") as file, held(file.fileno()) as hold:
        let_go((f"{tmp_path}/shared/",))
        assert (hold.away, file.read()) == (False, b"x")


def test_one_descriptor_that_is_held_twice(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with (tmp_path / "file").open("rb") as file, held(file.fileno()) as outer:
        with held(file.fileno()) as inner:
            assert inner is outer
        let_go((f"{tmp_path}/",))
        assert outer.away


@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_a_file_that_changed_meanwhile(tmp_path: Path, change: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    with path.open("rb") as file, held(file.fileno()) as hold:
        let_go((f"{tmp_path}/",))
        if change == "gone":
            path.unlink()
        else:
            path.write_bytes(b"123")
        take_up()
        with pytest.raises(OSError) as raised:
            hold.check()
        assert raised.value.errno == (errno.ENOENT if change == "gone" else errno.ESTALE)
        assert file.read() == b""


def test_a_transfer_stops_at_a_byte_boundary(tmp_path: Path) -> None:
    """What sendfile(2) sees is the end of the file."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(100_000))
    here, there = socket.socketpair()
    with here, there, path.open("rb") as file, held(file.fileno()):
        assert os.sendfile(here.fileno(), file.fileno(), 0, 10_000) == 10_000
        let_go((f"{tmp_path}/",))
        assert os.sendfile(here.fileno(), file.fileno(), 10_000, 90_000) == 0
        take_up()
        assert os.sendfile(here.fileno(), file.fileno(), 10_000, 1000) == 1000
        assert there.recv(20_000, socket.MSG_WAITALL | socket.MSG_DONTWAIT) == path.read_bytes()[:11_000]


def test_what_stands_in_for_a_file_keeps_its_number(tmp_path: Path) -> None:
    """Whoever has been told the number means this file, and no other that was opened since."""
    (tmp_path / "file").write_bytes(b"x")
    with (tmp_path / "file").open("rb") as file, held(file.fileno()) as hold:
        let_go((f"{tmp_path}/",))
        assert hold.stand_in == -1
        hold.name(os.memfd_create("first", os.MFD_CLOEXEC))
        number = hold.stand_in
        take_up()
        assert hold.stand_in == -1
        assert os.readlink(f"/proc/self/fd/{number}").startswith("/memfd:first")
        let_go((f"{tmp_path}/",))
        hold.name(os.memfd_create("second", os.MFD_CLOEXEC))
        assert hold.stand_in == number and os.readlink(f"/proc/self/fd/{number}").startswith("/memfd:second")
        take_up()
    assert not os.path.exists(f"/proc/self/fd/{number}")
