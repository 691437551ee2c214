# SPDX-License-Identifier: Apache-2.0
"""Nonsense for the module, for as long as you like: `python -m tests.host_module.socket_offload.fuzz --minutes 10`, in a VM with
the module (`./run debug-kernel`). Random and mutated blobs, random calls on all kinds of descriptors (of this and of another
network namespace), calls at once on one socket beside an application that does as it likes, and a close during each call. It says
nothing of its own about the kernel's health: the kernel's log does."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

from guest_agent.handoff import kernel, socket_offload
from guest_agent.handoff.errors import NotMovable
from guest_agent.handoff.snapshot import Snapshot
from guest_agent.handoff.socket_offload import Device, pack
from tests.guest_agent.handoff.loopback import KINDS
from tests.host_module.socket_offload.connections import Pair, connected, own_network

FIXED = socket_offload._SNAPSHOT.size + socket_offload._WARM.size
SIZES = {call: call >> 16 & 0x3FFF for call in (socket_offload.FREEZE_EXPORT, socket_offload.IMPORT, socket_offload.THAW)}
CALLS = (socket_offload.FREEZE_EXPORT, socket_offload.IMPORT, socket_offload.THAW, socket_offload.ABORT, 0xC018B5FF)
IPV6_ADDRFORM = 1
QUIET = (NotMovable, OSError, ValueError)


def mutated(chosen: random.Random, good: bytes) -> bytes:
    """A blob with a few other bytes, or cut short."""
    blob = bytearray(good)
    for _ in range(chosen.choice((1, 1, 2, 8, 40))):
        blob[chosen.randrange(len(blob))] = chosen.choice((0, 1, 127, 128, 255, chosen.randrange(256)))
    if chosen.random() < 0.1:
        del blob[chosen.randrange(1, len(blob)) :]
    return bytes(blob)


def noise(chosen: random.Random) -> bytes:
    """Random bytes; most begin with a size and flags that let the rest be looked at."""
    blob = bytearray(chosen.randbytes(chosen.choice((0, 3, 4, 100, 500, 2000, 70_000))))
    if chosen.random() < 0.8:
        blob[:8] = struct.pack("=II", chosen.choice((8, 64, len(blob), FIXED)), chosen.choice((0, 0x87, 0xFFF, 0xFFFFFFFF)))
    return bytes(blob)


def try_blob(device: Device, chosen: random.Random, blob: bytes) -> bool:
    """Into a new socket; if it is taken, the connection is used and closed. Whether it was."""
    with socket.socket(chosen.choice((socket.AF_INET, socket.AF_INET6)), socket.SOCK_STREAM) as sock:
        try:
            device.import_blob(sock, blob, options=chosen.random() < 0.5)
        except QUIET:
            return False
        with contextlib.suppress(*QUIET):
            if chosen.random() < 0.5:
                device.thaw(sock)
                sock.setblocking(False)
                sock.send(b"x")
                sock.recv(100)
            device.freeze_export(sock)
    return True


@contextlib.contextmanager
def descriptors() -> Iterator[list[int]]:
    """Of everything that is no connection, and of one that is."""
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(connected("ipv4"))
        with own_network():
            foreign = stack.enter_context(connected("ipv6"))
        others = [
            stack.enter_context(made)
            for made in (
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
                socket.socket(socket.AF_UNIX),
                socket.create_server(("127.0.0.1", 0)),
                socket.socket(),
                socket.socket(socket.AF_INET6),
                socket.socket(socket.AF_INET, socket.SOCK_STREAM, kernel.IPPROTO_MPTCP),
            )
        ]
        sockets = (pair.server, pair.client, foreign.server, foreign.client, *others)
        closed = os.dup(pair.server.fileno())
        os.close(closed)
        yield [*(sock.fileno() for sock in sockets), closed, 0, -1, 99999]


def try_calls(device: Device, chosen: random.Random, count: int) -> None:
    """Any number, any bytes or zeros, on any descriptor: half of them of the right size."""
    with descriptors() as found:
        for _ in range(count):
            number = chosen.choice(CALLS)
            size = SIZES.get(number, 16) if chosen.random() < 0.5 else chosen.choice((0, 4, 16, 32, 56, 64, 1 << 20))
            rest = chosen.randbytes(56) if chosen.random() < 0.5 else bytes(56)
            call = bytearray(struct.pack("=Ii", size, chosen.choice(found)) + rest)
            if number in (socket_offload.FREEZE_EXPORT, socket_offload.IMPORT) and chosen.random() < 0.5:
                call[8:16] = struct.pack("=iI", -1, chosen.choice((0, 1, 2, 3)))  # no filter
            with contextlib.suppress(OSError):
                fcntl.ioctl(device.fileno(), number, call)


def behave(sock: socket.socket, chosen: random.Random) -> None:
    """What an application may do with its socket at any time."""
    options = (socket.TCP_NODELAY, socket.TCP_CORK, socket.TCP_USER_TIMEOUT)
    act = chosen.choice(
        (
            lambda: sock.send(b"y", socket.MSG_DONTWAIT),
            lambda: sock.recv(100, socket.MSG_DONTWAIT),
            lambda: sock.shutdown(socket.SHUT_WR),
            lambda: sock.setsockopt(socket.IPPROTO_TCP, chosen.choice(options), chosen.choice((0, 1))),
            lambda: sock.setsockopt(socket.IPPROTO_TCP, kernel.TCP_ULP, b"tls"),
            lambda: sock.setsockopt(socket.IPPROTO_IPV6, IPV6_ADDRFORM, socket.AF_INET),
            lambda: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, chosen.choice((b"bbr", b"reno", b"cubic"))),
            lambda: kernel.disconnect(sock.fileno()),
            lambda: sock.listen(),
            lambda: sock.connect_ex(("127.0.0.1", 9)),
        )
    )
    with contextlib.suppress(OSError):
        sock.setblocking(False)
        act()


def disturb(pair: Pair, snapshot: Snapshot, chosen: random.Random, *, close: bool) -> None:
    """One of several that freeze, thaw and import at once; one of them may close."""
    mine = Device()
    for _ in range(20):
        call = chosen.choice((mine.freeze_export, mine.thaw, mine.abort, lambda sock: mine.import_into(sock, snapshot)))
        with contextlib.suppress(*QUIET):
            call(pair.server)
        if chosen.random() < 0.1:
            behave(pair.server, chosen)
        if close and chosen.random() < 0.02:
            pair.server.close()
    mine.close()


def try_at_once(device: Device, chosen: random.Random) -> None:
    """Four threads on one socket."""
    with connected(chosen.choice(sorted(KINDS))) as pair:
        pair.hear(os.urandom(3000))
        snapshot = device.freeze_export(pair.server)
        device.abort(pair.server)
        seeds = [random.Random(chosen.random()) for _ in range(4)]
        threads = [
            threading.Thread(target=disturb, args=(pair, snapshot, seed), kwargs={"close": number == 0})
            for number, seed in enumerate(seeds)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def try_close(device: Device, chosen: random.Random) -> None:
    """The last descriptor is closed during each of the calls: the call is the last who knows the socket."""
    for name in ("freeze_export", "import", "thaw", "abort"):
        with connected(chosen.choice(sorted(KINDS))) as pair:
            pair.hear(os.urandom(3000))
            snapshot = device.freeze_export(pair.server)
            if name == "freeze_export":
                device.abort(pair.server)
            calls: dict[str, Callable[[socket.socket], object]] = {
                "freeze_export": device.freeze_export,
                "import": functools.partial(device.import_into, snapshot=snapshot),
                "thaw": device.thaw,
                "abort": device.abort,
            }
            closer = threading.Timer(chosen.choice((0, 0, 0.0001, 0.0005, 0.001)), pair.server.close)
            closer.start()
            for _ in range(10):
                with contextlib.suppress(*QUIET):
                    calls[name](pair.server)
            closer.join()


def good_blob(device: Device) -> bytes:
    """Of a connection with something in its queues."""
    with connected("ipv4") as pair:
        pair.hear(os.urandom(500))
        pair.deafen()
        pair.say(os.urandom(500))
        time.sleep(0.02)
        return pack(device.freeze_export(pair.server))


def main() -> int:
    """Run until the time is up; what was tried is printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    deadline = time.monotonic() + 60 * parser.parse_args().minutes
    device, chosen, tried, taken = Device(), random.Random(), 0, 0
    while time.monotonic() < deadline:
        good = good_blob(device)
        for _ in range(500):
            taken += try_blob(device, chosen, mutated(chosen, good))
            try_blob(device, chosen, noise(chosen))
        try_calls(device, chosen, 500)
        for _ in range(5):
            try_at_once(device, chosen)
            try_close(device, chosen)
        tried += 1525
    print(f"{tried} attempts, {taken} blobs were taken")
    return 0 if taken else 1


if __name__ == "__main__":
    raise SystemExit(main())
