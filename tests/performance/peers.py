# SPDX-License-Identifier: Apache-2.0
"""The same work by a peer: a live stream of 256 kbit/s to 1,000 listeners, by Icecast 2 and by the `user` engine.

    ./run bench peers [--json FILE] [--plot FILE] [--quick]

One run, in turns, on loopback: processor time of the serving process for each Gbit/s that its listeners got."""

from __future__ import annotations

import contextlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.performance import bench, fanout
from tests.performance.bench import Bar, Report

ICECAST = "/usr/bin/icecast2"
PASSWORD, MOUNT = "hackme", "/radio"
CONFIG = """<icecast>
 <limits><clients>5000</clients><sources>2</sources><queue-size>4194304</queue-size><burst-on-connect>0</burst-on-connect></limits>
 <authentication><source-password>{password}</source-password><admin-password>{password}</admin-password></authentication>
 <hostname>localhost</hostname>
 <listen-socket><port>{port}</port><bind-address>127.0.0.1</bind-address></listen-socket>
 <paths><basedir>{folder}</basedir><logdir>{folder}</logdir><webroot>{folder}</webroot><adminroot>{folder}</adminroot></paths>
 <logging><accesslog>access.log</accesslog><errorlog>error.log</errorlog><loglevel>1</loglevel></logging>
 <security><chroot>0</chroot><changeowner><user>nobody</user><group>nogroup</group></changeowner></security>
</icecast>
"""
CAVEAT = "loopback: receiving is part of each send here, in all columns; the listeners' HTTP is over before the measurement"
SIDES = ("icecast", "user, 0 ms", "user, 50 ms", "user, 200 ms")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    listeners: int
    seconds: float
    repeats: int


FULL = Plan(1000, seconds=8, repeats=3)
QUICK = Plan(50, seconds=2, repeats=1)


@contextlib.contextmanager
def icecast(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server, and its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    home = folder / "icecast"
    home.mkdir()
    home.chmod(0o777)
    folder.chmod(0o755)
    (home / "icecast.xml").write_text(CONFIG.format(password=PASSWORD, port=port, folder=home))
    argv = [ICECAST, "-c", str(home / "icecast.xml")]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 10
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                if time.monotonic() > deadline:
                    raise RuntimeError(f"Icecast does not answer: {(home / 'error.log').read_text()[-500:]}")
                time.sleep(0.05)
            yield server, port
        finally:
            server.terminate()
        shutil.rmtree(home)


def ask(port: int, head: str) -> socket.socket:
    """A connection whose request was answered with 200."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    sock.sendall(head.encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += sock.recv(1)
    if b" 200 " not in answer:
        raise RuntimeError(answer.decode())
    sock.settimeout(None)
    return sock


@contextlib.contextmanager
def _always_something(encoder: socket.socket) -> Iterator[None]:
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            fanout.feed(encoder, 0.2)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.5)
    try:
        yield
    finally:
        over.set()
        thread.join()


def measure_icecast(programs: dict[str, Path], folder: Path, plan: Plan) -> dict[str, Any]:
    """One measurement."""
    with contextlib.ExitStack() as stack:
        server, port = stack.enter_context(icecast(folder))
        words = "Authorization: Basic c291cmNlOmhhY2ttZQ==\r\nContent-Type: audio/mpeg\r\n"
        encoder = stack.enter_context(ask(port, f"SOURCE {MOUNT} HTTP/1.0\r\n{words}\r\n"))
        with _always_something(encoder):  # a listener is answered when something comes
            with ThreadPoolExecutor(64) as pool:
                socks = list(pool.map(lambda _: ask(port, f"GET {MOUNT} HTTP/1.0\r\n\r\n"), range(plan.listeners)))
        for sock in socks:
            stack.enter_context(sock)
        first = stack.enter_context(fanout.consecutive(socks))
        drain = fanout.start([str(programs["drain"]), str(first), str(len(socks))], first, len(socks))
        fanout.feed(encoder, 1.0)
        before, begun = fanout.processor_time(server.pid), time.monotonic()
        pieces = fanout.feed(encoder, plan.seconds)
        time.sleep(0.35)
        spent, took = fanout.processor_time(server.pid) - before, time.monotonic() - begun
        delivered = sum(int(word) for word in fanout.stop(drain).split())
        expected = pieces * fanout.PIECE * plan.listeners
        share = {"side": "icecast", "sinks": plan.listeners, "seconds": took, "processor_seconds": spent}
        return {**share, "delivered": min(delivered, expected), "expected": expected}


def measure(programs: dict[str, Path], folder: Path, plan: Plan) -> list[dict[str, Any]]:
    """All rows, the sides in turn."""
    rows = []
    for _ in range(plan.repeats):
        rows.append(measure_icecast(programs, folder, plan))
        for side in SIDES[1:]:
            rows.append(fanout.one(programs, side, udp=False, count=plan.listeners, seconds=plan.seconds))
    return rows


def cost(rows: list[dict[str, Any]], side: str) -> float:
    """Median of seconds of a processor for each Gbit delivered."""
    return float(statistics.median(r["processor_seconds"] / (r["delivered"] * 8 / 1e9) for r in rows if r["side"] == side))


def verdicts(rows: list[dict[str, Any]]) -> list[Bar]:
    """How many times better."""
    return [
        Bar(f"Icecast's processor time by that of {side}", cost(rows, "icecast") / cost(rows, side), "times", limit, ">=")
        for side, limit in (("user, 200 ms", 2),)
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    """By side."""
    shown = Table("", "processor seconds a Gbit", "delivered of expected", title="peers")
    for side in SIDES:
        least = min(r["delivered"] / r["expected"] for r in rows if r["side"] == side)
        shown.add_row(side, f"{cost(rows, side):.3f}", f"{least:.3f}")
    return shown


def plot(report: Report, path: Path) -> None:
    """Bars."""
    with bench.drawing(path) as (axis,):
        axis.bar(SIDES, [cost(report.rows, side) for side in SIDES])
        axis.set(ylabel="processor seconds a Gbit delivered", title="TCP listeners, 256 kbit/s")


def main() -> int:
    """Entry point; the exit status."""
    options = bench.arguments(__doc__ or "")
    plan = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = measure(fanout.build(folder), folder, plan)
    report = Report("peers", CAVEAT, rows)
    report.bars = verdicts(rows)
    if options.plot:
        plot(report, options.plot)
    return bench.finish(report, options, [table(rows)])


if __name__ == "__main__":
    sys.exit(main())
