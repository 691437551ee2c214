# SPDX-License-Identifier: Apache-2.0
"""What it costs to give one stream to many: Hung 2010, Fig. 9 and 10, with the `user` engine.

    ./run bench fanout [--json FILE] [--plot FILE] [--quick]

A source of 256 kbit/s in pieces of 1,400 bytes, over UDP and over TCP, to up to 2,000 sinks on loopback. Side by side, in turns:
the thesis's daemon (C, a receive and a send for each piece and sink), the engine with latency budgets of 0, 50 and 200 ms, and
the engine without its C extension. What is compared is the processor time of the relaying process; receivers are another
process. Then the engine against a plain C loop that copies 64 KiB to each sink as fast as they take it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from tests.performance import bench
from tests.performance.bench import Bar, Report

PIECE, RATE = 1400, 256_000
"""Bytes and bits a second (Hung 2010, section 5.2)."""
BUDGETS = (0, 50, 200)
PAPER = {"udp": 0.44, "tcp": 0.48}
"""OMSS's utilization of the daemon's, at 2,000 and at 1,800 sinks: Hung 2010, section 6."""
HERE = Path(__file__).resolve().parent
CAVEAT = (
    "loopback: receiving is part of each send here, and is in both columns; a real network card would take the copy and the "
    "checksum, and show the savings larger"
)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    counts: tuple[int, ...]
    seconds: float
    repeats: int
    flood_sinks: int = 200


FULL = Plan((200, 1000, 2000), seconds=4, repeats=3)
QUICK = Plan((40,), seconds=0.8, repeats=1, flood_sinks=20)


@dataclass
class Line:
    """Connected sockets: near ends are the relay's, far ends the receivers'. Descriptors are consecutive on each side."""

    near: int
    far: int
    count: int
    sockets: list[socket.socket]


def build(folder: Path) -> dict[str, Path]:
    """The C programs."""
    made = {}
    for name in ("daemon", "drain"):
        made[name] = folder / name
        source = HERE / "relays" / f"{name}.c"
        subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-pthread", str(source), "-o", str(made[name])], check=True)
    return made


@contextlib.contextmanager
def line(count: int, *, udp: bool) -> Iterator[Line]:
    """`count` pairs on loopback."""
    near, far = [], []
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        for _ in range(count):
            if udp:
                receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                receiver.bind(("127.0.0.1", 0))
                sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                sender.connect(receiver.getsockname())
            else:
                sender = socket.create_connection(listener.getsockname())
                sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                receiver = listener.accept()[0]
            near.append(sender)
            far.append(receiver)
    with contextlib.ExitStack() as stack:
        for sock in (*near, *far):
            stack.enter_context(sock)
        first = stack.enter_context(consecutive([*near, *far]))
        yield Line(first, first + count, count, [*near, *far])


@contextlib.contextmanager
def consecutive(socks: Sequence[socket.socket]) -> Iterator[int]:
    """Descriptors in a row for children to inherit, beside the sockets' own; the first."""
    first = 10_000
    _allow_descriptors(first + len(socks) + 100)
    try:
        for at, sock in enumerate(socks):
            os.dup2(sock.fileno(), first + at)  # inheritable
        yield first
    finally:
        os.closerange(first, first + len(socks))


def _allow_descriptors(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))


@contextlib.contextmanager
def source(*, udp: bool) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The encoder's end and the relay's."""
    if udp:
        far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        far.bind(("127.0.0.1", 0))
        near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        near.connect(far.getsockname())
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far = listener.accept()[0]
    with near, far:
        os.set_inheritable(far.fileno(), True)
        yield near, far


def processor_time(pid: int) -> float:
    """Seconds that all threads of a process have run (proc(5), schedstat)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def start(argv: list[str], low: int, count: int, *more: int, pure: bool = False) -> subprocess.Popen[str]:
    """With the descriptors [low, low + count) and `more`; `pure`: without the C extension."""
    environment = dict(os.environ)
    if pure:
        paths = environment.get("PYTHONPATH", "").split(":")
        environment["PYTHONPATH"] = ":".join(path for path in paths if not re.search(r"/fanout-[0-9a-f]+/?$", path))
    fds = [*range(low, low + count), *more]
    return subprocess.Popen(
        argv, pass_fds=fds, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=bench.ROOT
    )


