# SPDX-License-Identifier: Apache-2.0
"""A client that trusts nobody: many keep-alive connections, random requests, every answer compared with the file.

    python -m tests.client --server ADDRESS:PORT --root FOLDER --requests 2000 --connections 50 [--seed N]

Prints one JSON object: requests, bytes, errors (with the first few in words), the longest gap between two reads and the
latencies' p50 and p99 in microseconds. FOLDER is what the server serves: the client reads the truth from it,
and asks for what ends with `.bin`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

TIMEOUT = 20
CHECK_PIECE = 1 << 18


class Reader:
    """Buffered reading from a socket, which notes the longest wait between two pieces."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self.longest_wait = 0.0

    def _more(self) -> None:
        begin = time.perf_counter()
        data = self.sock.recv(CHECK_PIECE)
        self.longest_wait = max(self.longest_wait, time.perf_counter() - begin)
        if not data:
            raise ConnectionError("the server closed in the middle of an answer")
        self.buffer += data

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and header fields (names in lower case) of the next answer; interim answers are skipped."""
        while True:
            while (end := self.buffer.find(b"\r\n\r\n")) < 0:
                self._more()
            lines = self.buffer[:end].decode("latin-1").split("\r\n")
            del self.buffer[: end + 4]
            status = int(lines[0].split(" ")[1])
            if status >= 200:
                pairs = (line.split(":", 1) for line in lines[1:])
                return status, {name.strip().lower(): value.strip() for name, value in pairs}

    def body(self, length: int) -> str:
        """SHA-256 of the next `length` bytes."""
        digest, left = hashlib.sha256(), length
        while left:
            if not self.buffer:
                self._more()
            piece = self.buffer[:left]
            digest.update(piece)
            left -= len(piece)
            del self.buffer[: len(piece)]
        return digest.hexdigest()

    def text(self, length: int) -> bytes:
        """The next `length` bytes."""
        while len(self.buffer) < length:
            self._more()
        data = bytes(self.buffer[:length])
        del self.buffer[:length]
        return data


@dataclass
class Request:
    """What is sent, and what must come back."""

    kind: str
    raw: bytes
    status: int
    path: str = ""
    offset: int = 0
    length: int = 0
    digest: str = ""


@dataclass
class Result:
    """What all connections saw."""

    requests: int = 0
    bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    longest_wait: float = 0.0


class Files:
    """The files below a folder and the hashes of their parts."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.sizes = {
            os.path.relpath(os.path.join(folder, name), root): os.path.getsize(os.path.join(folder, name))
            for folder, _, names in os.walk(root)
            for name in names
            if name.endswith(".bin")
        }
        self._whole: dict[str, str] = {}

    def digest(self, path: str, offset: int, length: int) -> str:
        """SHA-256 of a part of a file."""
        whole = (offset, length) == (0, self.sizes[path])
        if whole and path in self._whole:
            return self._whole[path]
        digest = hashlib.sha256()
        with open(os.path.join(self.root, path), "rb") as file:
            file.seek(offset)
            left = length
            while left and (piece := file.read(min(left, 1 << 20))):
                digest.update(piece)
                left -= len(piece)
        if whole:
            self._whole[path] = digest.hexdigest()
        return digest.hexdigest()


class Maker:
    """Makes random requests. Large files come rarely, so that a run is about requests, not about bytes."""

    def __init__(self, files: Files, host: str, chance: random.Random) -> None:
        self._files, self._host, self._chance = files, host, chance
        paths = sorted(files.sizes)
        self._paths, self._weights = paths, [1.0 / (1 + files.sizes[path] / 300_000) ** 1.5 for path in paths]

    def next(self) -> list[Request]:
        """One request, or several to be sent at once (pipelined)."""
        dice = self._chance.random()
        if dice < 0.10:
            return [self._upload(), self._get()]
        if dice < 0.15:
            return [self._upload()]
        if dice < 0.30:
            return [self._get() for _ in range(self._chance.randint(2, 4))]
        if dice < 0.35:
            return [self._head()]
        return [self._get()]

    def _get(self) -> Request:
        path = self._chance.choices(self._paths, self._weights)[0]
        size = self._files.sizes[path]
        if size > 1 and self._chance.random() < 0.4:
            first = self._chance.randrange(size)
            last = self._chance.randrange(first, size)
            raw = self._raw("GET", path, f"Range: bytes={first}-{last}\r\n")
            return Request("range", raw, 206, path, first, last - first + 1)
        return Request("get", self._raw("GET", path), 200, path, 0, size)

    def _head(self) -> Request:
        path = self._chance.choice(self._paths)
        return Request("head", self._raw("HEAD", path), 200, path, 0, self._files.sizes[path])

    def _upload(self) -> Request:
        body = self._chance.randbytes(self._chance.choice([1, 1000, 70_000, 300_000]))
        raw = self._raw("POST", "upload", f"Content-Length: {len(body)}\r\n") + body
        return Request("upload", raw, 200, digest=hashlib.sha256(body).hexdigest())

    def _raw(self, method: str, path: str, fields: str = "") -> bytes:
        return f"{method} /{path} HTTP/1.1\r\nHost: {self._host}\r\n{fields}\r\n".encode()


