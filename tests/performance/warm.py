# SPDX-License-Identifier: Apache-2.0
"""What it costs a distant client that its connection goes out and comes home with every segment: not at all offloaded, with
the `socket_offload` module, and with `tcp_repair`, in turn, in one VM; by each congestion control.

    ./run bench warm [--json FILE] [--plot FILE] [--quick]

30 segments of 1.4 MB on one keep-alive connection, 50 ms of round trip and 100 Mbit/s (netem), without loss and with 0.5 %:
every 200th packet of data, so that all sides lose equally."""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from typing import Any

from rich.table import Table

from tests.client import make_content
from tests.namespaces.deployment import Deployment, deployed
from tests.namespaces.topology import Network, routed
from tests.performance import bench, counted
from tests.performance.bench import Bar, Report

SIZE = 1_400_000
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
    """How much is measured. `timeout`: seconds for one congestion control."""

    segments: int
    repeats: int
    timeout: float = 1800
    congestions: tuple[str, ...] = CONGESTIONS


FULL = Plan(segments=30, repeats=1)
"""Once: the clock counts instructions, and 42 MB at a loss of 0.5 % take long."""
QUICK = Plan(segments=10, repeats=1, congestions=CONGESTIONS[:1])

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
    """For connections that begin from now on. The one of the host is the guest's, if it takes the connection over."""
    for where in (network.guest, network.host):
        where.run("sysctl", "-qw", f"net.ipv4.tcp_congestion_control={congestion}")


def run_once(deployment: Deployment, plan: Plan) -> dict[str, Any]:
    """One connection's life; its times, and its congestion window every 100 ms."""
    argv = [sys.executable, "-c", CLIENT, str(SIZE), str(plan.segments)]
    with deployment.network.client.popen(argv, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        port, begin = int(client.stdout.readline()), time.monotonic()
        windows: list[tuple[float, int]] = []
        done = threading.Event()
        sampler = threading.Thread(target=_sample, args=(deployment.network, port, begin, windows, done))
        sampler.start()
        found: dict[str, Any] = json.loads(client.stdout.read())
        done.set()
        sampler.join()
    return {**found, "windows": windows}


def _sample(network: Network, port: int, begin: float, windows: list[tuple[float, int]], done: threading.Event) -> None:
    while not done.wait(0.1):
        for where in (network.host, network.guest):
            found = re.search(r" cwnd:(\d+)", where.run("ss", "-tinH", "state", "established", f"( dport = :{port} )"))
            if found:
                windows.append((round(time.monotonic() - begin, 2), int(found[1])))
                break


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


def inside(plan: Plan) -> None:
    """Print the rows and what the media servers counted, for one congestion control."""
    (congestion,) = plan.congestions
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, deployments(Path(folder)) as sides:
        for deployment in sides.values():
            choose(deployment.network, congestion)
        for loss in LOSSES:
            for deployment in sides.values():
                shape(deployment.network, loss)
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
    """The bars of the issue. `counters`: of each congestion control, by side."""
    bars = [
        Bar(
            f"total time, socket_offload, {congestion}, {loss:g} % loss",
            ratio(of(rows, congestion), "socket_offload", loss),
            "of not offloaded",
            LIMIT,
            "<=",
        )
        for congestion in plan.congestions
        for loss in LOSSES
    ]
    asked = plan.segments * plan.repeats * len(LOSSES) * len(plan.congestions)
    for side in ("socket_offload", "tcp_repair"):
        out = sum(counters[congestion][side]["offloaded"] for congestion in plan.congestions)
        bars.append(Bar(f"segments that went out, {side}", out / asked, "of all", 1, ">="))
    return bars


def tables(report: Report, plan: Plan) -> list[Table]:
    """Every congestion control, loss and side."""
    title = f"segments of {SIZE:,} bytes, {ROUND_TRIP_MS} ms, {RATE}"
    table = Table("congestion", "loss", "side", "total s (spread)", "of not offloaded", title=title)
    for congestion in plan.congestions:
        rows = of(report.rows, congestion)
        for loss in LOSSES:
            for side in SIDES:
                median, spread = bench.median_and_spread(seconds(rows, side, loss))
                table.add_row(congestion, f"{loss:g} %", side, f"{median:.2f} ({spread:.2f})", f"{ratio(rows, side, loss):.3f}")
    return [table]


def plot(report: Report, path: Path, plan: Plan) -> None:
    """The congestion window over time, one run of each side."""
    cases = [(congestion, loss) for congestion in plan.congestions for loss in LOSSES]
    with bench.drawing(path, columns=len(cases)) as axes:
        for axis, (congestion, loss) in zip(axes, cases, strict=True):
            rows = of(report.rows, congestion)
            for side in SIDES:
                row = next(row for row in rows if (row["side"], row["loss"]) == (side, loss))
                axis.plot([at for at, _ in row["windows"]], [window for _, window in row["windows"]], label=side)
            axis.set(xlabel="seconds", ylabel="congestion window in segments", title=f"{congestion}, {loss:g} % loss")
            axis.legend()


def measure(plan: Plan, congestion: str) -> Any:
    """One congestion control, in a VM of its own: what `inside` told."""
    arguments = (str(plan.segments), str(plan.repeats), congestion)
    return counted.measure("tests.performance.warm", *arguments, timeout=plan.timeout)


def collect(report: Report, plan: Plan) -> None:
    """All of them, into the report. As many VMs at once as there are processors: their clocks count their own instructions."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for congestion, found in zip(plan.congestions, pool.map(partial(measure, plan), plan.congestions), strict=True):
            report.rows += found["rows"]
            report.details["media_servers"][congestion] = found["media_servers"]


def main() -> int:
    """The benchmark."""
    if sys.argv[1:2] == ["--inside"]:
        segments, repeats, congestion = sys.argv[2:]
        inside(Plan(int(segments), int(repeats), congestions=(congestion,)))
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
