# SPDX-License-Identifier: Apache-2.0
"""What a guest may ask for: the form of its requests, whose connections, and which files."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.handoff.errors import GuestError, HandoffError, Reason
from guest_agent.handoff.snapshot import Endpoint, encode
from hypervisor_svc.policy import (
    Job,
    Seen,
    check_flow,
    look_at,
    open_file,
    read_job,
    read_look,
    read_relay_job,
    read_relay_plan,
    read_token,
    read_udp_job,
)
from hypervisor_svc.splice import SessionOptions
from tests.guest_agent.handoff.samples import SNAPSHOT
from tests.guest_agent.handoff.test_snapshot import JSON

TOKEN = "0123456789abcdef" * 2


def request(**changes: Any) -> tuple[dict[str, Any], bytes]:
    header, body = encode(SNAPSHOT)
    message = {"type": "hand_out", "token": TOKEN, "path": "a/b.m4s", "inode": 7, "offset": 10, "count": 20}
    return message | {"priority": "normal", "snapshot": header} | changes, body


def job(path: str, **changes: Any) -> Job:
    return replace(Job(TOKEN, path, 0, 0, 1, "normal", SNAPSHOT), **changes)


def test_a_good_request() -> None:
    found = read_job(*request())
    assert found == Job(TOKEN, "a/b.m4s", 7, 10, 20, "normal", SNAPSHOT)


@pytest.mark.parametrize(
    "changes",
    [
        {"token": "0" * 31},
        {"token": "0" * 33},
        {"token": TOKEN.upper()},
        {"token": None},
        {"path": ""},
        {"path": "a\0"},
        {"path": "é" * 2048},
        {"path": "\ud800" * 4096},
        {"path": "\ud800"},
        {"path": 1},
        {"inode": -1},
        {"offset": -1},
        {"offset": 1 << 62},
        {"offset": 0.0},
        {"count": 0},
        {"count": False},
        {"priority": "urgent"},
        {"priority": None},
        {"extra": 1},
    ],
)
def test_bad_requests(changes: dict[str, Any]) -> None:
    with pytest.raises(GuestError) as error:
        read_job(*request(**changes))
    assert error.value.reason is Reason.BAD_REQUEST


@given(name=st.sampled_from(sorted(request()[0])), value=JSON)
def test_no_request_crashes(name: str, value: Any) -> None:
    message, body = request()
    try:
        read_job(message | {name: value}, body)
    except GuestError:
        return


RING = {"framing": "raw", "ring_entries": 64, "entry_bytes": 4096, "budget_ms": 0, "max_sinks": 10, "first": 0, "rest": ""}
SINK = {"priority": "normal", "join": "latest", "on_lag": "head_drop", "lag_soft": 0, "lag_hard_ms": 0, "begin": None}
OPEN: dict[str, Any] = {"type": "relay_open", "token": TOKEN, "path": "live", "inode": 7, "offset": 10, "port": 0, **RING}
ENDS = {"local": ["10.0.0.2", 9], "peer": ["10.0.0.3", 9]}
UDP: dict[str, Any] = {"type": "relay_udp", "token": TOKEN, "relay": TOKEN, **ENDS, **SINK}


def joining(**changes: Any) -> tuple[dict[str, Any], bytes]:
    header, body = encode(SNAPSHOT)
    return {"type": "relay_join", "token": TOKEN, "relay": TOKEN, "role": "sink", "snapshot": header, **SINK, **changes}, body


def test_good_words_of_relays() -> None:
    for source in ("file", "ring", "udp", "connection"):
        plan = read_relay_plan({**OPEN, "source": source})
        assert (plan.source, plan.path) == (source, "live" if source in ("file", "ring") else "")
        assert plan.options == SessionOptions(ring_entries=64, entry_bytes=4096, max_sinks=10)
    assert read_relay_job(*joining(begin=1 << 40)).options.begin == 1 << 40
    assert read_udp_job(UDP).peer == Endpoint("10.0.0.3", 9)


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "disk"},
        {"source": None},
        {"ring_entries": 1},
        {"ring_entries": 1 << 17},
        {"entry_bytes": 187},
        {"budget_ms": 1001},
        {"max_sinks": 0},
        {"framing": "mp4"},
        {"offset": -1},
        {"offset": 1 << 62},
        {"path": ""},
        {"more": 1},
    ],
)
def test_bad_relays(changes: dict[str, Any]) -> None:
    with pytest.raises(GuestError) as error:
        read_relay_plan({**OPEN, "source": "ring", **changes})
    assert error.value.reason is Reason.BAD_REQUEST


@given(name=st.sampled_from(sorted({*OPEN, "source", "more"})), source=st.sampled_from(["file", "ring", "udp"]), value=JSON)
def test_no_relay_crashes(name: str, source: str, value: Any) -> None:
    with contextlib.suppress(GuestError):
        plan = read_relay_plan({**OPEN, "source": source, name: value})
        assert 2 <= plan.options.ring_entries <= 1 << 16 and 188 <= plan.options.entry_bytes <= 1 << 16


@given(name=st.sampled_from(sorted(joining()[0])), value=JSON)
def test_no_sink_crashes(name: str, value: Any) -> None:
    with contextlib.suppress(GuestError):
        job = read_relay_job(*joining(**{name: value}))
        assert job.options.begin is None or 0 <= job.options.begin < 1 << 62


@given(name=st.sampled_from(sorted(UDP)), value=JSON)
def test_no_udp_sink_crashes(name: str, value: Any) -> None:
    with contextlib.suppress(GuestError):
        assert 1 <= read_udp_job({**UDP, name: value}).peer.port <= 65535


@given(JSON)
def test_no_token_crashes(value: Any) -> None:
    with pytest.raises(GuestError):
        read_token({"token": value})


@pytest.mark.parametrize(
    ("local", "peer", "fine"),
    [
        ("192.0.2.10", "198.51.100.7", True),
        ("2001:db8::10", "2001:db8:1::7", True),
        ("192.0.2.11", "198.51.100.7", False),
        ("192.0.2.10", "192.0.2.10", False),
        ("2001:db8::11", "2001:db8:1::7", False),
    ],
)
def test_only_its_own_connections(local: str, peer: str, fine: bool) -> None:
    snapshot = replace(SNAPSHOT, local=Endpoint(local, 80), peer=Endpoint(peer, 4000))
    if fine:
        check_flow(snapshot, ("192.0.2.10", "2001:db8::10"))
    else:
        with pytest.raises(GuestError) as error:
            check_flow(snapshot, ("192.0.2.10", "2001:db8::10"))
        assert error.value.reason is Reason.FOREIGN_ADDRESS


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A share, and a secret beside it."""
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "share"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "file").write_bytes(b"0123456789")
    (folder / "out").symlink_to("../secret")
    (folder / "in").symlink_to("a/b/file")
    (folder / "a" / "folder").symlink_to("b")
    (folder / "root").symlink_to("/")
    os.mkfifo(folder / "fifo")
    return folder