def stop(process: subprocess.Popen[str]) -> str:
    """Close its standard input; what it says then."""
    with process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        return process.stdout.read()


def received(drain: subprocess.Popen[str]) -> tuple[int, float]:
    """Bytes of all receivers, and milliseconds of the longest silence that one of them saw; they end."""
    got, longest = stop(drain).splitlines()
    return sum(int(word) for word in got.split()), float(longest)


def resident(pid: int) -> int:
    """Bytes of a process (proc(5), statm)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def one(programs: dict[str, Path], side: str, *, udp: bool, count: int, seconds: float) -> dict[str, Any]:
    """One measurement of one side."""
    with line(count, udp=udp) as made, source(udp=udp) as (encoder, near):
        drain = start([str(programs["drain"]), str(made.far), str(count)], made.far, count)
        row: dict[str, Any] = {"side": side, "protocol": "udp" if udp else "tcp", "sinks": count}
        if side == "daemon":
            argv = [str(programs["daemon"]), "relay", str(near.fileno()), str(made.near), str(count)]
            relay = start(argv, made.near, count, near.fileno())
            time.sleep(0.3)
        else:
            budget = re.findall(r"\d+", side)[0]
            argv = [sys.executable, "-m", "tests.performance.relays.user", "relay", str(near.fileno())]
            argv += [str(made.near), str(count), budget]
            relay = start(argv, made.near, count, near.fileno(), pure="Python" in side)
            assert relay.stdout is not None
            row |= json.loads(relay.stdout.readline())
        before, begun = processor_time(relay.pid), time.monotonic()
        pieces = feed(encoder, seconds)
        time.sleep(0.35)  # the largest budget, and more
        row["processor_seconds"] = processor_time(relay.pid) - before
        row["seconds"] = time.monotonic() - begun
        if side == "daemon":
            relay.kill()
        stop(relay)
        delivered, longest = received(drain)
        expected = pieces * PIECE * count
        return row | {"pieces": pieces, "expected": expected, "delivered": delivered, "longest_gap_ms": longest}


class Encoder(Protocol):
    """Who gives the pieces on."""

    def send(self, data: bytes, /) -> object: ...


def feed(encoder: Encoder, seconds: float) -> int:
    """Send pieces at the rate for so long; how many."""
    interval, begun, sent = PIECE * 8 / RATE, time.monotonic(), 0
    while (due := begun + sent * interval) < begun + seconds:
        time.sleep(max(due - time.monotonic(), 0))
        encoder.send(os.urandom(PIECE))
        sent += 1
    return sent


def flood(programs: dict[str, Path], side: str, *, count: int, seconds: int) -> dict[str, Any]:
    """64 KiB per send, as fast as the sinks take it."""
    with line(count, udp=False) as made:
        drain = start([str(programs["drain"]), str(made.far), str(count)], made.far, count)
        if side == "C loop":
            argv = [str(programs["daemon"]), "copy", str(seconds), str(made.near), str(count), "65536"]
        else:
            argv = [sys.executable, "-m", "tests.performance.relays.user", "flood", str(seconds)]
            argv += [str(made.near), str(count), "65536"]
        relay = start(argv, made.near, count)
        relay.wait()
        stop(relay)
        return {"side": side, "sinks": count, "seconds": seconds, "delivered": received(drain)[0]}


FLOODS = ("C loop", "user")
SIDES = ("daemon", *(f"user, {budget} ms" for budget in BUDGETS), "user, 0 ms, Python alone")


def measure(programs: dict[str, Path], plan: Plan) -> list[dict[str, Any]]:
    """All rows, the sides in turn."""
    rows = []
    for _ in range(plan.repeats):
        for udp in (True, False):
            for count in plan.counts:
                rows += [one(programs, side, udp=udp, count=count, seconds=plan.seconds) for side in SIDES]
        seconds = max(1, round(plan.seconds / 2))
        rows += [flood(programs, side, count=plan.flood_sinks, seconds=seconds) for side in FLOODS]
    return rows


def cost(rows: list[dict[str, Any]], side: str, protocol: str, sinks: int) -> float:
    """Median share of one processor."""
    chosen = [r for r in rows if (r["side"], r.get("protocol"), r["sinks"]) == (side, protocol, sinks)]
    return float(statistics.median(row["processor_seconds"] / row["seconds"] for row in chosen))


def verdicts(rows: list[dict[str, Any]], plan: Plan) -> list[Bar]:
    """Hung 2010's comparison, at the most sinks."""
    bars, most = [], plan.counts[-1]
    for protocol in ("udp", "tcp"):
        daemon = cost(rows, "daemon", protocol, most)
        for budget, limit in ((0, 1.0), (200, 0.35)):
            value = cost(rows, f"user, {budget} ms", protocol, most) / daemon
            bars.append(Bar(f"{protocol}, {most} sinks, {budget} ms: processor time of the daemon's", value, "", limit, "<="))
    relays = [row for row in rows if "pieces" in row]
    bars.append(Bar("bytes delivered of those expected, least", min(r["delivered"] / r["expected"] for r in relays), "", 1, ">="))
    memory = [row["memory_per_sink"] for row in relays if "memory_per_sink" in row and row["sinks"] == most]
    bars.append(Bar("memory of a sink beside its socket", max(memory), "bytes", 4096, "<="))
    floods = [row for row in rows if "pieces" not in row]
    rates = {side: statistics.median(row["delivered"] for row in floods if row["side"] == side) for side in FLOODS}
    bars.append(Bar("64 KiB a send: throughput of the C loop's", rates["user"] / rates["C loop"], "", 0.8, ">="))
    return bars


