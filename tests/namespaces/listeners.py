# SPDX-License-Identifier: Apache-2.0
"""Many listeners of a live stream in one process: `python -m tests.namespaces.listeners ADDRESS PORT PATH COUNT`.

Connects all, then says "ready" and reads until the streams end or standard input does; then one JSON line for each group of
listeners that got the same bytes: how many they are, how many bytes, and their SHA-256. With `--from TEXT` a listener's hash
begins where TEXT first occurs: those that join at different moments are comparable."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Listener:
    """What one has got so far."""

    begin: bytes
    digest: Any = field(default_factory=hashlib.sha256)
    size: int = 0
    error: str = ""
    body: bool = False
    _head: bytes = b""

    def take(self, data: bytes) -> None:
        if not self.body:
            self._head += data
            at = self._head.find(b"\r\n\r\n" if not self.begin else self.begin)
            if at < 0:
                return
            data, self._head, self.body = self._head[at + (0 if self.begin else 4) :], b"", True
        self.digest.update(data)
        self.size += len(data)


async def listen(options: argparse.Namespace, listener: Listener, connected: asyncio.Semaphore) -> None:
    request = f"GET {options.path} HTTP/1.0\r\nHost: x\r\n\r\n".encode()
    try:
        async with connected:
            reader, writer = await asyncio.open_connection(options.address, options.port, limit=1 << 16)
            writer.write(request)
            first = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in first.split(b"\r\n")[0]:
            listener.error = first.split(b"\r\n")[0].decode()
        listener.take(first)
        options.here += 1
        if options.here == options.count:
            print("ready", flush=True)
        while data := await reader.read(1 << 18):
            listener.take(data)
        writer.close()
    except (OSError, asyncio.IncompleteReadError) as error:
        listener.error = f"{type(error).__name__}: {error}"


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("count", type=int)
    parser.add_argument("--from", dest="begin", default="")
    options = parser.parse_args()
    options.here = 0
    listeners = [Listener(options.begin.encode()) for _ in range(options.count)]
    gate = asyncio.Semaphore(50)
    tasks = [asyncio.create_task(listen(options, listener, gate)) for listener in listeners]
    stop = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.wait([asyncio.gather(*tasks), stop], return_when=asyncio.FIRST_COMPLETED)
    groups = Counter((one.size, one.digest.hexdigest(), one.error) for one in listeners)
    for (size, digest, error), count in groups.items():
        print(json.dumps({"count": count, "size": size, "sha256": digest, "error": error}), flush=True)
    os._exit(0)  # a thread may still wait for standard input


if __name__ == "__main__":
    asyncio.run(main())
