# SPDX-License-Identifier: Apache-2.0
"""The client of the benchmarks: closed loop, one keep-alive connection a server, the servers in turn.

    python -m tests.performance.fetch --server offload=10.77.1.2:80 --server baseline=10.77.1.2:81 \
        --path /100000.bin --requests 50 --repeats 10

It does as little as a client can, so that what it measures is the server. Prints a JSON list: one row a block of
`--requests` requests to one server."""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TIMEOUT = 60.0
ROOT = Path(__file__).resolve().parents[2]


class Connection:
    """A keep-alive connection that counts bytes and forgets them."""

    def __init__(self, address: str, path: str) -> None:
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = memoryview(bytearray(1 << 20))
        self._host, self._path = host, path

    def get(self, path: str | None = None) -> tuple[float, float, int]:
        """Seconds from the request to the last byte, the longest wait for a piece, and bytes of body. `path`: another."""
        begin = time.perf_counter()
        self._socket.sendall(f"GET {path or self._path} HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode())
        left, body, before, longest = 1, 0, begin, 0.0
        head = b""
        while left:
            count = self._socket.recv_into(self._buffer)
            now = time.perf_counter()
            longest, before = max(longest, now - before), now
            if not count:
                raise ConnectionError("the server closed in the middle of an answer")
            if body:
                left -= count
                continue
            head += self._buffer[:count].tobytes()
            if (end := head.find(b"\r\n\r\n")) >= 0:
                body = _length(head[:end])
                left = body - (len(head) - end - 4)
        return now - begin, longest, body


def _length(head: bytes) -> int:
    lines = head.split(b"\r\n")
    if b" 200 " not in lines[0]:
        raise ConnectionError(f"the server said {lines[0]!r}")
    return next(int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:"))


def _block(name: str, connection: Connection, repeat: int, requests: int) -> dict[str, Any]:
    begin = time.perf_counter()
    measured = [connection.get() for _ in range(requests)]
    seconds = time.perf_counter() - begin
    return {
        "side": name,
        "repeat": repeat,
        "bytes": sum(size for _, _, size in measured),
        "seconds": seconds,
        "latencies_us": [round(latency * 1e6, 1) for latency, _, _ in measured],
        "longest_waits_us": [round(wait * 1e6, 1) for _, wait, _ in measured],
    }


def measure(
    inside: Callable[..., list[str]], servers: Mapping[str, str], path: str, *, requests: int, repeats: int
) -> list[dict[str, Any]]:
    """Run this program as `inside(*argv)` says (the client's namespace); its rows. Raises RuntimeError."""
    argv = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.performance.fetch", "--path", path]
    for name, address in servers.items():
        argv += ["--server", f"{name}={address}"]
    argv += ["--requests", str(requests), "--repeats", str(repeats)]
    done = subprocess.run(inside(*argv), capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"the client failed: {done.stderr[-2000:]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def megabits(row: Mapping[str, Any]) -> float:
    """The throughput of a block, Mbit/s."""
    return float(row["bytes"] * 8e-6 / row["seconds"])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="fetch one path from several servers in turn")
    parser.add_argument("--server", action="append", required=True, metavar="NAME=ADDRESS:PORT")
    parser.add_argument("--path", required=True)
    parser.add_argument("--requests", type=int, default=50, help="a block")
    parser.add_argument("--repeats", type=int, default=10, help="blocks a server")
    parser.add_argument("--warm-up", type=int, default=3, help="requests to each server that do not count")
    options = parser.parse_args()
    named = (server.split("=", 1) for server in options.server)
    connections = {name: Connection(address, options.path) for name, address in named}
    for name, connection in connections.items():
        _block(name, connection, -1, options.warm_up)
    turns = [(repeat, name) for repeat in range(options.repeats) for name in connections]
    json.dump([_block(name, connections[name], repeat, options.requests) for repeat, name in turns], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
