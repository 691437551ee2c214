# SPDX-License-Identifier: Apache-2.0
"""Inside a VM whose clock counts instructions: what one piece for one sink costs, by the thesis's daemon, by the module with the
payload copied for each sink (OMSS-M) and with its pages shared (OMSS), and by the `user` engine.

Pieces come one at a time: what is counted is all that the processor ran (/proc/schedstat), idle time and what this process, the
encoder, took left out, by sinks; the median of the pieces. What is sent leaves by a network card that throws it away (a dummy
device), as the thesis's left its relay: no receiver is in the figures. TCP too: its connections are restored ones (TCP_REPAIR) with
windows that take all pieces before anybody would have to acknowledge them, and it is over before a timer sends them again.
"tcp over loopback" has receivers that acknowledge and do not read: their half is in all columns.
Outside: `measure(...)`; inside: this file as a program, with `--inside`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guest_agent.handoff import kernel
from guest_agent.handoff.backend import TcpRepair
from guest_agent.handoff.snapshot import Endpoint, Options, Snapshot, Window
from hypervisor_svc import omss
from tests.performance import counted
from tests.performance.bench import median_and_spread
from tests.performance.fanout import Line, consecutive, line, source, start

SIDES = ("daemon", "OMSS-M", "OMSS", "user")
PROTOCOLS = ("udp", "tcp", "tcp over loopback")
SINKS, PIECES, WARM_UP = 100, 20, 3
PAUSE = 0.02
"""Seconds between two pieces: nothing, to a clock that skips idle time. All of them are sent within the second after which TCP
begins to send again (RFC 6298)."""
WINDOW = 1 << 22
"""Bytes of each TCP connection that may be under way, and wait in its socket."""
_FIONREAD, _SIOCOUTQ, _SIOCOUTQNSD = 0x541B, 0x5411, 0x894B


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
def card(count: int, *, udp: bool) -> Iterator[Line]:
    """Sinks beyond a network card that throws away what it sends."""
    near = [(_datagrams if udp else _stream)(at) for at in range(count)]
    with contextlib.ExitStack() as stack:
        for sock in near:
            stack.enter_context(sock)
        first = stack.enter_context(consecutive(near))
        yield Line(first, first, count, near)


def _peer(number: int) -> Endpoint:
    return Endpoint(f"10.99.{1 + number // 200}.{1 + number % 200}", 5000)


def _datagrams(number: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(_peer(number))
    return sock


def _stream(number: int) -> socket.socket:
    """A connection with a peer that is nowhere."""
    snapshot = Snapshot(
        local=Endpoint("10.99.0.1", 10_000 + number),
        peer=_peer(number),
        send_sequence=1000,
        receive_sequence=1000,
        mss=1460,
        send_scale=14,
        receive_scale=7,
        sack=True,
        timestamps=True,
        timestamp=1000,
        timestamp_usec=False,
        window=Window(1000, WINDOW, WINDOW, 65535, 1000),
        options=Options(nodelay=True, congestion="reno"),
    )
    backend = TcpRepair()
    sock = backend.restore_fresh(snapshot, None)
    sock.setsockopt(socket.SOL_SOCKET, kernel.SO_SNDBUFFORCE, WINDOW)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it ends at once, or the next could not begin
    backend.thaw(sock)
    return sock


def one(daemon: str, side: str, protocol: str, size: int) -> dict[str, Any]:
    """One row."""
    udp, loopback = protocol == "udp", protocol == "tcp over loopback"
    with line(SINKS, udp=False) if loopback else card(SINKS, udp=udp) as made, source(udp=udp) as (encoder, relay_end):
        for sock in made.sockets[SINKS:]:
            sock.setsockopt(socket.SOL_SOCKET, kernel.SO_RCVBUFFORCE, 1 << 20)  # nobody reads
        gone = _left_the_card()
        with relay(side, daemon, made, relay_end):
            _feed(encoder, size, WARM_UP)
            spent = [_feed(encoder, size, 1) for _ in range(PIECES)]
            whole = [_received(sock) if loopback else _sent(sock) for sock in made.sockets[SINKS if loopback else 0 :]]
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


def _received(sock: socket.socket) -> int:
    return _queued(sock, _FIONREAD)


def _sent(sock: socket.socket) -> int:
    """Bytes that have left a socket and that nobody has acknowledged."""
    return _queued(sock, _SIOCOUTQ) - _queued(sock, _SIOCOUTQNSD) if sock.type == socket.SOCK_STREAM else 0


def _queued(sock: socket.socket, which: int) -> int:
    """Bytes in a socket (tcp(7))."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), which, b"\0\0\0\0"), "little")


def _left_the_card() -> int:
    """Packets."""
    return int(Path("/sys/class/net/card0/statistics/tx_packets").read_text())


def main() -> None:
    _, _, daemon, cases = sys.argv
    subprocess.run(["sysctl", "-q", "-w", "kernel.sched_schedstats=1"], check=False)
    subprocess.run(["ip", "link", "add", "card0", "type", "dummy"], check=True)
    subprocess.run(["sysctl", "-q", "-w", "net.ipv6.conf.card0.disable_ipv6=1"], check=True)  # it would speak by itself
    for words in (
        "link set card0 multicast off up",
        "address add 10.99.0.1/32 dev card0",
        f"route add 10.99.0.0/16 dev card0 initcwnd {WINDOW // 1448}",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    subprocess.run(["sysctl", "-q", "-w", "net.ipv4.tcp_early_retrans=0"], check=True)  # it would ask for an answer sooner
    counted.tell({"rows": [one(daemon, *case) for case in json.loads(cases)]})


if __name__ == "__main__":
    main()
