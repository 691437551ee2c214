# SPDX-License-Identifier: Apache-2.0
"""What it costs a distant client that its connection goes out and comes home with every segment: not at all offloaded, with
the `socket_offload` module, and with `tcp_repair`, in turn, in one VM; by each congestion control, and at each rate of loss.

    ./run bench warm [--json FILE] [--plot FILE] [--quick]

30 segments of 1.4 MB on one keep-alive connection, 50 ms of round trip and 100 Mbit/s (netem), without loss and with 0.5 %:
every 200th packet of data, so that all sides lose equally."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rich.table import Table

from tests.client import make_content
from tests.namespaces.deployment import Deployment, deployed
from tests.namespaces.topology import Network, routed
from tests.performance import bench, counted
from tests.performance.bench import Bar, Report

SIZE = 1_400_000
ESTABLISHED = "01"
PERIOD = 0.25
"""Seconds between two looks at a congestion window."""
SIDES = {"not offloaded": "", "socket_offload": "socket_offload/socket_offload", "tcp_repair": "tcp_repair/tcp_repair"}
LOSSES = (0.0, 0.5)
"""Percent."""
CONGESTIONS = ("cubic", "bbr", "reno")
LIMIT = 1.03
ROUND_TRIP_MS, RATE = 50, "100mbit"
CAVEAT = (
    "Three network namespaces in one VM, whose processor is emulated and whose clock counts its instructions, one a nanosecond:"
    " delays and processor time stand in proportion, on a slow machine. Loss is not random: it takes every 200th packet of data, so"
    " that all sides lose equally, and it comes behind the slow link."
)
LOSS = """
table netdev loss
delete table netdev loss
table netdev loss {{
    chain early {{
        type filter hook ingress device eth0 priority 0
        ip length > 1000 numgen inc mod {every} 0 drop
    }}
}}
"""


@dataclass(frozen=True)
class Plan:
    """How much is measured. `timeout`: seconds for one rate of loss."""

    segments: int
    repeats: int
    timeout: float = 1800
    congestions: tuple[str, ...] = CONGESTIONS
    losses: tuple[float, ...] = LOSSES


FULL = Plan(segments=30, repeats=2)
QUICK = Plan(segments=4, repeats=1, congestions=CONGESTIONS[:1], losses=LOSSES[:1])

CLIENT = """
import json, socket, sys, time
size, segments = int(sys.argv[1]), int(sys.argv[2])
sock = socket.create_connection(("10.77.1.2", 80), timeout=60)
print(sock.getsockname()[1], flush=True)
times, begin = [], time.monotonic()
for _ in range(segments):
    start = time.monotonic()
    sock.sendall(f"GET /{size}.bin HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
    got = b""
    while b"\\r\\n\\r\\n" not in got:
        got += sock.recv(65536)
    left = size - len(got.split(b"\\r\\n\\r\\n", 1)[1])
    while left:
        piece = sock.recv(min(left, 1 << 18))
        assert piece, "closed"
        left -= len(piece)
    times.append(time.monotonic() - start)
print(json.dumps({"seconds": time.monotonic() - begin, "segments": times}))
"""


# Inside the VM.


def shape(network: Network, loss: float) -> None:
    """Delay and rate towards the client, delay back; segments stay apart, so that each may be lost alone."""
    half = f"{ROUND_TRIP_MS / 2:g}ms"
    for where, device in ((network.guest, "eth0"), (network.host, "hg"), (network.host, "hc")):
        where.run("ip", "link", "set", device, "gso_max_segs", "1")
    if loss:
        network.client.run("nft", LOSS.format(every=round(100 / loss)))
    netem = ("tc", "qdisc", "replace", "dev")
    network.host.run(*netem, "hc", "root", "netem", "delay", half, "rate", RATE, "limit", "2000")
    network.client.run(*netem, "eth0", "root", "netem", "delay", half, "limit", "10000")


def choose(network: Network, congestion: str) -> None:
    """For connections that begin from now on, and learn nothing of earlier ones. The one of the host is the guest's, if it takes
    the connection over."""
    for where in (network.guest, network.host):
        where.run("sysctl", "-qw", f"net.ipv4.tcp_congestion_control={congestion}", "net.ipv4.tcp_no_metrics_save=1")


def run_once(deployment: Deployment, plan: Plan) -> dict[str, Any]:
    """One connection's life; its times, and its congestion window every PERIOD."""
    argv = [sys.executable, "-c", CLIENT, str(SIZE), str(plan.segments)]
    with deployment.network.client.popen(argv, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        port, begin = int(client.stdout.readline()), time.monotonic()
        windows: list[tuple[float, int]] = []
        done = threading.Event()
        with connection_tables(deployment.network) as tables:
            sampler = threading.Thread(target=_sample, args=(tables, port, begin, windows, done))
            sampler.start()
            found: dict[str, Any] = json.loads(client.stdout.read())
            done.set()
            sampler.join()
    return {**found, "windows": windows}


@contextlib.contextmanager
def connection_tables(network: Network) -> Iterator[list[BinaryIO]]:
    """The kernel's tables of TCP sockets (proc(5), /proc/net/tcp) of the host, then of the guest, open: each reading is new. The
    processor that is emulated also pays for looking: a program for each look would cost more than the connection."""
    with contextlib.ExitStack() as stack:
        tables: list[BinaryIO] = []
        for where in (network.host, network.guest):
            with where.entered():
                for name in ("tcp", "tcp6"):
                    tables.append(stack.enter_context(open(f"/proc/thread-self/net/{name}", "rb", buffering=0)))
        yield tables


def _sample(
    tables: Sequence[BinaryIO], port: int, begin: float, windows: list[tuple[float, int]], done: threading.Event
) -> None:
    while not done.wait(PERIOD):
        found = next((window for table in tables if (window := window_in(_read(table), port)) is not None), None)
        if found is not None:
            windows.append((round(time.monotonic() - begin, 2), found))


def _read(table: BinaryIO) -> str:
    table.seek(0)
    return table.read().decode()


def window_in(table: str, port: int) -> int | None:
    """The congestion window, in segments, of the established connection to that port of its peer (get_tcp4_sock())."""
    for words in map(str.split, table.splitlines()[1:]):
        if words[3] == ESTABLISHED and int(words[2].rpartition(":")[2], 16) == port:
            return int(words[15])
    return None


@contextlib.contextmanager
def deployments(folder: Path) -> Iterator[dict[str, Deployment]]:
    """One of each side, at once."""
    share = folder / "share"
    make_content(str(share), (SIZE,))
    with contextlib.ExitStack() as stack:
        found = {}
        for number, (side, backends) in enumerate(SIDES.items()):
            (folder / str(number)).mkdir()
            os.environ["STREAMLIFT_BACKENDS"] = backends or "auto/auto"
            network = stack.enter_context(routed())
            found[side] = stack.enter_context(deployed(network, folder / str(number), share, offload=bool(backends)))
        yield found


def inside(plan: Plan, loss: float) -> None:
    """Print the rows and what the media servers counted, at one rate of loss."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, deployments(Path(folder)) as sides:
        for deployment in sides.values():
            shape(deployment.network, loss)
        for congestion in plan.congestions:
            for deployment in sides.values():
                choose(deployment.network, congestion)
            for repeat in range(plan.repeats):
                for side, deployment in sides.items():
                    found = run_once(deployment, plan)
                    rows.append({"congestion": congestion, "side": side, "loss": loss, "repeat": repeat, **found})
                    print(congestion, side, loss, round(found["seconds"], 3), flush=True)
        counters = {side: deployment.counters() for side, deployment in sides.items()}
    counted.tell({"rows": rows, "media_servers": counters})


# Judging: pure.


def of(rows: Sequence[dict[str, Any]], congestion: str) -> list[dict[str, Any]]:
    """By one congestion control."""
    return [row for row in rows if row["congestion"] == congestion]


def seconds(rows: Sequence[dict[str, Any]], side: str, loss: float) -> list[float]:
    """Of every run."""
    return [row["seconds"] for row in rows if (row["side"], row["loss"]) == (side, loss)]


def ratio(rows: Sequence[dict[str, Any]], side: str, loss: float) -> float:
    """Median total time over that of the connection that stayed."""
    return statistics.median(seconds(rows, side, loss)) / statistics.median(seconds(rows, "not offloaded", loss))


def judge(rows: Sequence[dict[str, Any]], counters: dict[str, dict[str, Any]], plan: Plan) -> list[Bar]:
    """The bars of the issue. `counters`: of each rate of loss, by side."""
    bars = [
        Bar(
            f"total time, socket_offload, {congestion}, {loss:g} % loss",
            ratio(of(rows, congestion), "socket_offload", loss),
            "of not offloaded",
            LIMIT,
            "<=",
        )
        for congestion in plan.congestions
        for loss in plan.losses
    ]
    asked = plan.segments * plan.repeats * len(plan.losses) * len(plan.congestions)
    for side in ("socket_offload", "tcp_repair"):
        out = sum(found[side]["offloaded"] for found in counters.values())
        bars.append(Bar(f"segments that went out, {side}", out / asked, "of all", 1, ">="))
    return bars


def tables(report: Report, plan: Plan) -> list[Table]:
    """Every congestion control, loss and side."""
    title = f"segments of {SIZE:,} bytes, {ROUND_TRIP_MS} ms, {RATE}"
    table = Table("congestion", "loss", "side", "total s (spread)", "of not offloaded", title=title)
    for congestion in plan.congestions:
        rows = of(report.rows, congestion)
        for loss in plan.losses:
            for side in SIDES:
                median, spread = bench.median_and_spread(seconds(rows, side, loss))
                table.add_row(congestion, f"{loss:g} %", side, f"{median:.2f} ({spread:.2f})", f"{ratio(rows, side, loss):.3f}")
    return [table]


def plot(report: Report, path: Path, plan: Plan) -> None:
    """The congestion window over time, one run of each side."""
    cases = [(congestion, loss) for congestion in plan.congestions for loss in plan.losses]
    with bench.drawing(path, columns=len(cases)) as axes:
        for axis, (congestion, loss) in zip(axes, cases, strict=True):
            rows = of(report.rows, congestion)
            for side in SIDES:
                row = next(row for row in rows if (row["side"], row["loss"]) == (side, loss))
                axis.plot([at for at, _ in row["windows"]], [window for _, window in row["windows"]], label=side)
            axis.set(xlabel="seconds", ylabel="congestion window in segments", title=f"{congestion}, {loss:g} % loss")
            axis.legend()


def measure(plan: Plan, loss: float) -> Any:
    """One rate of loss, in a VM of its own: what `inside` told."""
    arguments = (str(plan.segments), str(plan.repeats), str(loss), *plan.congestions)
    return counted.measure("tests.performance.warm", *arguments, timeout=plan.timeout)


def collect(report: Report, plan: Plan) -> None:
    """All of them at once, into the report: each VM has one processor, whose clock counts its own instructions."""
    with ThreadPoolExecutor(len(plan.losses)) as pool:
        for loss, found in zip(plan.losses, pool.map(partial(measure, plan), plan.losses), strict=True):
            report.rows += found["rows"]
            report.details["media_servers"][f"{loss:g} %"] = found["media_servers"]


def main() -> int:
    """The benchmark."""
    if sys.argv[1:2] == ["--inside"]:
        segments, repeats, loss, *congestions = sys.argv[2:]
        inside(Plan(int(segments), int(repeats), congestions=tuple(congestions)), float(loss))
        return 0
    options = bench.arguments("what a handoff costs a distant client")
    plan = QUICK if options.quick else FULL
    report = Report("warm", CAVEAT, details={"guest_kernel": counted.KERNEL, "media_servers": {}})
    collect(report, plan)
    report.bars = judge(report.rows, report.details["media_servers"], plan)
    if options.plot:
        plot(report, options.plot, plan)
    return bench.finish(report, options, tables(report, plan))


if __name__ == "__main__":
    sys.exit(main())
