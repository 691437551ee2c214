# SPDX-License-Identifier: Apache-2.0
"""Who loses when there is not enough for all: Hung 2010, Fig. 14 and 15, with the `user` engine.

    ./run bench overload [--json FILE] [--plot FILE] [--quick]

Three UDP sessions to 150 sinks each, of VMs of the classes low, normal and high, in one engine on one processor; a burden of
rising weight at real-time priority takes that processor from it. Sources and receivers have the other one. What is measured
is the share of pieces that each class lost, and how late those came that did."""

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

from tests.performance import bench, fanout
from tests.performance.bench import Bar, Report

CLASSES = ("low", "normal", "high")
RING = 16
MODULE = "tests.performance.relays.overload"
CAVEAT = (
    "loopback; pieces come faster than the thesis's 23 a second, so that one of today's processors is as busy as its was; Linux "
    "takes at most 95 % of a processor for real-time work"
)


@dataclass(frozen=True)
class Plan:
    """`rate`: pieces a second and session; `burdens`: percent."""

    burdens: tuple[int, ...]
    sinks: int
    rate: float
    seconds: float


FULL = Plan((0, 15, 30, 45, 60, 70, 80, 85, 90, 95), sinks=150, rate=300, seconds=5)
QUICK = Plan((0, 90), sinks=20, rate=100, seconds=1)


def part(processor: int, fds: list[int], *words: object) -> subprocess.Popen[str]:
    """One of the processes."""
    argv = ["taskset", "-c", str(processor), sys.executable, "-m", MODULE, *map(str, words)]
    return subprocess.Popen(argv, pass_fds=fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=bench.ROOT)


def step(plan: Plan, burden: int) -> list[dict[str, Any]]:
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
            fds = list(range(far, far + plan.sinks))
            listeners.append(part(1, fds, "listen", far, plan.sinks, far))
        taken = [*range(line.near, line.near + line.count), *(end.fileno() for _, end in sources)]
        engine = part(0, taken, "engine", json.dumps(sessions))
        assert engine.stdout is not None
        engine.stdout.readline()
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
        rows = []
        for level, listener in enumerate(listeners):
            found = json.loads(fanout.stop(listener))
            expected = pieces * plan.sinks
            row = {"burden": burden, "class": CLASSES[level], "expected": expected}
            rows.append({**row, "loss": 1 - found["pieces"] / expected, "latency": found["latency"]})
        fanout.stop(engine)
        return rows


def of(rows: list[dict[str, Any]], name: str, key: str) -> list[float]:
    """One class's values, by burden."""
    return [row[key] for row in rows if row["class"] == name]


def verdicts(rows: list[dict[str, Any]]) -> list[Bar]:
    """The high class loses nothing until the low class has lost everything; and the burden is one."""
    low, high = of(rows, "low", "loss"), of(rows, "high", "loss")
    early = max((mine for theirs, mine in zip(low, high, strict=True) if theirs < 0.99), default=0.0)
    return [
        Bar("loss of the high class while the low one gets anything", early, "of all pieces", 0.01, "<="),
        Bar("loss of the low class under the heaviest burden", max(low), "of all pieces", 0.5, ">="),
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    """Loss and latency."""
    shown = Table("burden", *(f"{name}: {what}" for what in ("loss", "ms") for name in CLASSES), title="overload")
    for burden in sorted({row["burden"] for row in rows}):
        here = {row["class"]: row for row in rows if row["burden"] == burden}
        losses = [f"{here[name]['loss']:.1%}" for name in CLASSES]
        delays = ["-" if here[name]["latency"] is None else f"{1000 * here[name]['latency']:.1f}" for name in CLASSES]
        shown.add_row(f"{burden} %", *losses, *delays)
    return shown


def plot(report: Report, path: Path) -> None:
    """The axes of Fig. 14 and 15."""
    with bench.drawing(path, columns=2) as (losses, delays):
        burdens = sorted({row["burden"] for row in report.rows})
        for name in CLASSES:
            losses.plot(burdens, of(report.rows, name, "loss"), marker="o", label=f"class {name}")
            seen = [float("nan") if value is None else 1000 * value for value in of(report.rows, name, "latency")]
            delays.plot(burdens, seen, marker="o", label=f"class {name}")
        losses.set(xlabel="background CPU load, %", ylabel="average packet loss rate")
        delays.set(xlabel="background CPU load, %", ylabel="average latency, ms", yscale="log")
        losses.legend()


def main() -> int:
    """Entry point; the exit status."""
    options = bench.arguments(__doc__ or "")
    plan = QUICK if options.quick else FULL
    rows = [row for burden in plan.burdens for row in step(plan, burden)]
    report = Report("overload", CAVEAT, rows)
    report.bars = verdicts(rows)
    if options.plot:
        plot(report, options.plot)
    return bench.finish(report, options, [table(rows)])


if __name__ == "__main__":
    sys.exit(main())
