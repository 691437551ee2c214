# SPDX-License-Identifier: Apache-2.0
"""Who loses when there is not enough for all: Hung 2010, Fig. 14 and 15, with both engines.

    ./run bench overload [--json FILE] [--plot FILE] [--quick]

Three UDP sessions to 150 sinks each, of VMs of the classes low, normal and high, in one engine on one processor; a burden of
rising weight at real-time priority takes that processor from it. Sources and receivers have the other one. What is measured
is the share of pieces that each class did not get to send, and how late those came that did, to one of its sinks. The module
runs in a VM."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.performance import bench, counted, fanout
from tests.performance.bench import Bar, Report

CLASSES = ("low", "normal", "high")
RING = 16
MODULE = "tests.performance.relays.overload"
ENGINES = ("user", "omss")
CAVEAT = (
    "loopback; for the user engine pieces come faster than the thesis's 23 a second, so that one of today's processors is as busy "
    "as its was; Linux takes at most 95 % of a processor for real-time work"
)


@dataclass(frozen=True)
class Plan:
    """`rate`: pieces a second and session; `burdens`: percent."""

    burdens: tuple[int, ...]
    sinks: int
    rate: float
    seconds: float


FULL = {
    "user": Plan((0, 15, 30, 45, 60, 70, 80, 85, 90, 95), sinks=150, rate=400, seconds=5),
    "omss": Plan((0, 30, 60, 80, 90, 95), sinks=150, rate=40, seconds=5),
}
QUICK = {"user": Plan((0, 90), sinks=20, rate=100, seconds=1), "omss": Plan((0, 95), sinks=100, rate=40, seconds=2)}


def part(processor: int, fds: list[int], *words: object) -> subprocess.Popen[str]:
    """One of the processes."""
    argv = ["taskset", "-c", str(processor), sys.executable, "-m", MODULE, *map(str, words)]
    return subprocess.Popen(argv, pass_fds=fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=bench.ROOT)


def step(engine: str, plan: Plan, burden: int) -> list[dict[str, Any]]:
    """One burden; a row for each class."""
    with contextlib.ExitStack() as stack:
        line = stack.enter_context(fanout.line(plan.sinks * len(CLASSES), udp=True))
        sources = [stack.enter_context(fanout.source(udp=True)) for _ in CLASSES]
        for near, _ in sources:
            os.set_inheritable(near.fileno(), True)
        sessions, listeners = [], []
        for level, (_, relay_end) in enumerate(sources):
            first = line.near + level * plan.sinks
            sessions.append({"source": relay_end.fileno(), "first": first, "count": plan.sinks, "class": level, "ring": RING})
            far = line.far + level * plan.sinks
            listeners.append(part(1, [far], "listen", far, 1, far))
        taken = [*range(line.near, line.near + line.count), *(end.fileno() for _, end in sources)]
        running = part(0, taken, engine, json.dumps(sessions))
        assert running.stdout is not None
        running.stdout.readline()
        load = part(0, [], "burden", burden)
        assert load.stdout is not None
        load.stdout.readline()
        time.sleep(0.3)
        ends = [near.fileno() for near, _ in sources]
        feeder = part(1, ends, "feed", plan.seconds, plan.rate, *ends)
        pieces = int(feeder.communicate()[0])
        time.sleep(0.3)
        load.kill()
        load.communicate()
        sent = json.loads(fanout.stop(running))
        rows = []
        for level, listener in enumerate(listeners):
            late = json.loads(fanout.stop(listener))["latency"]
            expected = pieces * plan.sinks
            row = {"engine": engine, "burden": burden, "class": CLASSES[level], "expected": expected}
            rows.append({**row, "loss": 1 - sent[level] / expected, "latency": late})
        return rows


def measure(engine: str, plan: Plan) -> list[dict[str, Any]]:
    """All burdens."""
    return [row for burden in plan.burdens for row in step(engine, plan, burden)]


def of(rows: list[dict[str, Any]], engine: str, name: str, key: str) -> list[float]:
    """One class's values, by burden."""
    return [row[key] for row in rows if (row["engine"], row["class"]) == (engine, name)]


def verdicts(rows: list[dict[str, Any]]) -> list[Bar]:
    """The high class loses nothing until the low class has lost everything; and the burden is one."""
    bars = []
    for engine in ENGINES:
        low, high = of(rows, engine, "low", "loss"), of(rows, engine, "high", "loss")
        early = max((mine for theirs, mine in zip(low, high, strict=True) if theirs < 0.99), default=0.0)
        bars += [
            Bar(f"{engine}: loss of the high class while the low one gets anything", early, "of all pieces", 0.01, "<="),
            Bar(f"{engine}: loss of the low class under the heaviest burden", max(low), "of all pieces", 0.5, ">="),
        ]
    return bars


def table(rows: list[dict[str, Any]], engine: str) -> Table:
    """Loss and latency."""
    shown = Table("burden", *(f"{name}: {what}" for what in ("loss", "ms") for name in CLASSES), title=f"overload, {engine}")
    for burden in sorted({row["burden"] for row in rows if row["engine"] == engine}):
        here = {row["class"]: row for row in rows if (row["engine"], row["burden"]) == (engine, burden)}
        losses = [f"{here[name]['loss']:.1%}" for name in CLASSES]
        delays = ["-" if here[name]["latency"] is None else f"{1000 * here[name]['latency']:.1f}" for name in CLASSES]
        shown.add_row(f"{burden} %", *losses, *delays)
    return shown


def plot(report: Report, path: Path) -> None:
    """The axes of Fig. 14 and 15, for each engine."""
    with bench.drawing(path, columns=2 * len(ENGINES)) as axes:
        for at, engine in enumerate(ENGINES):
            losses, delays = axes[2 * at : 2 * at + 2]
            burdens = sorted({row["burden"] for row in report.rows if row["engine"] == engine})
            for name in CLASSES:
                losses.plot(burdens, of(report.rows, engine, name, "loss"), marker="o", label=f"class {name}")
                seen = [float("nan") if one is None else 1000 * one for one in of(report.rows, engine, name, "latency")]
                delays.plot(burdens, seen, marker="o", label=f"class {name}")
            losses.set(title=engine, xlabel="background CPU load, %", ylabel="average packet loss rate")
            delays.set(title=engine, xlabel="background CPU load, %", ylabel="average latency, ms", yscale="log")
            losses.legend()


def main() -> int:
    """Entry point; the exit status."""
    if sys.argv[1:2] == ["--inside"]:
        counted.tell({"rows": measure("omss", (QUICK if "--quick" in sys.argv else FULL)["omss"])})
        return 0
    options = bench.arguments(__doc__ or "")
    rows = measure("user", (QUICK if options.quick else FULL)["user"])
    words = ["--quick"] if options.quick else []
    rows += counted.measure("tests.performance.overload", *words, modules=("omss",), timeout=600, counted=False)["rows"]
    report = Report("overload", CAVEAT, rows)
    report.bars = verdicts(rows)
    if options.plot:
        plot(report, options.plot)
    return bench.finish(report, options, [table(rows, engine) for engine in ENGINES])


if __name__ == "__main__":
    sys.exit(main())
