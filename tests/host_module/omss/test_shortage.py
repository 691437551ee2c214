# SPDX-License-Identifier: Apache-2.0
"""When there is not enough: of memory, in a small cgroup, and of workers, for two classes. In a VM with the module."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor_svc import omss
from hypervisor_svc.omss import Join, OnLag, SinkState
from tests.host_module.omss.streams import (
    PIECE,
    Link,
    catch_up,
    feed,
    links,
    numbers,
    outcome,
    read_bytes,
    received,
    references,
    wait_for,
)

LIMIT = 8 << 20
"""Bytes of memory of the cgroup in which the slow sinks' sockets are."""
SLOW, PIECES = 100, 3000
CROWD = 100
"""Sinks of each class."""


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """After each test the module is as idle as before it."""
    os.sched_setaffinity(0, {0})
    yield
    wait_for(lambda: references() == 0, f"{references()} references to the module are left")


@contextlib.contextmanager
def cgroup(limit: int, folder: Path) -> Iterator[Path]:
    """A small one. Who makes a socket while he is in it has it charged to it. Beyond the limit sockets are under pressure; a hard
    one (memory.max) has the kernel kill for every send, whoever sends."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "none", str(folder)], check=True)
    try:
        (folder / "cgroup.subtree_control").write_text("+memory")
        group = folder / "small"
        group.mkdir()
        (group / "memory.high").write_text(str(limit))
        yield group
        group.rmdir()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def within(group: Path) -> Iterator[None]:
    """This process, for the block."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))


def socket_memory(group: Path) -> int:
    """Bytes."""
    rows = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
    return int(rows["sock"])


def pressed(group: Path) -> int:
    """How often it was over its limit."""
    rows = dict(row.split() for row in (group / "memory.events").read_text().splitlines())
    return int(rows["high"])


def test_a_small_cgroup_is_its_own_sinks_trouble(tmp_path: Path) -> None:
    """Stalled sinks fill the cgroup that their sockets are charged to. Nobody else's stream changes; they lose whole entries, and
    go on when there is room; nothing stays charged."""
    with cgroup(LIMIT, tmp_path / "cgroup") as group:
        with contextlib.ExitStack() as stack:
            source, *steady = stack.enter_context(links(["udp4", "tcp4", "tcp6", "udp4"]))
            with within(group):
                slow = stack.enter_context(links(["tcp4"] * SLOW))
            omss.set_source(source.near, ring=64)
            for sink in (*steady, *slow):
                omss.add_sink(source.near, sink.near, on_lag=OnLag.HEAD_DROP)
            for first in range(0, PIECES, 50):
                feed(source, first, 50)
                read_bytes(steady, (first + 50) * PIECE)
            assert all(received(sink) == list(range(PIECES)) for sink in steady)
            assert pressed(group) > 0, "it was a shortage"
            assert all(outcome(sink).sent.drops.total for sink in slow), "each lost some"
            for sink in slow:
                catch_up(sink)
            feed(source, PIECES, 10)
            for sink in slow:
                catch_up(sink)
                whole_pieces(sink, PIECES + 10)
        wait_for(lambda: socket_memory(group) == 0, "nothing stays charged")


def test_a_higher_class_comes_first() -> None:
    """Both have a backlog; while the high one has something to do, nearly nothing of the low one is done, though it was there
    before. Served by turns they would get on alike."""
    with backlog(3000, service_class=1) as low, backlog(1000, service_class=6) as high:
        add_sinks(low, service_class=1)
        add_sinks(high, service_class=6)
        before, begun = sent(low), sent(high)
        wait_for(lambda: sent(high) == CROWD * 1000, "the high class is done", timeout=60)
        meanwhile = sent(low) - before
        assert meanwhile < (CROWD * 1000 - begun) / 2 or begun > CROWD * 900
        wait_for(lambda: sent(low) == CROWD * 3000, "then it is the low class's turn", timeout=60)


@contextlib.contextmanager
def backlog(pieces: int, *, service_class: int) -> Iterator[list[Link]]:
    """A source whose pieces are all in the ring, and sinks for it, which nobody reads."""
    with links(["udp4"] * (1 + CROWD)) as (source, *sinks):
        for sink in sinks:
            sink.far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        omss.set_source(source.near, ring=4096, service_class=service_class)
        feed(source, 0, pieces)
        wait_for(lambda: omss.status(source.near).head == pieces, "all is in the ring")
        yield [source, *sinks]


def add_sinks(made: list[Link], *, service_class: int) -> None:
    source, *sinks = made
    for sink in sinks:
        omss.add_sink(source.near, sink.near, join=Join.OLDEST, service_class=service_class)


def sent(made: list[Link]) -> int:
    """Entries, to all sinks."""
    return omss.status(made[0].near).sent.entries


def whole_pieces(sink: Link, sent: int) -> None:
    """It lost some, which are counted, and goes on with the newest."""
    found, said = numbers(sink.got), outcome(sink)
    assert found == sorted(set(found)) and found[-10:] == list(range(sent - 10, sent))
    assert (len(found), said.sent.drops.total) == (said.sent.entries, sent - len(found))
    assert said.state is SinkState.STREAMING
