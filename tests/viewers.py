# SPDX-License-Identifier: Apache-2.0
"""Clients that go on until they are told to stop, and compare every byte: what they saw while a VM moved.

    python -m tests.viewers --server ADDRESS --root FOLDER --segments 20 --live film --lives 10 --file film.ts --files 10

A *viewer* fetches the segments of one ladder (a folder of FOLDER), one after another, on one connection, and knows all bytes. A
*sink* listens to a numbered stream of the live server. Each says "here" with its address on standard output when it has its first
byte, and "gone" when it has to complain; the end of standard input, or `--seconds`, ends all, and one JSON object tells what they
saw. Times are of CLOCK_MONOTONIC. `audience.py` starts it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.numbered_stream import Checker

PIECE = 1 << 18
BIN = 0.1
"""Seconds over which bytes are counted."""
NOTABLE = 0.05
"""Seconds without a byte from which on a silence is told."""
PATIENCE = 30.0
GRACE = 4.0
"""Seconds that a client has to finish what it has begun; what was silent all that time has to complain."""
MEDIA_PORT, LIVE_PORT = 80, 8000
SMALL_PIECE, SMALL_BUFFER = 1 << 14, 1 << 15
"""Bytes: what a client that reads at a rate takes at once, and what waits for it in its socket."""


@dataclass
class Seen:
    """What one client saw. `silences`: when it began to wait, and how long, while bytes were due to it; `largest`: the longest."""

    kind: str
    port: int = 0
    requests: int = 0
    bytes: int = 0
    largest: float = 0.0
    silences: list[tuple[float, float]] = field(default_factory=list)
    fault: str = ""
    waits_since: float = 0.0
    packets: int = 0
    gaps: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Run:
    """What all share."""

    options: Any
    over: asyncio.Event = field(default_factory=asyncio.Event)
    bins: Counter[int] = field(default_factory=Counter)
    seen: list[Seen] = field(default_factory=list)


class Client:
    """A connection of one client."""

    def __init__(self, run: Run, seen: Seen) -> None:
        self._run, self._seen = run, seen
        self._loop = asyncio.get_running_loop()
        self._sock = socket.socket()
        self._next = 0.0

    async def connect(self, port: int) -> None:
        """To that port of the server."""
        address = self._run.options.server
        self._sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self._sock.setblocking(False)
        if self._run.options.rate:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        await asyncio.wait_for(self._loop.sock_connect(self._sock, (address, port)), PATIENCE)
        self._seen.port = self._sock.getsockname()[1]

    def _here(self) -> None:
        host, port = self._sock.getsockname()[:2]
        print(f"here {self._seen.kind} {f'[{host}]' if ':' in host else host}:{port}", flush=True)

    async def ask(self, path: str) -> None:
        """Send a request."""
        await self._loop.sock_sendall(self._sock, f"GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    async def receive(self) -> bytes:
        """The next piece. Raises OSError, TimeoutError, ConnectionError at the end."""
        rate = self._run.options.rate
        if rate:
            await asyncio.sleep(self._next - time.monotonic())
        self._seen.waits_since = begin = time.monotonic()
        try:
            receive = self._loop.sock_recv(self._sock, SMALL_PIECE if rate else PIECE)
            data = await asyncio.wait_for(receive, PATIENCE)
        finally:
            self._note(begin, time.monotonic() - begin)
        self._seen.waits_since = 0.0
        if rate:
            self._next = max(self._next, begin) + len(data) / rate
        if not data:
            raise ConnectionError("the server closed the connection")
        if not self._seen.bytes:
            self._here()
        self._seen.bytes += len(data)
        self._run.bins[int(time.monotonic() / BIN)] += len(data)
        return data

    def _note(self, begin: float, waited: float) -> None:
        self._seen.largest = max(self._seen.largest, waited)
        if waited > NOTABLE:
            self._seen.silences.append((begin, round(waited, 3)))

    async def head(self) -> tuple[bytes, bytes]:
        """The head of an answer, and what came with it."""
        got = b""
        while b"\r\n\r\n" not in got:
            got += await self.receive()
        head, _, rest = got.partition(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise ConnectionError(f"the server said {head[:60]!r}")
        return head, rest

    def close(self) -> None:
        """Let go."""
        self._sock.close()


async def view(run: Run, seen: Seen, files: Sequence[Path], number: int) -> None:
    """Segment after segment; not all begin with the same one."""
    root, bodies = run.options.root, [path.read_bytes() for path in files]
    client = Client(run, seen)
    await client.connect(run.options.port)
    with contextlib.closing(client):
        at = number % len(files)
        while True:
            await client.ask(str(files[at].relative_to(root)))
            await _body(client, bodies[at], files[at].name)
            seen.requests += 1
            at = (at + 1) % len(files)
            if run.over.is_set():
                return
            await asyncio.sleep(run.options.pause)


async def _body(client: Client, truth: bytes, name: str) -> None:
    head, data = await client.head()
    if b"content-length: %d" % len(truth) not in head.lower():
        raise ValueError(f"{name}: {head!r}")
    at = 0
    while True:
        if data != truth[at : at + len(data)]:
            raise ValueError(f"{name}: wrong bytes at {at} to {at + len(data)}")
        at += len(data)
        if at == len(truth):
            return
        data = await client.receive()


async def listen(run: Run, seen: Seen, path: str) -> None:
    """A sink, until it is over."""
    client, checker = Client(run, seen), Checker()
    await client.connect(LIVE_PORT)
    with contextlib.closing(client):
        await client.ask(path)
        _, data = await client.head()
        while not run.over.is_set():
            checker.feed(data)
            seen.packets, seen.gaps = checker.packets, checker.gaps
            if checker.fault:
                raise ValueError(checker.fault)
            data = await client.receive()


async def _watched(run: Run, seen: Seen, work: Any) -> None:
    run.seen.append(seen)
    try:
        await work
    except (OSError, TimeoutError, ValueError) as error:
        if not (run.over.is_set() and seen.kind != "viewer"):
            seen.fault = f"{type(error).__name__}: {error}"
            print(f"gone: {seen.kind} {seen.port}: {seen.fault}", flush=True)


def _ladders(root: Path) -> list[list[Path]]:
    return [sorted(folder.glob("*.m4s")) for folder in sorted(root.iterdir()) if any(folder.glob("*.m4s"))]


def _works(run: Run) -> list[Any]:
    options = run.options
    ladders = _ladders(options.root) if options.segments else []
    viewers = [
        _watched(run, seen := Seen("viewer"), view(run, seen, ladders[number % len(ladders)], number // len(ladders)))
        for number in range(options.segments)
    ]
    sinks = [("live", options.live)] * options.lives + [("file", options.file)] * options.files
    return [*viewers, *(_watched(run, seen := Seen(kind), listen(run, seen, path)) for kind, path in sinks)]


async def main() -> int:
    """Entry point; exit status 1 if anybody has to complain."""
    parser = argparse.ArgumentParser(description="clients that watch a VM move")
    parser.add_argument("--server", required=True)
    parser.add_argument("--root", type=Path, default=Path("/nonexistent"))
    parser.add_argument("--segments", type=int, default=0, help="viewers, on the ladders in turn")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two segments of a viewer (%(default)s)")
    parser.add_argument("--port", type=int, default=MEDIA_PORT, help="of the segments (%(default)s)")
    parser.add_argument("--rate", type=float, default=0, help="bytes a second that a client takes; default: all it can get")
    for kind, many in (("live", "lives"), ("file", "files")):
        parser.add_argument(f"--{kind}", default="", help=f"path of the {kind} stream")
        parser.add_argument(f"--{many}", type=int, default=0, help="its sinks")
    parser.add_argument("--seconds", type=float, default=900, help="at most (%(default)s)")
    run = Run(parser.parse_args())
    tasks = [asyncio.create_task(work) for work in _works(run)]
    stop = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.wait([stop], timeout=run.options.seconds)
    run.over.set()
    await asyncio.wait(tasks, timeout=GRACE)
    for seen in run.seen:
        if seen.kind == "viewer" and 0 < seen.waits_since < time.monotonic() - GRACE:
            seen.fault = seen.fault or f"silent for {time.monotonic() - seen.waits_since:.0f} s"
    print(json.dumps({"seen": [asdict(seen) for seen in run.seen], "bins": sorted(run.bins.items()), "bin": BIN}), flush=True)
    os._exit(any(seen.fault for seen in run.seen))  # a thread may still wait for standard input


if __name__ == "__main__":
    asyncio.run(main())
