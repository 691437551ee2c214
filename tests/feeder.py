# SPDX-License-Identifier: Apache-2.0
"""Numbered streams at their rate: to a live server, and into a file that grows.

    python -m tests.feeder --encoder ADDRESS:PORT/PATH --password WORD --file FILE [--seconds N]

Ends with its standard input, or after N seconds. `audience.py` starts it."""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from tests.numbered_stream import group_at

INTERVAL = 0.04
"""Seconds of a group."""
PATIENCE = 60.0
GONE_LIMIT = 15.0


def encoder(target: str, password: str) -> Callable[[bytes], None]:
    """Connect as an encoder does; what sends. Another encoder that has just gone may not be missed at once."""
    until = time.monotonic() + GONE_LIMIT
    while True:
        sock, answer = _connect(target, password)
        if b" 100 " in answer:
            return sock.sendall
        sock.close()
        if b" 409 " not in answer or time.monotonic() > until:
            raise ConnectionError(f"the live server said {answer!r}")
        time.sleep(0.2)


def _connect(target: str, password: str) -> tuple[socket.socket, bytes]:
    place, _, path = target.partition("/")
    host, _, port = place.rpartition(":")
    sock = socket.create_connection((host.strip("[]"), int(port)), PATIENCE)
    words = base64.b64encode(f"source:{password}".encode()).decode()
    fields = f"Authorization: Basic {words}\r\nContent-Type: video/mp2t\r\nExpect: 100-continue\r\n"
    sock.sendall(f"PUT /{path} HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode())
    return sock, sock.recv(4096)


def feed(send: Callable[[bytes], object], over: threading.Event) -> None:
    """A group each INTERVAL; what was late is made up for."""
    begin, index = time.monotonic(), 0
    while not over.is_set():
        send(group_at(index))
        index += 1
        over.wait(begin + index * INTERVAL - time.monotonic())


def main() -> int:
    """Entry point; exit status 1 if a stream broke off."""
    parser = argparse.ArgumentParser(description="numbered streams at their rate")
    parser.add_argument("--encoder", metavar="ADDRESS:PORT/PATH")
    parser.add_argument("--password", default="")
    parser.add_argument("--file")
    parser.add_argument("--seconds", type=float, default=600, help="at most (%(default)s)")
    options = parser.parse_args()
    targets: list[Callable[[bytes], object]] = []
    if options.encoder:
        targets.append(encoder(options.encoder, options.password))
    if options.file:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(options.file)  # what an earlier stream has left has the same numbers
        targets.append(functools.partial(os.write, os.open(options.file, os.O_WRONLY | os.O_CREAT)))
    over, faults = threading.Event(), []

    def run(send: Callable[[bytes], object]) -> None:
        try:
            feed(send, over)
        except OSError as error:
            faults.append(error)
            print(f"feeder: {error}", file=sys.stderr, flush=True)

    for send in targets:
        threading.Thread(target=run, args=(send,), daemon=True).start()
    threading.Timer(options.seconds, lambda: os._exit(2)).start()
    print("ready", flush=True)
    sys.stdin.read()
    over.set()
    os._exit(1 if faults else 0)  # a thread may still wait for a client that does not read


if __name__ == "__main__":
    sys.exit(main())
