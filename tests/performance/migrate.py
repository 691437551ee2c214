# SPDX-License-Identifier: Apache-2.0
"""What clients see of a live migration: the longest silence and the bandwidth, with the offload and, in the same run, with the same
VM whose server sends everything itself.

    ./run bench migrate [--json FILE] [--plot FILE] [--quick]

Fifty clients fetch segments, each at its rate, while the VM moves to the other of two hypervisors; the sides take turns."""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.audience import Crowd
from tests.performance import bench
from tests.performance.bench import Bar, Report
from tests.viewers import BIN
from tests.vm.libvirt_host import wait_for
from tests.vm.moving import Move, Moving, moving
from tests.vm.setups import caveat
from tests.vm.two_hosts import TwoHosts

SIDES = {"offload": 80, "alone": 8081}
CLIENTS = 50
RATE = 250_000
"""Bytes a second of each client: all together ask for 100 Mbit/s."""
STEADY = 4.0
"""Seconds before and after a migration over which bandwidth is measured."""
SILENCE_FACTOR, SILENCE_LIMIT = 1.2, 250
DRAIN_LIMIT = 300
PREPARE = (
    "mkdir -p /run/plain",
    "mount -t tmpfs -o size=100m none /run/plain",
    "cp -r /srv/share/tv /srv/share/tablet /srv/share/phone /run/plain",
    f"systemd-run python3 -m guest_agent.examples.media_server --root /run/plain --port {SIDES['alone']} --no-offload",
)
"""For the VM alone: it serves from its own memory, so that its share is as free as the other side's. Its memory is as large."""


@dataclass(frozen=True)
class Plan:
    """How many pairs of migrations."""

    repeats: int


FULL, QUICK = Plan(5), Plan(1)


# Measuring.


def prepare(scene: Moving) -> None:
    """Start the second server in the guest."""
    scene.in_guest("; ".join(PREPARE))
    fetch = functools.partial(scene.here.fetch, scene.address, ".streamlift", port=SIDES["alone"], check=False)
    wait_for(fetch, seconds=60, what="the server without offload")


def measure(scene: Moving, side: str, repeat: int) -> dict[str, Any]:
    """One migration; its row."""
    crowd = Crowd(segments=CLIENTS, rate=RATE, port=SIDES[side], pause=0)
    with scene.watched(crowd, offloaded=side == "offload") as watchers:
        time.sleep(STEADY)
        begin = time.monotonic()
        moved = scene.end(scene.begin())
        end = time.monotonic()
        time.sleep(STEADY)
        found = watchers.stop()
    periods = {"before": (begin - STEADY, begin), "during": (begin, end), "after": (end, end + STEADY)}
    return {
        "side": side,
        "repeat": repeat,
        **told(moved),
        "seconds": end - begin,
        "silences_ms": [1e3 * longest(one["silences"], since=begin) for one in found.seen],
        "faults": found.faults,
        "mbit_per_second": {name: rate(found.bins, *period) for name, period in periods.items()},
        "timeline": timeline(found.bins, begin - STEADY, end + STEADY, zero=begin),
    }


def longest(silences: Sequence[Sequence[float]], *, since: float) -> float:
    """Seconds, of those of a client (begin, seconds) that had not ended by then: fifty that come at once keep an emulated server
    busy as well, long before anything migrates."""
    return max((seconds for begun, seconds in silences if begun + seconds > since), default=0.0)


def told(moved: Move) -> dict[str, Any]:
    """What the command said of it. Raises RuntimeError if the VM did not move."""
    if moved.status:
        raise RuntimeError(f"the VM did not move: {moved}")
    return {key: moved.last.get(key) for key in ("leave", "total_ms", "meet")}


def rate(bins: dict[int, int], begin: float, end: float) -> float:
    """Mbit/s in whole bins between two moments."""
    chosen = range(int(begin / BIN) + 1, int(end / BIN))
    total = sum(bins.get(at, 0) for at in chosen)
    return total * 8e-6 / (len(chosen) * BIN) if chosen else 0.0


