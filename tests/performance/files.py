# SPDX-License-Identifier: Apache-2.0
"""From which size of a file on does it pay to hand the connection over? The sweep of Jeong 2015, Fig. 3, with a real VM.

    ./run bench files [--json FILE] [--plot FILE] [--quick]

One client fetches files of 4 KB to 64 MB from the VM alone, from the VM whose transfers the host serves (all of them: the
threshold is lowered to the smallest file), and from the same server on bare metal; the three in turn."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.client import make_content
from tests.performance import bench, fetch
from tests.performance.bench import Bar, Report
from tests.vm.product import Product
from tests.vm.setups import ADDRESS, NAMES, bare_metal, caveat, product_on_host, virtual_machine
from vm_images.build import build

SIZES = tuple(4096 << step for step in range(15))
"""Bytes: 4 KiB to 64 MiB."""
PAPER_CROSSOVER, PAPER_GAIN, PAPER_GAIN_SIZE = 64 << 10, 1.71, 3_000_000
"""Jeong 2015, section IV-B: pays off from 64 KB on; at 3 MB the bandwidth is 71 % above the VM's."""
CONFIG = f"[policy]\nthreshold_bytes = {SIZES[0]}\n"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    sizes: tuple[int, ...]
    repeats: int
    block_bytes: int
    most_requests: int

    def requests(self, size: int) -> int:
        """Requests a block at this size."""
        return min(max(2, self.block_bytes // size), self.most_requests)


FULL = Plan(SIZES, repeats=7, block_bytes=64 << 20, most_requests=25)
QUICK = Plan(SIZES[::7], repeats=2, block_bytes=8 << 20, most_requests=5)


def measure(product: Product, servers: dict[str, str], plan: Plan) -> list[dict[str, Any]]:
    """Rows of every size and set-up."""
    rows = []
    for size in plan.sizes:
        inside = product.host.client.command
        found = fetch.measure(inside, servers, f"/{size}.bin", requests=plan.requests(size), repeats=plan.repeats)
        rows += [{"size": size, **row} for row in found]
    return rows


# Judging: pure.


def times(rows: Sequence[dict[str, Any]], size: int, setup: str) -> list[float]:
    """Milliseconds of every request."""
    chosen = (row for row in rows if (row["size"], row["side"]) == (size, setup))
    return [latency / 1e3 for row in chosen for latency in row["latencies_us"]]


def bandwidth(rows: Sequence[dict[str, Any]], size: int, setup: str) -> float:
    """Mbit/s at the median time."""
    return size * 8e-3 / statistics.median(times(rows, size, setup))


def sizes_of(rows: Sequence[dict[str, Any]]) -> list[int]:
    """What was measured, ascending."""
    return sorted({row["size"] for row in rows})


def crossover(rows: Sequence[dict[str, Any]]) -> int | None:
    """The smallest size from which on the offloaded VM is never slower than the VM alone, bytes; None: there is none."""
    found = None
    for size in reversed(sizes_of(rows)):
        if bandwidth(rows, size, "offload") < bandwidth(rows, size, "vm"):
            break
        found = size
    return found


def judge(rows: Sequence[dict[str, Any]], counters: dict[str, Any]) -> list[Bar]:
    """At the largest size at the latest it must have paid."""
    largest = sizes_of(rows)[-1]
    gain = bandwidth(rows, largest, "offload") / bandwidth(rows, largest, "vm")
    served = counters["offloaded"] + sum(counters["local"].values()) + counters["failed"]
    return [
        Bar(f"throughput at {largest >> 20} MiB, offloaded", gain, "of the VM alone", 1, ">="),
        Bar("bodies that the host delivered", counters["offloaded"] / served, "of all", 0.99, ">="),
    ]


# Showing.


def table(rows: Sequence[dict[str, Any]], crossing: int | None) -> Table:
    """Times and bandwidths, and where it begins to pay."""
    where = f"{crossing:,} bytes" if crossing else "nowhere"
    shown = Table(title=f"median time in ms (spread), bandwidth in Mbit/s; pays off from: {where}", title_justify="left")
    shown.add_column("bytes", justify="right")
    for name in NAMES.values():
        shown.add_column(f"{name}, ms", justify="right")
        shown.add_column("Mbit/s", justify="right")
    for size in sizes_of(rows):
        cells = []
        for setup in NAMES:
            median, spread = bench.median_and_spread(times(rows, size, setup))
            cells += [f"{median:,.2f} ({spread:,.2f})", f"{bandwidth(rows, size, setup):,.0f}"]
        shown.add_row(f"{size:,}", *cells)
    return shown


def plot(rows: Sequence[dict[str, Any]], crossing: int | None, path: Path) -> None:
    """Bandwidth over size, as the paper draws it."""
    sizes = sizes_of(rows)
    with bench.drawing(path) as (axes,):
        for setup, name in NAMES.items():
            axes.plot([size / 1024 for size in sizes], [bandwidth(rows, size, setup) for size in sizes], marker="o", label=name)
        if crossing:
            axes.axvline(crossing / 1024, color="grey", linestyle=":", label=f"pays off from {crossing // 1024:,} KiB")
        axes.axvline(PAPER_CROSSOVER / 1024, color="black", linestyle=":", label="pays off from: Jeong 2015")
        nearest = min(sizes, key=lambda size: abs(size - PAPER_GAIN_SIZE))
        axes.plot(nearest / 1024, PAPER_GAIN * bandwidth(rows, nearest, "vm"), "kx", label="1.71 of the VM's: Jeong 2015, 3 MB")
        axes.set(xscale="log", yscale="log", xlabel="file size in KiB", ylabel="Mbit/s", title="one client, one file at a time")
        axes.legend()


def main() -> int:
    """The benchmark."""
    options = bench.arguments("from which file size on the handoff pays")
    plan = QUICK if options.quick else FULL
    build()
    with tempfile.TemporaryDirectory() as name:
        folder, share = Path(name), Path(name) / "share"
        make_content(str(share), plan.sizes)
        with product_on_host(folder, share, extra=CONFIG) as product, virtual_machine(product) as accelerator:
            with bare_metal(product.host, share, folder / "metal.log") as servers:
                report = Report("files", caveat(accelerator), rows=measure(product, servers, plan))
            counters = product.counters(ADDRESS)
            report.details = {
                "accelerator": accelerator,
                "crossover_bytes": crossover(report.rows),
                "media_server": counters,
                "steps": product.ask("status")["durations"],
            }
    report.bars = judge(report.rows, counters)
    if options.plot:
        plot(report.rows, crossover(report.rows), options.plot)
    return bench.finish(report, options, [table(report.rows, crossover(report.rows))])


if __name__ == "__main__":
    sys.exit(main())