def table(rows: list[dict[str, Any]], plan: Plan) -> Table:
    """Share of one processor."""
    columns = [(protocol, count) for protocol in ("udp", "tcp") for count in plan.counts]
    shown = Table("", *(f"{protocol}, {count}" for protocol, count in columns), title="share of one processor")
    for side in SIDES:
        shown.add_row(side, *(f"{cost(rows, side, protocol, count):.1%}" for protocol, count in columns))
    return shown


def plot(report: Report, path: Path, plan: Plan) -> None:
    """The axes of Fig. 9 and 10: sinks and CPU utilization."""
    with bench.drawing(path, columns=2) as axes:
        for axis, protocol in zip(axes, ("udp", "tcp"), strict=True):
            for side in SIDES:
                axis.plot(plan.counts, [100 * cost(report.rows, side, protocol, n) for n in plan.counts], marker="o", label=side)
            most = plan.counts[-1]
            paper = 100 * PAPER[protocol] * cost(report.rows, "daemon", protocol, most)
            axis.plot(most, paper, "kx", label=f"{PAPER[protocol]} of the daemon's: Hung 2010")
            axis.set(title=protocol.upper(), xlabel="number of sinks", ylabel="CPU utilization, % of one processor", ylim=(0, None))
            axis.legend(fontsize=8)


def main() -> int:
    """Entry point; the exit status."""
    options = bench.arguments(__doc__ or "")
    plan = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(build(Path(folder)), plan)
    report = Report("fanout", CAVEAT, rows)
    report.bars = verdicts(rows, plan)
    if options.plot:
        plot(report, options.plot, plan)
    return bench.finish(report, options, [table(rows, plan)])


if __name__ == "__main__":
    sys.exit(main())
