# SPDX-License-Identifier: Apache-2.0
"""The same work by peers: a live stream of 256 kbit/s to 1,000 listeners, by Icecast 2, nginx-rtmp, GStreamer's tcpserversink (a
multihandlesink, as multisocketsink is) and the `user` engine.

    ./run bench peers [--json FILE] [--plot FILE] [--quick]

One run, in turns, on loopback: processor time of the serving process for each Gbit/s that its listeners got, its memory for each of
them, and how long one got nothing (a piece comes every 44 ms, and ours waits for others within its latency budget). ffmpeg's own
HTTP listener takes one client a stream: it cannot do this work."""

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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.performance import bench, fanout
from tests.performance.bench import Bar, Report
from tests.performance.relays import rtmp

PASSWORD, MOUNT = "hackme", "/radio"
WORDS = "Authorization: Basic c291cmNlOmhhY2ttZQ==\r\nContent-Type: audio/mpeg\r\n"
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
NGINX = """load_module /usr/lib/nginx/modules/ngx_rtmp_module.so;
daemon off; master_process off; worker_rlimit_nofile 8000; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 5000; }}
rtmp {{ access_log off; server {{ listen 127.0.0.1:{port}; application live {{ live on; }} }} }}
"""
CAVEAT = "loopback: receiving is part of each send here, in all columns; what the listeners ask is over before the measurement"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    listeners: int
    seconds: float
    repeats: int


FULL = Plan(1000, seconds=8, repeats=3)
QUICK = Plan(50, seconds=2, repeats=1)


@dataclass(frozen=True)
class Peer:
    """A server: how it is started (in a folder, at a port, with a socket that it may read), who feeds it, and how a listener asks.
    `late`: it answers a listener when something comes."""

    argv: Callable[[Path, int, int], list[str]]
    encoder: Callable[[int, socket.socket], fanout.Encoder]
    listener: Callable[[int], socket.socket]
    late: bool = False


