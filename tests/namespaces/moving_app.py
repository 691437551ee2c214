# SPDX-License-Identifier: Apache-2.0
"""An application in the guest whose relay goes on when the guest leaves its host and comes back; what it saw, as JSON lines.

    python -m tests.namespaces.moving_app FILE PORT COUNT

A growing file on the share to COUNT clients that connect to PORT, each from where the file begins. Ends with its standard input."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from dataclasses import asdict
from typing import Any

from guest_agent import offload


async def serve(path: str, port: int, count: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    with open(path, "rb") as file:
        relay = await offload.publish(file, framing="mpegts", entry_bytes=1316, ring_entries=65536, budget_ms=20)
    print(json.dumps({"path": relay.path, "reason": relay.reason}), flush=True)
    sinks = []
    with socket.create_server(("", port), backlog=count) as listener:
        listener.setblocking(False)
        for _ in range(count):
            client, _ = await loop.sock_accept(listener)
            client.setblocking(False)
            sinks.append((client, await relay.add_sink(client, join="oldest")))
    print(json.dumps({"sinks": len(sinks)}), flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    still = sum(not sink.over for _, sink in sinks)
    await relay.close()
    endings = [asdict(await sink.wait()) for _, sink in sinks]
    for client, _ in sinks:
        client.close()
    return {"still": still, "over": await relay.over, "endings": endings}


def main() -> None:
    path, port, count = sys.argv[1:]
    print(json.dumps(asyncio.run(serve(path, int(port), int(count)))), flush=True)


if __name__ == "__main__":
    main()
