# SPDX-License-Identifier: Apache-2.0
"""What a handoff costs: the same media server with and without offload, in turn, over three network namespaces.

    ./run bench handoff [--json FILE] [--plot FILE] [--quick]

Added cost at small segments, the longest stall a client sees, and throughput beside the baseline at the segment sizes of
DASH on a link of 1 Gbit/s and on one without a limit."""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.client import make_content
from tests.namespaces.deployment import Deployment, Process, deployed, wait_for
from tests.namespaces.topology import Network, routed
from tests.performance import bench
from tests.performance import fetch as fetch_client
from tests.performance.bench import Bar, Report, percentile

LATENCY_SIZE = 100_000
RATIO_LIMITS = {288_600: 0.80, 1_400_000: 0.95, 10_500_000: 0.98}
"""Bytes of a segment, and the least share of the baseline's throughput."""
SIDES = ("offload", "baseline")
BASELINE_PORT = 81
LINK = "1gbit"
PAPER_MS = 1.9
"""What a handoff out and home adds: Jeong 2015, section IV-B."""
CAVEAT = (
    "Guest, host and client are network namespaces of one kernel: no virtual machine, no virtio, no network card; all"
    " processes share the processors, so absolute throughput says little and the difference between the sides much."
    " The 1 Gbit/s link is a token bucket of 256 kB, which hides gaps of up to 2 ms between two requests."
    " A connection that was handed over begins cold, in slow start: with the round-trip time of this link that costs little."
)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    handoffs: int
    block: int
    repeats: int
    block_bytes: int

    def requests(self, size: int) -> int:
        """Requests a block at this segment size."""
        return max(3, self.block_bytes // size)


FULL = Plan(handoffs=5000, block=50, repeats=7, block_bytes=60_000_000)
QUICK = Plan(handoffs=300, block=30, repeats=3, block_bytes=20_000_000)


# Measuring.


@contextlib.contextmanager
def baseline(deployment: Deployment) -> Iterator[Process]:
    """The media server without offload, beside the one with it."""
    argv = [sys.executable, "-m", "guest_agent.examples.media_server", "--root", str(deployment.share)]
    argv += ["--port", str(BASELINE_PORT), "--no-offload"]
    server = Process(deployment.network.guest, argv, deployment.folder / "baseline.log")
    server.start()
    try:
        wait_for(lambda: "serving" in server.log.read_text(), "the baseline's media server")
        yield server
    finally:
        server.stop()


def fetch(deployment: Deployment, phase: str, size: int, *, requests: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of `tests.performance.fetch` in the client's namespace."""
    address, client = deployment.network.guest_address[4], deployment.network.client.name
    servers = {"offload": f"{address}:{deployment.port}", "baseline": f"{address}:{BASELINE_PORT}"}
    inside = functools.partial(_inside, client)
    rows = fetch_client.measure(inside, servers, f"/{size}.bin", requests=requests, repeats=repeats)
    return [{"phase": phase, "size": size, **row} for row in rows]


def _inside(namespace: str, *argv: str) -> list[str]:
    return ["ip", "netns", "exec", namespace, *argv]


def measure(deployment: Deployment, plan: Plan, report: Report) -> None:
    """All phases; the service's own step times are those of the small segments."""
    report.rows += fetch(deployment, "latency", LATENCY_SIZE, requests=plan.block, repeats=plan.handoffs // plan.block)
    report.details["steps"] = deployment.status()["durations"]
    for size in RATIO_LIMITS:
        report.rows += fetch(deployment, "unlimited", size, requests=plan.requests(size), repeats=plan.repeats)
    with shaped(deployment.network):
        for size in RATIO_LIMITS:
            report.rows += fetch(deployment, LINK, size, requests=plan.requests(size), repeats=plan.repeats)
    report.details["media_server"] = deployment.counters()


@contextlib.contextmanager
def shaped(network: Network) -> Iterator[None]:
    """The client's link is slow meanwhile."""
    network.shape(LINK)
    try:
        yield
    finally:
        network.unshape()


# Judging: pure.


def latencies(rows: Sequence[dict[str, Any]], side: str) -> list[float]:
    """Microseconds of every small request of a side."""
    chosen = (row for row in rows if (row["phase"], row["side"]) == ("latency", side))
    return [latency for row in chosen for latency in row["latencies_us"]]


def rates(rows: Sequence[dict[str, Any]], phase: str, size: int, side: str) -> list[float]:
    """Mbit/s of every block."""
    wanted = (phase, size, side)
    return [fetch_client.megabits(row) for row in rows if (row["phase"], row["size"], row["side"]) == wanted]


def ratio(rows: Sequence[dict[str, Any]], phase: str, size: int) -> float:
    """Median throughput of the offloaded side over the baseline's."""
    offloaded, plain = (rates(rows, phase, size, side) for side in SIDES)
    return statistics.median(offloaded) / statistics.median(plain)


def longest_stall(rows: Sequence[dict[str, Any]]) -> float:
    """Milliseconds that the unluckiest offloaded small request waited for a piece."""
    chosen = (row for row in rows if (row["phase"], row["side"]) == ("latency", "offload"))
    longest: float = max(wait for row in chosen for wait in row["longest_waits_us"])
    return longest / 1e3


def judge(rows: Sequence[dict[str, Any]], counters: dict[str, Any]) -> list[Bar]:
    """The bars of the issue."""
    with_us, without = (latencies(rows, side) for side in SIDES)
    bars = [
        Bar("added latency, p50", percentile(with_us, 50) - percentile(without, 50), "us", 700, "<="),
        Bar("added latency, p99", percentile(with_us, 99) - percentile(without, 99), "us", 3000, "<="),
        Bar(f"longest stall in {len(with_us)} handoffs", longest_stall(rows), "ms", 100, "<="),
    ]
    for size, limit in RATIO_LIMITS.items():
        bars.append(Bar(f"throughput at {size / 1e6:g} MB, {LINK}", ratio(rows, LINK, size), "of baseline", limit, ">="))
    served = counters["offloaded"] + sum(counters["local"].values()) + counters["failed"]
    bars.append(Bar("bodies that the host delivered", counters["offloaded"] / served, "of all", 0.99, ">="))
    return bars


# Showing.


def tables(report: Report) -> list[Table]:
    """What is not a bar."""
    used = report.details["congestion_control"]
    latency = Table("side", "requests", "p50 us", "p99 us", title=f"{LATENCY_SIZE} bytes, {used}")
    for side in SIDES:
        values = latencies(report.rows, side)
        latency.add_row(side, str(len(values)), f"{percentile(values, 50):,.0f}", f"{percentile(values, 99):,.0f}")
    steps = Table("step", "samples", "p50 us", "p99 us", title="steps of a handoff, as the service timed them")
    for name, step in report.details["steps"].items():
        steps.add_row(name, *(str(step[key]) for key in ("samples", "p50_us", "p99_us")))
    speed = Table("link", "bytes", "offload Mbit/s", "baseline Mbit/s", "ratio", title="throughput, median (spread)")
    for phase in ("unlimited", LINK):
        for size in RATIO_LIMITS:
            found = [bench.median_and_spread(rates(report.rows, phase, size, side)) for side in SIDES]
            cells = [f"{median:,.0f} ({spread:,.0f})" for median, spread in found]
            speed.add_row(phase, f"{size:,}", *cells, f"{ratio(report.rows, phase, size):.3f}")
    return [latency, steps, speed]


def plot(report: Report, path: Path) -> None:
    """Latency as a cumulative distribution, and the ratios."""
    with bench.drawing(path, columns=2) as (left, right):
        for side in SIDES:
            values = sorted(latencies(report.rows, side))
            left.plot([v / 1e3 for v in values], [(i + 1) / len(values) for i in range(len(values))], label=side)
        paper = percentile(latencies(report.rows, "baseline"), 50) / 1e3 + PAPER_MS
        left.axvline(paper, color="black", linestyle=":", label=f"baseline + {PAPER_MS} ms: Jeong 2015")
        left.set(xscale="log", xlabel="latency in ms", ylabel="share of requests", title=f"{LATENCY_SIZE} bytes")
        left.legend()
        megabytes = [size / 1e6 for size in RATIO_LIMITS]
        for phase in (LINK, "unlimited"):
            right.plot(megabytes, [ratio(report.rows, phase, size) for size in RATIO_LIMITS], marker="o", label=phase)
        right.plot(megabytes, list(RATIO_LIMITS.values()), "k:", label=f"limit at {LINK}")
        right.set(xscale="log", xlabel="segment in MB", ylabel="throughput / baseline", ylim=(0, 1.2), title="throughput")
        right.legend()


def main() -> int:
    """The benchmark."""
    options = bench.arguments("what a handoff costs")
    report = Report("handoff", CAVEAT)
    with tempfile.TemporaryDirectory() as folder, routed() as network:
        share = Path(folder) / "share"
        make_content(str(share), (LATENCY_SIZE, *RATIO_LIMITS))
        used = network.host.run("sysctl", "-n", "net.ipv4.tcp_congestion_control").strip()
        report.details["congestion_control"] = used
        with deployed(network, Path(folder), share) as deployment, baseline(deployment):
            measure(deployment, QUICK if options.quick else FULL, report)
    report.bars = judge(report.rows, report.details["media_server"])
    if options.plot:
        plot(report, options.plot)
    return bench.finish(report, options, tables(report))


if __name__ == "__main__":
    sys.exit(main())
