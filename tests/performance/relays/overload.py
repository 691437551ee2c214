# SPDX-License-Identifier: Apache-2.0
"""Parts of `./run bench overload`, each a process on a processor of its own choice.

    user    [{"source": FD, "first": FD, "count": N, "class": 0..2, "ring": N}, ...]
    omss    the same by the kernel module, whose workers go to processor 0
                                       both say when they are ready, and print, when they are stopped, what each session sent
    feed    SECONDS RATE FD...         numbered, time-stamped pieces to each source; prints how many
    listen  FIRST COUNT FD             takes what comes for COUNT sinks; of FD, which is one of them, the mean latency in seconds
    burden  PERCENT                    takes so much of its processor from everybody, at real-time priority"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

from hypervisor_svc import omss
from hypervisor_svc.schedule import Schedule
from hypervisor_svc.splice import SessionOptions, SinkOptions
from hypervisor_svc.splice_user import UserEngine

PIECE = 1400
STAMP = struct.Struct("=d")


async def user(sessions: list[dict[str, Any]]) -> None:
    """One session of each class; until standard input ends."""
    running = UserEngine(Schedule())
    over = asyncio.get_running_loop().create_future()
    kept: list[Any] = []
    made = []
    for one in sessions:
        source = socket.socket(fileno=one["source"])
        options = SessionOptions(ring_entries=one["ring"])
        session = running.begin(source, options, owner=one["class"], level=one["class"], on_end=lambda _: None)
        kept.append(source)
        made.append(session)
        for fd in range(one["first"], one["first"] + one["count"]):
            sock = socket.socket(fileno=fd)
            session.add_sink(sock, SinkOptions(), lambda *_: None)
            kept.append(sock)
    asyncio.get_running_loop().add_reader(0, lambda: None if over.done() else over.set_result(None))
    print("ready", flush=True)
    await over
    print(json.dumps([session.status().counts.entries for session in made]), flush=True)


def module(sessions: list[dict[str, Any]]) -> None:
    """The same, in the kernel."""
    for process in Path("/proc").glob("[0-9]*/comm"):
        if process.read_text().startswith("omss/"):
            os.sched_setaffinity(int(process.parent.name), {0})
    sources = []
    for one in sessions:
        source = socket.socket(fileno=one["source"])
        omss.set_source(source, ring=one["ring"], service_class=min(3 * one["class"] + 2, omss.CLASSES - 1))
        for fd in range(one["first"], one["first"] + one["count"]):
            sock = socket.socket(fileno=fd)
            omss.add_sink(source, sock, service_class=3 * one["class"] + 1)
            sock.detach()
        sources.append(source)
    print("ready", flush=True)
    sys.stdin.read()
    print(json.dumps([omss.status(source).sent.entries for source in sources]), flush=True)


def feed(seconds: float, rate: float, fds: list[int]) -> None:
    socks = [socket.socket(fileno=fd) for fd in fds]
    begun, sent = time.monotonic(), 0
    while (due := begun + sent / rate) < begun + seconds:
        time.sleep(max(due - time.monotonic(), 0))
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.send(STAMP.pack(time.monotonic()) + bytes(PIECE - STAMP.size))
        sent += 1
    print(sent, flush=True)


def listen(first: int, count: int, watched: int) -> None:
    watch = selectors.EpollSelector()
    watch.register(0, selectors.EVENT_READ)
    room = bytearray(PIECE)
    got, delays, samples = 0, 0.0, 0
    for fd in range(first, first + count):
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        watch.register(sock, selectors.EVENT_READ)
    while True:
        for key, _ in watch.select():
            if key.fd == 0:
                print(json.dumps({"pieces": got, "latency": delays / samples if samples else None}), flush=True)
                os._exit(0)
            with contextlib.suppress(BlockingIOError):
                while key.fileobj.recv_into(room):  # type: ignore[union-attr]
                    got += 1
                    if key.fd == watched:
                        delays += time.monotonic() - STAMP.unpack_from(room)[0]
                        samples += 1


def burden(percent: float) -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    period = 0.02
    print("ready", flush=True)
    while True:
        begun = time.monotonic()
        while time.monotonic() - begun < period * percent / 100:
            pass
        time.sleep(max(begun + period - time.monotonic(), 0))


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "user":
        asyncio.run(user(json.loads(rest[0])))
    elif what == "omss":
        module(json.loads(rest[0]))
    elif what == "feed":
        feed(float(rest[0]), float(rest[1]), [int(fd) for fd in rest[2:]])
    elif what == "listen":
        listen(*(int(word) for word in rest))
    else:
        burden(float(rest[0]))


if __name__ == "__main__":
    main()