@pytest.mark.parametrize("path", ["a/b/file", "a/../a/b/file", "./a//b/file"])
def test_a_file_of_the_share(share: Path, path: str) -> None:
    fd = open_file(str(share), job(path))
    try:
        assert os.read(fd, 100) == b"0123456789"
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret", Reason.OUTSIDE_SHARE),
        ("a/../../secret", Reason.OUTSIDE_SHARE),
        ("/etc/passwd", Reason.OUTSIDE_SHARE),
        ("out", Reason.OUTSIDE_SHARE),
        ("in", Reason.OUTSIDE_SHARE),
        ("a/folder/file", Reason.OUTSIDE_SHARE),
        ("root/etc/passwd", Reason.OUTSIDE_SHARE),
        ("missing", Reason.NO_SUCH_FILE),
        ("a/b/file/x", Reason.NO_SUCH_FILE),
        ("n" * 256, Reason.NO_SUCH_FILE),
        ("a", Reason.NOT_A_REGULAR_FILE),
        ("fifo", Reason.NOT_A_REGULAR_FILE),
    ],
)
def test_files_that_are_refused(share: Path, path: str, reason: Reason) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for refused in (lambda: open_file(str(share), job(path)), lambda: look_at(str(share), path)):
        with pytest.raises(HandoffError) as error:
            refused()
        assert error.value.reason is reason
    assert len(os.listdir("/proc/self/fd")) == before


LOOK: dict[str, Any] = {"type": "look", "token": TOKEN, "path": "a/b/file"}


@pytest.mark.parametrize("changes", [{"path": ""}, {"path": 7}, {"path": "\ud800"}, {"path": "a\0"}, {"offset": 1}])
def test_bad_looks(changes: dict[str, Any]) -> None:
    assert read_look(LOOK) == "a/b/file"
    with pytest.raises(GuestError) as error:
        read_look({**LOOK, **changes})
    assert error.value.reason is Reason.BAD_REQUEST


def test_what_is_seen_of_a_file(share: Path) -> None:
    file = share / "a" / "b" / "file"
    os.utime(file, ns=(1, 1_700_000_000_123_456_789))
    share.chmod(0o755)
    assert look_at(str(share), "a/b/file") == Seen(10, 1_700_000_000_123_456_789, file.stat().st_ino, public=True)


@pytest.mark.parametrize("closed", ["a/b/file", "a/b", "a", "."])
def test_what_not_everybody_may_read(share: Path, closed: str) -> None:
    share.chmod(0o755)
    (share / closed).chmod(0o750)
    assert not look_at(str(share), "a/b/file").public


@given(st.text(min_size=1, max_size=60))
def test_no_look_crashes(name: str) -> None:
    with contextlib.suppress(HandoffError):
        look_at("/usr/share", read_look({**LOOK, "path": name}))


def _replaced(file: Path) -> None:
    file.with_suffix(".new").write_bytes(b"0123456789")
    file.with_suffix(".new").rename(file)


def _shortened(file: Path) -> None:
    os.truncate(file, 4)


@pytest.mark.parametrize("change", [_replaced, _shortened])
def test_a_file_that_changed_since_it_was_opened(share: Path, change: Callable[[Path], None]) -> None:
    file = share / "a" / "b" / "file"
    asked = job("a/b/file", inode=file.stat().st_ino, offset=5)
    os.close(open_file(str(share), asked))
    change(file)
    with pytest.raises(GuestError) as error:
        open_file(str(share), asked)
    assert error.value.reason is Reason.FILE_CHANGED


def test_files_are_opened_for_reading(share: Path) -> None:
    fd = open_file(str(share), job("a/b/file"))
    try:
        assert stat.S_ISREG(os.fstat(fd).st_mode)
        with pytest.raises(OSError):
            os.write(fd, b"x")
    finally:
        os.close(fd)


@given(st.text(min_size=1, max_size=60))
def test_no_name_crashes(name: str) -> None:
    try:
        os.close(open_file("/usr/share", job(name)))
    except HandoffError:
        return