class Runner:
    """Runs the requests on several connections, one thread each."""

    def __init__(self, server: tuple[str, int], files: Files, *, requests: int, seed: int) -> None:
        self._server, self._files, self._left, self._seed = server, files, requests, seed
        self._lock = threading.Lock()
        self.result = Result()

    def run(self, connections: int) -> None:
        """Until all requests are done; errors are collected, not raised."""
        threads = [threading.Thread(target=self._connection, args=(number,)) for number in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _connection(self, number: int) -> None:
        maker = Maker(self._files, self._server[0], random.Random(self._seed * 1000 + number))
        while self._more():
            name = f"connection {number}"
            try:
                with socket.create_connection(self._server, timeout=TIMEOUT) as sock:
                    name = f"connection {number} (port {sock.getsockname()[1]})"
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._serve_out(sock, maker)
            except (OSError, ValueError, AssertionError) as error:
                with self._lock:
                    self.result.errors.append(f"{name}: {error!r}")

    def _more(self) -> bool:
        with self._lock:
            return self._left > 0

    def _take(self, count: int) -> None:
        with self._lock:
            self._left -= count

    def _serve_out(self, sock: socket.socket, maker: Maker) -> None:
        reader = Reader(sock)
        while self._more():
            requests = maker.next()
            self._take(len(requests))
            begin = time.perf_counter()
            sender = threading.Thread(target=sock.sendall, args=(b"".join(r.raw for r in requests),))
            sender.start()
            for request in requests:
                self._check(reader, request)
            sender.join()
            with self._lock:
                self.result.latencies.append(time.perf_counter() - begin)
                self.result.longest_wait = max(self.result.longest_wait, reader.longest_wait)

    def _check(self, reader: Reader, request: Request) -> None:
        status, fields = reader.head()
        length = int(fields.get("content-length", "0"))
        what = f"{request.kind} {request.path} [{request.offset}+{request.length}]"
        assert status == request.status, f"{what}: status {status}"
        if request.kind == "upload":
            answer = json.loads(reader.text(length))
            assert answer["sha256"] == request.digest, f"{what}: the upload arrived damaged"
        else:
            assert length == request.length, f"{what}: length {length}"
        if request.kind in ("get", "range"):
            expected = self._files.digest(request.path, request.offset, request.length)
            assert reader.body(length) == expected, f"{what}: wrong bytes"
        with self._lock:
            self.result.requests += 1
            self.result.bytes += request.length if request.kind in ("get", "range") else 0
            self.result.kinds[request.kind] += 1


def report(result: Result, seconds: float) -> dict[str, Any]:
    """The JSON object that is printed."""
    latencies = sorted(result.latencies) or [0.0]
    return {
        "requests": result.requests,
        "bytes": result.bytes,
        "kinds": dict(result.kinds),
        "errors": len(result.errors),
        "first_errors": result.errors[:20],
        "seconds": round(seconds, 3),
        "p50_us": round(latencies[len(latencies) // 2] * 1e6),
        "p99_us": round(latencies[int((len(latencies) - 1) * 0.99)] * 1e6),
        "longest_wait_ms": round(result.longest_wait * 1e3, 1),
    }


def make_content(root: str, sizes: tuple[int, ...]) -> None:
    """Random files `SIZE.bin` below `root`."""
    os.makedirs(root, exist_ok=True)
    for size in sizes:
        with open(os.path.join(root, f"{size}.bin"), "wb") as file:
            for at in range(0, size, 1 << 20):
                file.write(os.urandom(min(1 << 20, size - at)))


def main() -> int:
    """Entry point; exit status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    host, port = arguments.server.rsplit(":", 1)
    runner = Runner((host.strip("[]"), int(port)), Files(arguments.root), requests=arguments.requests, seed=arguments.seed)
    begin = time.perf_counter()
    runner.run(arguments.connections)
    print(json.dumps(report(runner.result, time.perf_counter() - begin)))
    return 1 if runner.result.errors else 0


if __name__ == "__main__":
    sys.exit(main())
