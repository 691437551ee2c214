# SPDX-License-Identifier: Apache-2.0
"""Inside a VM whose clock counts instructions: what one piece for one sink costs, by the thesis's daemon, by the module with the
payload copied for each sink (OMSS-M) and with its pages shared (OMSS), and by the `user` engine.

Pieces come one at a time: what is counted is all that the processor ran (/proc/schedstat), idle time and what this process, the
encoder, took left out, by sinks; the median of the pieces. Datagrams leave by a network card that throws them away (a dummy
device), as the thesis's left its relay: no receiver is in the figures. TCP needs one that answers: its sinks are on loopback,
nobody reads, and the receiving half is in all columns.
Outside: `measure(...)`; inside: this file as a program, with `--inside`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guest_agent.handoff import kernel
from hypervisor_svc import omss
from tests.performance import counted
from tests.performance.bench import median_and_spread
from tests.performance.fanout import Line, consecutive, line, source, start

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
    """Nanoseconds, which are instructions here, that other tasks have run on the one processor (proc(5), schedstat)."""
    first = next(row for row in Path("/proc/schedstat").read_text().splitlines() if row.startswith("cpu0 "))
    return int(first.split()[7]) - time.thread_time_ns()


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


@contextlib.contextmanager
def card(count: int) -> Iterator[Line]:
    """UDP sinks beyond a network card that throws away what it sends."""
    near = []
    for number in range(count):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect((f"10.99.{1 + number // 200}.{1 + number % 200}", 5000))
        near.append(sock)
    with contextlib.ExitStack() as stack:
        for sock in near:
            stack.enter_context(sock)
        first = stack.enter_context(consecutive(near))
        yield Line(first, first, count, near)


def one(daemon: str, side: str, protocol: str, size: int) -> dict[str, Any]:
    """One row."""
    udp = protocol == "udp"
    with card(SINKS) if udp else line(SINKS, udp=False) as made, source(udp=udp) as (encoder, relay_end):
        for sock in made.sockets[SINKS:]:
            sock.setsockopt(socket.SOL_SOCKET, kernel.SO_RCVBUFFORCE, 1 << 20)  # nobody reads
        gone = _left_the_card()
        with relay(side, daemon, made, relay_end):
            _feed(encoder, size, WARM_UP)
            spent = [_feed(encoder, size, 1) for _ in range(PIECES)]
            whole = [_waiting(sock) for sock in made.sockets[SINKS:]]
    if udp:
        fragments = -(-(size + 8) // 1480)
        whole = [(_left_the_card() - gone) // fragments * size // SINKS]
    expected = (WARM_UP + PIECES) * size
    if set(whole) != {expected}:
        raise RuntimeError(f"{side}, {protocol}, {size} bytes: sinks got {min(whole)} to {max(whole)} of {expected} bytes")
    middle, spread = median_and_spread([one / SINKS for one in spent])  # now and then the kernel does something else too
    return {"side": side, "protocol": protocol, "size": size, "instructions": middle, "spread": spread}


def _feed(encoder: socket.socket, size: int, pieces: int) -> int:
    """What that cost."""
    before = ran()
    for _ in range(pieces):
        encoder.send(bytes(size))
        time.sleep(PAUSE)
    return ran() - before


def _waiting(sock: socket.socket) -> int:
    """Bytes that wait in a TCP socket."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), _FIONREAD, b"\0\0\0\0"), "little")


def _left_the_card() -> int:
    """Packets."""
    return int(Path("/sys/class/net/card0/statistics/tx_packets").read_text())


def main() -> None:
    _, _, daemon, cases = sys.argv
    subprocess.run(["sysctl", "-q", "-w", "kernel.sched_schedstats=1"], check=False)
    subprocess.run(["ip", "link", "add", "card0", "type", "dummy"], check=True)
    subprocess.run(["sysctl", "-q", "-w", "net.ipv6.conf.card0.disable_ipv6=1"], check=True)  # it would speak by itself
    for words in ("address add 10.99.0.1/16 dev card0", "link set card0 multicast off up"):
        subprocess.run(["ip", *words.split()], check=True)
    counted.tell({"rows": [one(daemon, *case) for case in json.loads(cases)]})


if __name__ == "__main__":
    main()
