# SPDX-License-Identifier: Apache-2.0
"""Whole connections, both ends frozen, go from one kernel to another: what one machine gives, another takes, and there the two ends
speak with each other.

    python -m tests.host_module.socket_offload.across give            prints the snapshots
    python -m tests.host_module.socket_offload.across take FILE       reads what was printed; exit status 0 if every byte was there

Each end is extracted by one backend and restored by another, in every combination that can move what is in it."""

from __future__ import annotations

import base64
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guest_agent.handoff import kernel
from guest_agent.handoff.backend import Backend, SocketOffload, TcpRepair
from guest_agent.handoff.snapshot import Snapshot, decode, encode
from tests.guest_agent.handoff.loopback import KINDS
from tests.host_module.socket_offload.connections import Pair, connected, exchange, own_network, put, receive_all

MARK = "CONNECTION "
STATES = {"ESTABLISHED": kernel.ESTABLISHED, "CLOSE_WAIT": kernel.CLOSE_WAIT, "FIN_WAIT1": kernel.FIN_WAIT1}
CELLS = [
    *itertools.product(sorted(KINDS), ("tcp_repair",), ("ESTABLISHED",), ("receive", "unacked", "unsent")),
    *itertools.product(sorted(KINDS), ("socket_offload",), ("ESTABLISHED",), ("receive", "unacked", "unsent", "out-of-order")),
    *itertools.product(sorted(KINDS), ("socket_offload",), ("CLOSE_WAIT", "FIN_WAIT1"), ("receive", "unacked")),
]
"""Kind of addresses, who extracts, state and queue of the server's end."""


def takers(state: str, data: str) -> list[str]:
    """Who can restore that, with all that is in it."""
    return ["socket_offload"] if state != "ESTABLISHED" or data == "out-of-order" else ["tcp_repair", "socket_offload"]


def give() -> int:
    """Print every connection."""
    backends: dict[str, Backend] = {"tcp_repair": TcpRepair(), "socket_offload": SocketOffload()}
    for kind, giver, state, data in CELLS:
        with own_network(), connected(kind) as pair:
            put(pair, STATES[state], data)
            pair.cure()
            ends = []
            for sock, backend in ((pair.server, backends[giver]), (pair.client, backends["socket_offload"])):
                sock.setblocking(False)  # else Python waits for something to read before it peeks into the send queue
                ends.append(backend.take(sock, None))
            print(MARK + json.dumps({"cell": [kind, giver, state, data], **packed_pair(pair), "ends": list(map(packed, ends))}))
    return 0


def packed_pair(pair: Pair) -> dict[str, str]:
    """What each end has written and the other not read yet."""
    return {name: base64.b64encode(getattr(pair, name)).decode() for name in ("to_client", "to_server")}


def packed(snapshot: Snapshot) -> list[Any]:
    """As on the channel."""
    header, body = encode(snapshot)
    return [header, base64.b64encode(body).decode()]


def given(text: str) -> Iterator[dict[str, Any]]:
    """What `give` printed, in whatever else was printed."""
    return (json.loads(line.removeprefix(MARK)) for line in text.splitlines() if line.startswith(MARK))


def take(file: Path) -> int:
    """Bring every connection to life, by each backend that can."""
    backends: dict[str, Backend] = {"tcp_repair": TcpRepair(), "socket_offload": SocketOffload()}
    count = 0
    for found in given(file.read_text(encoding="utf-8")):
        _, _, state, data = found["cell"]
        server, client = (decode(header, base64.b64decode(body)) for header, body in found["ends"])
        for name in takers(state, data):
            with own_network():
                live(backends[name], backends["socket_offload"], server, client, found)
            count += 1
            print(f"{os.uname().release}: {' '.join(found['cell'])}, restored by {name}")
    print(f"{count} connections went on")
    return 0 if count else 1


def live(backend: Backend, other: Backend, server: Snapshot, client: Snapshot, found: dict[str, Any]) -> None:
    """Restore both ends, thaw them, and hear every byte that was on its way, and more in both directions."""
    to_client, to_server = (base64.b64decode(found[name]) for name in ("to_client", "to_server"))
    _, _, state, data = found["cell"]
    pair = Pair(backend.restore_fresh(server, None), other.restore_fresh(client, None), to_client, to_server)
    with pair.server, pair.client:
        for sock in (pair.client, pair.server):
            sock.settimeout(20)
        other.thaw(pair.client)
        backend.thaw(pair.server)
        backend.send_unsent(pair.server, server)
        if data == "out-of-order":
            pair.client.sendall(to_server)
        receive_all(pair)
        if state == "ESTABLISHED":
            exchange(pair)
        elif state == "CLOSE_WAIT":
            assert pair.server.recv(1) == b"", "the client had closed"
            pair.server.sendall(b"the rest")
            assert pair.client.recv(100) == b"the rest"
        else:
            assert pair.client.recv(1) == b"", "the server had closed"
            pair.client.sendall(b"the next request")
            assert pair.server.recv(100) == b"the next request"


if __name__ == "__main__":
    sys.exit(give() if sys.argv[1] == "give" else take(Path(sys.argv[2])))
