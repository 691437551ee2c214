# SPDX-License-Identifier: Apache-2.0
"""Inside a VM whose clock counts instructions: what one piece for one sink costs, by the thesis's daemon, by the module with the
payload copied for each sink (OMSS-M) and with its pages shared (OMSS), and by the `user` engine.

Pieces come one at a time and nobody reads: what is counted is all that the processor ran (/proc/schedstat), idle time left out,
by pieces and sinks. Outside: `measure(...)`; inside: this file as a program, with `--inside`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypervisor_svc import omss
from tests.performance import counted
from tests.performance.fanout import line, source, start

SIDES = ("daemon", "OMSS-M", "OMSS", "user")
SINKS, PIECES, WARM_UP = 100, 20, 3
PAUSE = 0.05
"""Seconds between two pieces: nothing, to a clock that skips idle time."""
_FIONREAD = 0x541B


def measure(daemon: Path, cases: list[tuple[str, str, int]], *, timeout: float) -> list[dict[str, Any]]:
    """A row for each (side, protocol, bytes of a piece). The VM sees our files where they are."""
    told = counted.measure("tests.performance.relays.spliced", str(daemon), json.dumps(cases), modules=("omss",), timeout=timeout)
    return list(told["rows"])


def ran() -> int:
    """Nanoseconds, which are instructions here, that tasks have run on the one processor (proc(5), schedstat)."""
    first = next(row for row in Path("/proc/schedstat").read_text().splitlines() if row.startswith("cpu0 "))
    return int(first.split()[7])


@contextlib.contextmanager
def relay(side: str, daemon: str, near: Any, relay_end: socket.socket) -> Iterator[None]:
    """Whoever relays, for the block."""
    if side in ("OMSS", "OMSS-M"):
        door = relay_end
        omss.set_source(door, copy=side == "OMSS-M", copy_below=0 if side == "OMSS-M" else 1, ring=256)
        for sock in near.sockets[: near.count]:
            omss.add_sink(door, sock)
        yield
        omss.end(door)
        return
    argv = [daemon, "relay", str(relay_end.fileno()), str(near.near), str(near.count)]
    if side == "user":
        argv = [sys.executable, "-m", "tests.performance.relays.user", *argv[1:], "0"]
    process = start(argv, near.near, near.count, relay_end.fileno())
    try:
        if side == "user":
            assert process.stdout is not None
            process.stdout.readline()
        else:
            time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.communicate()


def one(daemon: str, side: str, protocol: str, size: int) -> dict[str, Any]:
    """One row."""
    udp = protocol == "udp"
    with line(SINKS, udp=udp) as made, source(udp=udp) as (encoder, relay_end):
        for sock in made.sockets[SINKS:]:
            sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 20)  # SO_RCVBUFFORCE: nobody reads
        with relay(side, daemon, made, relay_end):
            _feed(encoder, size, WARM_UP)
            before = ran()
            _feed(encoder, size, PIECES)
            spent = ran() - before
            whole = [_received(sock, udp=udp) for sock in made.sockets[SINKS:]]
    expected = (WARM_UP + PIECES) * size
    if set(whole) != {expected}:
        raise RuntimeError(f"{side}, {protocol}, {size} bytes: sinks got {min(whole)} to {max(whole)} of {expected} bytes")
    return {"side": side, "protocol": protocol, "size": size, "instructions": spent / (PIECES * SINKS)}


def _feed(encoder: socket.socket, size: int, pieces: int) -> None:
    for _ in range(pieces):
        encoder.send(bytes(size))
        time.sleep(PAUSE)


def _received(sock: socket.socket, *, udp: bool) -> int:
    """Bytes that wait in a socket."""
    if not udp:
        return int.from_bytes(fcntl.ioctl(sock.fileno(), _FIONREAD, b"\0\0\0\0"), "little")
    total = 0
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            total += len(sock.recv(65536))
    return total


def main() -> None:
    _, _, daemon, cases = sys.argv
    subprocess.run(["sysctl", "-q", "-w", "net.core.rmem_max=8388608", "kernel.sched_schedstats=1"], check=False)
    os.environ["PYTHONHASHSEED"] = "0"
    counted.tell({"rows": [one(daemon, *case) for case in json.loads(cases)]})


if __name__ == "__main__":
    main()
