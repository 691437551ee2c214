# SPDX-License-Identifier: Apache-2.0
"""Many receivers of datagrams in one process: `python -m tests.namespaces.udp_receivers ADDRESS FIRST_PORT COUNT`.

Says "ready", reads until standard input ends, then prints one JSON line for each group of receivers that got the same datagrams:
how many they are, how many datagrams and bytes, their SHA-256, and from which addresses they came."""

from __future__ import annotations

import hashlib
import json
import selectors
import socket
import sys
from collections import Counter
from typing import Any

from guest_agent.handoff import kernel


def main() -> None:
    address, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    watch = selectors.EpollSelector()
    watch.register(sys.stdin, selectors.EVENT_READ)
    got: list[dict[str, Any]] = []
    for port in range(first, first + count):
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, kernel.SO_RCVBUFFORCE, 4 << 20)
        sock.bind((address, port))
        sock.setblocking(False)
        got.append({"digest": hashlib.sha256(), "datagrams": 0, "bytes": 0, "from": set()})
        watch.register(sock, selectors.EVENT_READ, got[-1])
    print("ready", flush=True)
    while True:
        for key, _ in watch.select():
            if key.data is None:
                report(got)
                return
            take(key.fileobj, key.data)  # type: ignore[arg-type]


def take(sock: socket.socket, record: dict[str, Any]) -> None:
    """What has come."""
    for _ in range(16):
        try:
            data, sender = sock.recvfrom(65536)
        except BlockingIOError:
            return
        record["digest"].update(data)
        record["datagrams"] += 1
        record["bytes"] += len(data)
        record["from"].add(sender[0])


def report(got: list[dict[str, Any]]) -> None:
    """The groups."""
    groups = Counter((r["digest"].hexdigest(), r["datagrams"], r["bytes"], tuple(sorted(r["from"]))) for r in got)
    for (digest, datagrams, size, senders), count in groups.items():
        print(json.dumps({"count": count, "sha256": digest, "datagrams": datagrams, "bytes": size, "from": senders}))


if __name__ == "__main__":
    main()
