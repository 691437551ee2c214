# SPDX-License-Identifier: Apache-2.0
"""From which size on sharing pages is cheaper than copying: Hung 2010, Fig. 12 and 13, in a VM whose clock counts instructions.

    ./run bench payload [--json FILE] [--plot FILE] [--quick]

One source to 100 sinks, over UDP and TCP, pieces of 64 bytes to 16 KiB: instructions for each piece and sink, by the module with
the payload copied for each sink (OMSS-M) and with its pages shared (OMSS). At 1,400 bytes also by the thesis's daemon and by
the `user` engine: its three-way comparison, without a latency budget. That once more over loopback, with TCP's receivers."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.performance import bench, fanout
from tests.performance.bench import Bar, Report
from tests.performance.relays import spliced

PIECE = fanout.PIECE
PAPER = {"udp": 200, "tcp": 100}
"""Bytes from which on sharing pays: Hung 2010, section 5.3."""
CAVEAT = (
    "instructions, not time: a cache miss costs as much as an addition, and QEMU counts each byte or word of a copy; "
    "what is sent leaves by a card that throws it away, and nobody acknowledges TCP's; over loopback TCP's receiving half is part "
    "of each send, in all columns"
)


@dataclass(frozen=True)
class Plan:
    """Which sizes."""

    sizes: tuple[int, ...]


FULL = Plan((64, 128, 256, 512, 1024, PIECE, 4096, 16384))
QUICK = Plan((64, PIECE))


def cases(plan: Plan) -> list[tuple[str, str, int]]:
    """(side, protocol, size); the sides in turn."""
    found = [(side, protocol, size) for protocol in ("udp", "tcp") for size in plan.sizes for side in ("OMSS-M", "OMSS")]
    found += [(side, protocol, PIECE) for protocol in ("udp", "tcp") for side in ("daemon", "user")]
    return found + [(side, "tcp over loopback", PIECE) for side in spliced.SIDES]


def cost(rows: list[dict[str, Any]], side: str, protocol: str, size: int) -> float:
    """Instructions for a piece and sink."""
    return next(float(r["instructions"]) for r in rows if (r["side"], r["protocol"], r["size"]) == (side, protocol, size))


def switching_point(rows: list[dict[str, Any]], protocol: str, plan: Plan) -> int | None:
    """The smallest size from which on sharing is never dearer."""
    cheaper = [size for size in plan.sizes if cost(rows, "OMSS", protocol, size) <= cost(rows, "OMSS-M", protocol, size)]
    from_here = [size for size in plan.sizes if set(cheaper) >= {other for other in plan.sizes if other >= size}]
    return min(from_here, default=None)


def verdicts(rows: list[dict[str, Any]]) -> list[Bar]:
    """The three-way comparison at the thesis's size."""
    bars = []
    for protocol in ("udp", "tcp"):
        shared, copied, daemon = (cost(rows, side, protocol, PIECE) for side in ("OMSS", "OMSS-M", "daemon"))
        bars.append(Bar(f"{protocol}: OMSS's instructions of the daemon's", shared / daemon, "", 0.6, "<="))
        bars.append(Bar(f"{protocol}: OMSS's instructions of OMSS-M's", shared / copied, "", 1.0, "<="))
    return bars


def table(rows: list[dict[str, Any]], plan: Plan) -> Table:
    """By size."""
    shown = Table("instructions", *(f"{size} bytes" for size in plan.sizes), title="for a piece and sink")
    known = {(row["protocol"], row["side"], row["size"]): f"{row['instructions']:,.0f}" for row in rows}
    for protocol in spliced.PROTOCOLS:
        for side in spliced.SIDES:
            shown.add_row(f"{protocol}, {side}", *(known.get((protocol, side, size), "") for size in plan.sizes))
    return shown


def plot(report: Report, path: Path, plan: Plan) -> None:
    """The axes of Fig. 12 and 13; instructions stand for the processor's utilization."""
    with bench.drawing(path, columns=2) as axes:
        for axis, protocol in zip(axes, ("udp", "tcp"), strict=True):
            for side in ("OMSS-M", "OMSS"):
                axis.plot(plan.sizes, [cost(report.rows, side, protocol, n) for n in plan.sizes], marker="o", label=side)
            axis.axvline(PAPER[protocol], color="black", linestyle=":", label="sharing pays from: Hung 2010")
            axis.set(title=protocol.upper(), xlabel="payload, bytes", ylabel="instructions a piece and sink", xscale="log")
            axis.legend()


def main() -> int:
    """Entry point; the exit status."""
    options = bench.arguments(__doc__ or "")
    plan = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        rows = spliced.measure(fanout.build(Path(folder))["daemon"], cases(plan), timeout=1500)
    report = Report("payload", CAVEAT, rows)
    report.bars = verdicts(rows)
    report.details["switching_point_bytes"] = {name: switching_point(rows, name, plan) for name in ("udp", "tcp")}
    if options.plot:
        plot(report, options.plot, plan)
    return bench.finish(report, options, [table(rows, plan)])


if __name__ == "__main__":
    sys.exit(main())
