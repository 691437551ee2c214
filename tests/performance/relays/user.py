# SPDX-License-Identifier: Apache-2.0
"""The `user` engine alone, on descriptors that its parent made.

    python -m tests.performance.relays.user relay SOURCE FIRST COUNT BUDGET_MS
    python -m tests.performance.relays.user flood SECONDS FIRST COUNT BYTES

Prints one JSON line when it is ready: bytes of memory that each sink took; when it ends, another: its counts."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import sys
from dataclasses import asdict

from hypervisor_svc import fanout
from hypervisor_svc.schedule import Schedule
from hypervisor_svc.splice import Counts, SessionOptions, SinkOptions
from hypervisor_svc.splice_user import UserEngine, UserSession


def resident() -> int:
    """Bytes of this process (proc(5), statm)."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def take(session: UserSession, first: int, count: int) -> list[socket.socket]:
    """Make sinks of the descriptors, and tell what each cost."""
    before = resident()
    socks = [socket.socket(fileno=fd) for fd in range(first, first + count)]
    for sock in socks:
        session.add_sink(sock, SinkOptions(), lambda *_: None)
    print(json.dumps({"memory_per_sink": (resident() - before) / count, "native": fanout.NATIVE}), flush=True)
    return socks


async def relay(source: int, first: int, count: int, budget: int) -> Counts:
    """Until the source ends, or somebody closes standard input."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    loop.add_reader(0, lambda: None if over.done() else over.set_result(None))
    engine = UserEngine(Schedule())
    with socket.socket(fileno=source) as sock:
        session = engine.begin(sock, SessionOptions(budget_ms=budget), owner="vm", level=1, on_end=lambda _: None)
        take(session, first, count)
        await over
        counts = session.status().counts
        session.close()
    return counts


async def flood(seconds: float, first: int, count: int, size: int) -> Counts:
    """A source that always has the next entry when the sinks have the last."""
    loop = asyncio.get_running_loop()
    near, far = socket.socketpair()
    engine = UserEngine(Schedule())
    session = engine.begin(near, SessionOptions(entry_bytes=size), owner="vm", level=1, on_end=lambda _: None)
    take(session, first, count)
    block, end = bytes(size), loop.time() + seconds
    while loop.time() < end:
        session.take([block])
        (group,) = session._groups.values()
        for _ in range(10_000):
            await asyncio.sleep(0)
            if group.has_everything():
                break
    counts = session.status().counts
    session.close()
    near.close()
    far.close()
    return counts


def main() -> None:
    what, *numbers = sys.argv[1:]
    one, first, count, last = (int(number) for number in numbers)
    counts = asyncio.run(relay(one, first, count, last) if what == "relay" else flood(one, first, count, last))
    print(json.dumps(asdict(counts)), flush=True)


if __name__ == "__main__":
    main()