@contextlib.contextmanager
def serving(peer: Peer, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, socket.socket]]:
    """The process, its port, and the far end of the socket that it may read."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    home = folder / "peer"
    home.mkdir()
    home.chmod(0o777)
    folder.chmod(0o755)
    near, far = socket.socketpair()
    with near, far, (home / "output").open("wb") as output:
        argv = peer.argv(home, port, near.fileno())
        with subprocess.Popen(argv, stdout=output, stderr=output, pass_fds=[near.fileno()]) as server:
            try:
                _wait_for(port, server, home / "output")
                yield server, port, far
            finally:
                server.terminate()
    shutil.rmtree(home)


def _wait_for(port: int, server: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{server.args!r} does not answer: {output.read_text()[-500:]}")
        time.sleep(0.05)


def _icecast(home: Path, port: int, source: int) -> list[str]:
    (home / "icecast.xml").write_text(CONFIG.format(password=PASSWORD, port=port, folder=home))
    return ["/usr/bin/icecast2", "-c", str(home / "icecast.xml")]


def _nginx(home: Path, port: int, source: int) -> list[str]:
    (home / "nginx.conf").write_text(NGINX.format(port=port, folder=home))
    return ["/usr/sbin/nginx", "-c", str(home / "nginx.conf"), "-p", str(home)]


def _gstreamer(home: Path, port: int, source: int) -> list[str]:
    words = f"fdsrc fd={source} blocksize={fanout.PIECE} ! tcpserversink host=127.0.0.1 port={port} sync=false"
    return ["gst-launch-1.0", "-q", *words.split()]


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


PEERS = {
    "Icecast": Peer(
        _icecast,
        lambda port, _: ask(port, f"SOURCE {MOUNT} HTTP/1.0\r\n{WORDS}\r\n"),
        lambda port: ask(port, f"GET {MOUNT} HTTP/1.0\r\n\r\n"),
        late=True,
    ),
    "nginx-rtmp": Peer(
        _nginx, lambda port, _: rtmp.Client(port, publish=True), lambda port: rtmp.Client(port, publish=False).sock
    ),
    "GStreamer": Peer(_gstreamer, lambda _, source: source, lambda port: socket.create_connection(("127.0.0.1", port))),
}
OURS = "user, 200 ms"
SIDES = (*PEERS, "user, 0 ms", "user, 50 ms", OURS)


@contextlib.contextmanager
def _always_something(encoder: fanout.Encoder) -> Iterator[None]:
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


def measure_peer(side: str, programs: dict[str, Path], folder: Path, plan: Plan) -> dict[str, Any]:
    """One measurement."""
    peer = PEERS[side]
    with contextlib.ExitStack() as stack:
        server, port, source = stack.enter_context(serving(peer, folder))
        encoder = peer.encoder(port, source)
        empty = fanout.resident(server.pid)
        with _always_something(encoder) if peer.late else contextlib.nullcontext(), ThreadPoolExecutor(64) as pool:
            socks = list(pool.map(lambda _: peer.listener(port), range(plan.listeners)))
        for sock in socks:
            stack.enter_context(sock)
        first = stack.enter_context(fanout.consecutive(socks))
        drain = fanout.start([str(programs["drain"]), str(first), str(len(socks))], first, len(socks))
        fanout.feed(encoder, 1.0)
        before, begun = fanout.processor_time(server.pid), time.monotonic()
        pieces = fanout.feed(encoder, plan.seconds)
        time.sleep(0.35)
        spent, took = fanout.processor_time(server.pid) - before, time.monotonic() - begun
        memory = (fanout.resident(server.pid) - empty) / plan.listeners
        delivered, longest = fanout.received(drain)
        expected = pieces * fanout.PIECE * plan.listeners
        row = {"side": side, "sinks": plan.listeners, "seconds": took, "processor_seconds": spent, "memory_per_sink": memory}
        return {**row, "delivered": min(delivered, expected), "expected": expected, "longest_gap_ms": longest}


def measure(programs: dict[str, Path], folder: Path, plan: Plan) -> list[dict[str, Any]]:
    """All rows, the sides in turn."""
    rows = []
    for _ in range(plan.repeats):
        rows += [measure_peer(side, programs, folder, plan) for side in PEERS]
        for side in SIDES[len(PEERS) :]:
            rows.append(fanout.one(programs, side, udp=False, count=plan.listeners, seconds=plan.seconds))
    return rows


def cost(rows: list[dict[str, Any]], side: str) -> float:
    """Median of seconds of a processor for each Gbit delivered."""
    return float(statistics.median(r["processor_seconds"] / (r["delivered"] * 8 / 1e9) for r in rows if r["side"] == side))


def verdicts(rows: list[dict[str, Any]]) -> list[Bar]:
    """How many times better."""
    return [
        Bar(f"{peer}'s processor time by that of {OURS}", cost(rows, peer) / cost(rows, OURS), "times", limit, ">=")
        for peer, limit in (("Icecast", 2), ("nginx-rtmp", 1), ("GStreamer", 1))
    ]


def table(rows: list[dict[str, Any]], sides: Sequence[str]) -> Table:
    """By side: medians, and the least that came."""
    columns = ("processor seconds a Gbit", "memory a receiver, bytes", "longest gap, ms", "delivered of expected")
    shown = Table("", *columns, title="256 kbit/s to each")
    for side in sides:
        chosen = [row for row in rows if row["side"] == side]
        memory, gap = (statistics.median(row[key] for row in chosen) for key in ("memory_per_sink", "longest_gap_ms"))
        least = min(row["delivered"] / row["expected"] for row in chosen)
        shown.add_row(side, f"{cost(rows, side):.3f}", f"{memory:,.0f}", f"{gap:.0f}", f"{least:.3f}")
    return shown


def plot(report: Report, path: Path, sides: Sequence[str]) -> None:
    """Bars: what it costs, and what a receiver waits."""
    with bench.drawing(path, columns=2) as (cpu, gap):
        cpu.bar(sides, [cost(report.rows, side) for side in sides])
        cpu.set(ylabel="processor seconds a Gbit delivered", title="256 kbit/s to each")
        gaps = [statistics.median(row["longest_gap_ms"] for row in report.rows if row["side"] == side) for side in sides]
        gap.bar(sides, gaps)
        gap.set(ylabel="longest gap that a receiver saw, ms", title="a piece comes every 44 ms")
        for axis in (cpu, gap):
            axis.tick_params("x", rotation=30)


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
        plot(report, options.plot, SIDES)
    return bench.finish(report, options, [table(rows, SIDES)])


if __name__ == "__main__":
    sys.exit(main())