def timeline(bins: dict[int, int], begin: float, end: float, *, zero: float) -> list[tuple[float, float]]:
    """Seconds from `zero`, and Mbit/s, of each bin."""
    chosen = range(int(begin / BIN), int(end / BIN))
    return [(round(at * BIN - zero, 2), bins.get(at, 0) * 8e-6 / BIN) for at in chosen]


# Judging: pure.


def silences(rows: Sequence[dict[str, Any]], side: str) -> list[float]:
    """The longest of each migration, milliseconds."""
    return [max(row["silences_ms"]) for row in rows if row["side"] == side]


def loss(rows: Sequence[dict[str, Any]], side: str) -> float:
    """Percent of the bandwidth that is missing during a migration, the median."""
    rates: list[dict[str, float]] = [row["mbit_per_second"] for row in rows if row["side"] == side]
    return statistics.median(100 * (1 - one["during"] / one["before"]) for one in rates)


def judge(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """The bars of the issue. Each offloaded migration is compared with the one of the VM alone beside it."""
    pairs = zip(silences(rows, "offload"), silences(rows, "alone"), strict=True)
    beyond = max(ours - SILENCE_FACTOR * theirs for ours, theirs in pairs)
    drains = [row["leave"]["drain_ms"] for row in rows if row["side"] == "offload"]
    faults = sum(len(row["faults"]) for row in rows if row["side"] == "offload")
    return [
        Bar(f"longest silence, beyond {SILENCE_FACTOR:g} times the VM alone", beyond, "ms", SILENCE_LIMIT, "<="),
        Bar(f"drain of {CLIENTS} connections, the longest", max(drains), "ms", DRAIN_LIMIT, "<="),
        Bar("connections lost", faults, "connections", 0, "<="),
    ]


# Showing.


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Times, then bandwidth."""
    columns = ("migration", "drain", "share", "longest silence", "before", "during", "after", "missing")
    table = Table("side", *columns, title="medians; ms, and Mbit/s of all clients together")
    for side in SIDES:
        own = [row for row in rows if row["side"] == side]
        times = [[1e3 * row["seconds"] for row in own], *([row["leave"][key] for row in own] for key in ("drain_ms", "share_ms"))]
        times.append(silences(rows, side))
        rates = [[row["mbit_per_second"][period] for row in own] for period in ("before", "during", "after")]
        cells = [f"{statistics.median(values):,.0f}" if values else "-" for values in (*times, *rates)]
        table.add_row(side, *cells, f"{loss(rows, side):.0f} %")
    return [table]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bandwidth over time, and the silences of all clients."""
    with bench.drawing(path, columns=2) as (left, right):
        for colour, side in zip(("C0", "C1"), SIDES, strict=True):
            own = [row for row in rows if row["side"] == side]
            for number, row in enumerate(own):
                times, rates = zip(*row["timeline"], strict=True)
                left.plot(times, rates, colour, alpha=0.6, label=None if number else side)
                left.axvline(row["seconds"], color=colour, linestyle=":")
            values = sorted(value for row in own for value in row["silences_ms"])
            right.plot(values, [(at + 1) / len(values) for at in range(len(values))], colour, label=side)
        left.set(xlabel="seconds since the command", ylabel="Mbit/s of all clients", title="bandwidth", ylim=(0, None))
        right.set(xlabel="longest silence in ms", ylabel="share of clients", title="silence", xscale="log")
        left.legend()
        right.legend()


def main() -> int:
    """The benchmark."""
    options = bench.arguments("what clients see of a live migration")
    report = Report("migrate", "")
    with tempfile.TemporaryDirectory() as folder, TwoHosts() as hosts, moving(hosts, Path(folder), "routed", shell=True) as scene:
        report.caveat = caveat(scene.accelerator) + " Jeong 2015 lost 28 % of the bandwidth during a migration."
        prepare(scene)
        for repeat in range((QUICK if options.quick else FULL).repeats):
            for side in SIDES:
                report.rows.append(measure(scene, side, repeat))
                print(f"{side}, {repeat}: longest silence {max(report.rows[-1]['silences_ms']):.0f} ms", file=sys.stderr)
    report.bars = judge(report.rows)
    if options.plot:
        plot(report.rows, options.plot)
    return bench.finish(report, options, tables(report.rows))


if __name__ == "__main__":
    sys.exit(main())
