# SPDX-License-Identifier: Apache-2.0
"""Nonsense for the module, for as long as you like: `python -m tests.host_module.omss.fuzz --minutes 10`, in a VM with the module
(`./run debug-kernel`). Random and mutated options on all kinds of sockets and descriptors, from several threads at once, while
sockets are connected, fed, reset and closed under them. It says nothing of its own about the kernel's health: the kernel's log
does."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable

from hypervisor_svc import omss
from hypervisor_svc.omss import Framing, Join, OnLag
from tests.host_module.omss.streams import KINDS, Link, link
from tests.transport_stream import group

IPPROTO_MPTCP = 262
SO_NO_CHECK, SO_TIMESTAMPING = 11, 37
LOOPBACK = b"\x7f\0\0\1"
_libc = ctypes.CDLL(None)
SETS = (omss.SET_SOURCE, omss.ADD_SINK, omss.REMOVE_SINK, omss.END, omss.BASE + 5)
GETS = (omss.HELLO, omss.GET_STATUS, omss.ADOPT, omss.BASE + 3)
INTERESTING = (0, 1, 2, 3, 7, 8, 187, 188, 4096, 65536, 65537, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
UDP_CORK, UDP_NO_CHECK6_TX, UDP_SEGMENT = 1, 101, 103
OPTIONS: tuple[tuple[int, int, int | bytes], ...] = (
    (socket.IPPROTO_IP, socket.IP_OPTIONS, b"\1\1\1\0"),
    (socket.IPPROTO_IP, socket.IP_OPTIONS, b""),
    (socket.IPPROTO_IP, socket.IP_TTL, 3),
    (socket.IPPROTO_IP, socket.IP_TOS, 8),
    (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 8),
    (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 3),
    (socket.IPPROTO_UDP, UDP_CORK, 1),
    (socket.IPPROTO_UDP, UDP_CORK, 0),
    (socket.IPPROTO_UDP, UDP_NO_CHECK6_TX, 1),
    (socket.IPPROTO_UDP, UDP_SEGMENT, 700),
    (socket.IPPROTO_UDP, UDP_SEGMENT, 0),
    (socket.SOL_SOCKET, socket.SO_SNDBUF, 2000),
    (socket.SOL_SOCKET, socket.SO_DONTROUTE, 1),
    (socket.SOL_SOCKET, socket.SO_DONTROUTE, 0),
    (socket.SOL_SOCKET, socket.SO_MARK, 5),
    (socket.SOL_SOCKET, SO_TIMESTAMPING, 0x13),
    (socket.SOL_SOCKET, SO_TIMESTAMPING, 0),
    (socket.SOL_SOCKET, SO_NO_CHECK, 1),
)


class Arena:
    """Sockets that several threads use, and close, as they like."""

    def __init__(self, chosen: random.Random) -> None:
        self.links = [link(chosen.choice(KINDS), buffer=chosen.choice((0, 0, 4096))) for _ in range(12)]
        self.others = [
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            socket.socket(socket.AF_INET6),
            socket.create_server(("127.0.0.1", 0)),
            socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP),
            socket.socket(socket.AF_UNIX),
        ]
        self.calls = self.taken = 0

    def any(self, chosen: random.Random) -> Link:
        """One of the links."""
        return chosen.choice(self.links)

    def door(self, chosen: random.Random) -> socket.socket:
        """Some socket of either end."""
        return chosen.choice((self.any(chosen).near, self.any(chosen).near, self.any(chosen).far, chosen.choice(self.others)))

    def close(self) -> None:
        """What is still open."""
        for one in self.links:
            one.close()
        for sock in self.others:
            sock.close()


def number(chosen: random.Random) -> int:
    """Small, large or at a limit."""
    return chosen.choice((*INTERESTING, chosen.randrange(20), chosen.getrandbits(32)))


def set_source(arena: Arena, chosen: random.Random) -> None:
    """Mostly sensible."""
    omss.set_source(
        arena.door(chosen),
        framing=chosen.choice(list(Framing)),
        ring=chosen.choice((2, 3, 16, 256, number(chosen))),
        entry=chosen.choice((0, 188, 1000, 65536, number(chosen))),
        latency=chosen.choice((0, 0, 1, 30, number(chosen))),
        service_class=chosen.choice((0, 3, 7, number(chosen))),
        copy_below=number(chosen),
        max_sinks=chosen.choice((0, 0, 3)),
        copy=chosen.random() < 0.2,
        detached=chosen.random() < 0.2,
    )


def add_sink(arena: Arena, chosen: random.Random) -> None:
    """Mostly sensible."""
    omss.add_sink(
        arena.door(chosen),
        arena.door(chosen),
        session=chosen.choice((0, 0, newest(arena, chosen), number(chosen))),
        service_class=chosen.randrange(8),
        join=chosen.choice((Join.LATEST, Join.OLDEST, Join.NEXT_SYNC)),
        on_lag=chosen.choice(list(OnLag)),
        lag_soft=chosen.choice((0, 0, 1, 5, number(chosen))),
        lag_hard=chosen.choice((0, 0, 1, 20)),
    )


def newest(arena: Arena, chosen: random.Random) -> int:
    """The id of a session that there may be."""
    found = omss.sessions(arena.door(chosen))
    return chosen.choice(found).id if found else 0


def leave(arena: Arena, chosen: random.Random) -> None:
    """By socket or number, for good or not."""
    call = chosen.choice((omss.remove_sink, omss.halt_sink))
    call(arena.door(chosen), chosen.choice((arena.any(chosen).near, chosen.randrange(1, 8))), session=newest(arena, chosen))


def look(arena: Arena, chosen: random.Random) -> None:
    """At everything."""
    omss.sinks(arena.door(chosen), newest(arena, chosen))
    omss.sink_status(arena.any(chosen).near)


def end(arena: Arena, chosen: random.Random) -> None:
    """A session."""
    if chosen.random() < 0.3:
        omss.end(arena.door(chosen), newest(arena, chosen))


def adopt(arena: Arena, chosen: random.Random) -> None:
    """And close at once."""
    session = newest(arena, chosen)
    omss.adopt(arena.door(chosen), session, sink=chosen.choice((0, 0, 1)), attach=chosen.random() < 0.5).close()


def garbage(arena: Arena, chosen: random.Random) -> None:
    """Any bytes of any length, in either direction; or a good call with some bytes changed."""
    sock = arena.door(chosen)
    if chosen.random() < 0.4:
        omss._get(sock, chosen.choice(GETS), bytearray(chosen.randbytes(chosen.choice((4, 8, 24, 32, 300, 5000)))))
    elif chosen.random() < 0.5:
        sock.setsockopt(socket.IPPROTO_IP, chosen.choice(SETS), chosen.randbytes(chosen.choice((1, 8, 24, 32, 40, 48, 4096))))
    else:
        call = bytearray(omss._ADD_SINK.pack(0, chosen.choice((arena.any(chosen).near.fileno(), -1, 0, 99999)), 0, 0, 0, 0, 0, 0))
        call[chosen.randrange(len(call))] = chosen.randrange(256)
        sock.setsockopt(socket.IPPROTO_IP, omss.ADD_SINK, bytes(call))


def traffic(arena: Arena, chosen: random.Random) -> None:
    """Into a source, or out of a sink."""
    one = arena.any(chosen)
    for _ in range(chosen.randrange(1, 20)):
        one.far.send(chosen.choice((group(6), os.urandom(chosen.choice((1, 188, 1000, 9000))))))
    arena.any(chosen).read()


def configure(arena: Arena, chosen: random.Random) -> None:
    """An option that changes how datagrams leave; or another peer, or none."""
    one = arena.any(chosen)
    sock = one.near
    level, option, value = chosen.choice(OPTIONS)
    if chosen.random() < 0.8:
        sock.setsockopt(level, option, value)
    elif not one.stream:
        peer = bytes(16) if chosen.random() < 0.5 else struct.pack("=HH4s8x", socket.AF_INET, chosen.randrange(1 << 16), LOOPBACK)
        _libc.connect(sock.fileno(), peer, len(peer))  # AF_UNSPEC, which Python has no words for


def break_one(arena: Arena, chosen: random.Random) -> None:
    """Close, reset, half-close or replace one; its place is taken by another."""
    if chosen.random() < 0.8:
        return
    at = chosen.randrange(len(arena.links))
    one = arena.links[at]
    act = chosen.randrange(5)
    if act == 0 and one.stream:
        one.reset()
    elif act == 1:
        one.near.shutdown(chosen.choice((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)))
        return
    elif act == 2 and not one.stream:
        one.near.connect(("::1" if one.near.family == socket.AF_INET6 else "127.0.0.1", arena.any(chosen).far.getsockname()[1]))
        return
    arena.links[at] = link(chosen.choice(KINDS), buffer=chosen.choice((0, 4096)))
    one.close()


ACTS: tuple[Callable[[Arena, random.Random], None], ...] = (
    set_source,
    add_sink,
    add_sink,
    add_sink,
    leave,
    look,
    end,
    adopt,
    garbage,
    garbage,
    traffic,
    traffic,
    traffic,
    configure,
    break_one,
)


def play(arena: Arena, chosen: random.Random, deadline: float) -> None:
    """One of the threads."""
    while time.monotonic() < deadline:
        act = chosen.choice(ACTS)
        arena.calls += 1
        with contextlib.suppress(OSError, ValueError):
            act(arena, chosen)
            arena.taken += act in (set_source, add_sink)


def clean_up() -> None:
    """Detached sessions are nobody's."""
    with socket.socket() as door:
        for session in omss.sessions(door):
            with contextlib.suppress(OSError):
                omss.end(door, session.id)


def main() -> int:
    """Run until the time is up; what was tried is printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    chosen, calls, taken = random.Random(arguments.seed), 0, 0
    while time.monotonic() < deadline:
        arena = Arena(chosen)
        until = min(deadline, time.monotonic() + 3)
        threads = [threading.Thread(target=play, args=(arena, random.Random(chosen.random()), until)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        arena.close()
        clean_up()
        calls, taken = calls + arena.calls, taken + arena.taken
    print(f"{calls} acts, {taken} sources and sinks were taken")
    return 0 if taken else 1


if __name__ == "__main__":
    raise SystemExit(main())
