# SPDX-License-Identifier: Apache-2.0
"""What one move of a connection costs the processor: out of a socket, into a new one, and into one that is held, by each backend.

    ./run bench moves [--json FILE] [--plot FILE] [--quick]

In a VM whose clock counts instructions, so that the figures repeat; the backends take turns on one connection."""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.performance import bench, counted
from tests.performance.bench import Bar, Report

STEPS = ("export", "import fresh", "import in place")
BACKENDS = ("tcp_repair", "socket_offload")
LIMIT = 0.5
CAVEAT = "Python's part of each step is counted with the kernel's; an emulated processor counts `rep movs` by the iteration."


# Inside the VM.


def inside(rounds: int) -> None:
    """Print the rows: instructions of each step, one round after the other."""
    from guest_agent.handoff.backend import SocketOffload, TcpRepair
    from guest_agent.handoff.hold import Hold

    rows = []
    with Hold() as keep, socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        for number in range(rounds + 5):
            for backend in (TcpRepair(), SocketOffload()):
                row: dict[str, Any] = {"backend": backend.name}
                for step in ("import fresh", "import in place"):
                    snapshot, row["export"] = timed(lambda: backend.take(server, keep))  # noqa: B023
                    if step == "import fresh":
                        server.close()
                        server, row[step] = timed(lambda: backend.restore_fresh(snapshot, keep))  # noqa: B023
                    else:
                        _, row[step] = timed(lambda: backend.restore_in_place(server, snapshot))  # noqa: B023
                    backend.thaw(server)
                    exchange(server, client)
                if number >= 5:  # the first ones fill caches
                    rows.append(row)
        server.close()
        client.close()
    counted.tell(rows)


def timed(call: Callable[[], Any]) -> tuple[Any, int]:
    """Its result, and the nanoseconds (here: instructions) that it took."""
    begin = time.perf_counter_ns()
    result = call()
    return result, time.perf_counter_ns() - begin


def exchange(server: socket.socket, client: socket.socket) -> None:
    """The connection works."""
    blob = os.urandom(1000)
    server.setblocking(True)
    server.sendall(blob)
    assert client.recv(1000, socket.MSG_WAITALL) == blob
    client.sendall(blob)
    assert server.recv(1000, socket.MSG_WAITALL) == blob


# Judging: pure.


def median(rows: Sequence[dict[str, Any]], backend: str, step: str) -> float:
    """Instructions."""
    return float(statistics.median(row[step] for row in rows if row["backend"] == backend))


def judge(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """The bars of the issue."""
    return [
        Bar(step, median(rows, "socket_offload", step) / median(rows, "tcp_repair", step), "of tcp_repair", LIMIT, "<=")
        for step in STEPS
    ]


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Thousands of instructions."""
    table = Table("step", *BACKENDS, "ratio", title="thousands of instructions, median")
    for step in STEPS:
        repair, ours = (median(rows, backend, step) for backend in BACKENDS)
        table.add_row(step, f"{repair / 1e3:.0f}", f"{ours / 1e3:.0f}", f"{ours / repair:.3f}")
    return [table]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars side by side."""
    with bench.drawing(path) as (axis,):
        for place, backend in enumerate(BACKENDS):
            heights = [median(rows, backend, step) / 1e3 for step in STEPS]
            axis.bar([at + 0.4 * place for at in range(len(STEPS))], heights, width=0.4, label=backend)
        axis.set_xticks([at + 0.2 for at in range(len(STEPS))], STEPS)
        axis.set(ylabel="thousands of instructions")
        axis.legend()


def main() -> int:
    """The benchmark."""
    if sys.argv[1:2] == ["--inside"]:
        inside(int(sys.argv[2]))
        return 0
    options = bench.arguments("what one move of a connection costs the processor")
    report = Report("moves", CAVEAT, details={"guest_kernel": counted.KERNEL})
    report.rows = counted.measure("tests.performance.moves", "50" if options.quick else "400", timeout=300)
    report.bars = judge(report.rows)
    if options.plot:
        plot(report.rows, options.plot)
    return bench.finish(report, options, tables(report.rows))


if __name__ == "__main__":
    sys.exit(main())
