# SPDX-License-Identifier: Apache-2.0
"""How sessions, sinks and the module itself end, and what is refused. In a VM with the module."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hypervisor_svc import omss
from hypervisor_svc.omss import Join, SinkState, State
from tests.host_module.omss.streams import (
    KINDS,
    PIECE,
    Link,
    feed,
    link,
    links,
    numbers,
    outcome,
    piece,
    read_all,
    read_bytes,
    references,
    send,
    wait_for,
)
from tests.host_module.omss.test_sessions import nothing_stays as nothing_stays

LOADS = int(os.environ.get("STREAMLIFT_LOADS", "50"))
MODULE = Path("/outside/omss.ko")
IPPROTO_MPTCP, TCP_ULP, IPV6_ADDRFORM = 262, 31, 1
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def process(action: Callable[[], None]) -> Iterator[int]:
    """A process that does it, says so and sleeps; killed in the end. What `action` raises is raised here."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            action()
            os.write(writer, b"done")
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            signal.pause()
            os._exit(0)
    os.close(writer)
    try:
        said = os.read(reader, 4000)
        assert said == b"done", said.decode()
        yield child
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def refused(number: int, call: Callable[..., object], *arguments: object, **options: object) -> None:
    """It fails with this errno."""
    with pytest.raises(OSError) as caught:
        call(*arguments, **options)
    assert caught.value.errno == number, caught.value


def test_the_end_of_the_source() -> None:
    with links(["tcp4", "tcp4", "udp4"]) as (source, *sinks):
        omss.set_source(source.near)
        for sink in sinks:
            omss.add_sink(source.near, sink.near)
        send(source, b"".join(map(piece, range(50))))
        source.far.close()
        wait_for(lambda: omss.status(source.near).state is State.ENDED, "the end")
        read_bytes(sinks, 50 * PIECE)
        assert omss.status(source.near).error == 0 and omss.status(source.near).sinks == 2
        omss.end(source.near)
        sinks[0].near.sendall(b"bye")
        sinks[0].near.close()
        read_all(sinks[:1], lambda one: one.over)
        assert bytes(sinks[0].got).endswith(b"bye")
        refused(errno.ENOENT, omss.status, source.near)


def test_draining() -> None:
    with links(["tcp4"]) as (source,), links(["tcp4"], buffer=4096) as (slow,):
        omss.set_source(source.near, ring=1000)
        omss.add_sink(source.near, slow.near)
        send(source, b"".join(map(piece, range(500))))
        source.far.close()
        wait_for(lambda: omss.status(source.near).state is State.DRAINING, "the beginning of the end")
        read_bytes([slow], 500 * PIECE)
        wait_for(lambda: omss.status(source.near).state is State.ENDED, "the end")
        assert numbers(slow.got) == list(range(500))


def test_a_reset_source() -> None:
    with links(["tcp6", "tcp4"]) as (source, sink):
        omss.set_source(source.near)
        omss.add_sink(source.near, sink.near)
        source.reset()
        wait_for(lambda: omss.status(source.near).state is State.ENDED, "the end")
        assert omss.status(source.near).error == errno.ECONNRESET


def test_a_closed_source_gives_its_sinks_back() -> None:
    for kind in KINDS:
        with links([kind, "tcp4"]) as (source, sink):
            number = omss.set_source(source.near)
            omss.add_sink(source.near, sink.near)
            feed(source, 0, 20)
            wait_for(lambda: outcome(sink).sent.bytes == 20 * PIECE, "all of it is on its way")  # what is not is dropped
            source.near.close()
            wait_for(lambda: not omss.sessions(sink.near), "the session has ended")
            refused(errno.ENOENT, omss.status, sink.near, number)
            read_bytes([sink], 20 * PIECE)
            sink.near.sendall(b"mine")
            read_bytes([sink], 20 * PIECE + 4)
            assert bytes(sink.got[-4:]) == b"mine" and references() == 0


def test_a_process_that_dies_ends_its_session() -> None:
    with links(["udp4", "tcp4"]) as (source, sink), socket.socket() as door:

        def hold() -> None:
            omss.set_source(source.near)
            omss.add_sink(source.near, sink.near)

        with process(hold) as child:
            source.near.close()
            sink.near.close()
            feed_blindly(source, 0, 10)
            read_bytes([sink], 10 * PIECE)
            os.kill(child, signal.SIGSTOP)  # busy or stopped: the stream goes on
            feed_blindly(source, 10, 10)
            read_bytes([sink], 20 * PIECE)
            assert len(omss.sessions(door)) == 1
        wait_for(lambda: not omss.sessions(door), "the session is over")
        read_all([sink], lambda one: one.over)
        assert numbers(sink.got) == list(range(20))


def feed_blindly(source: Link, first: int, count: int) -> None:
    """When the module's end is another process's."""
    for number in range(first, first + count):
        send(source, piece(number))


def test_a_detached_session_lives_on() -> None:
    with links(["tcp4", "tcp4", "tcp6", "udp6"]) as (source, kept, reset, late), socket.socket() as door:

        def hold() -> None:
            omss.set_source(source.near, detached=True)
            omss.add_sink(source.near, kept.near)
            omss.add_sink(source.near, reset.near)

        with process(hold):
            for one in (source, kept, reset):
                one.near.close()
            feed_blindly(source, 0, 10)
            read_bytes([kept], 10 * PIECE)
        feed_blindly(source, 10, 10)
        read_bytes([kept], 20 * PIECE)
        (session,) = omss.sessions(door)
        assert session.source.flags == omss.DETACHED and session.sinks == 2
        reset.reset()
        feed_blindly(source, 20, 1)
        wait_for(lambda: omss.status(door, session.id).sinks == 1, "the sink whose client has gone has left")
        omss.add_sink(door, late.near, session=session.id)
        feed_blindly(source, 21, 9)
        read_bytes([late], 9 * PIECE)
        read_bytes([kept], 30 * PIECE)
        assert numbers(kept.got) == list(range(30)) and numbers(late.got) == list(range(21, 30))

        adopted = omss.adopt(door, session.id)
        sink = omss.adopt(door, session.id, sink=omss.sinks(door, session.id)[0].id)
        assert omss.status(adopted).id == session.id and outcome(Link("tcp4", sink, kept.far)).session == session.id
        refused(errno.ENOENT, omss.adopt, door, session.id, sink=99)
        refused(errno.EINVAL, omss.adopt, door, session.id, sink=1, attach=True)
        adopted.close()
        assert omss.status(door, session.id).state is State.RUNNING
        adopted = omss.adopt(door, session.id, attach=True)
        refused(errno.EINVAL, omss.adopt, door, session.id)
        adopted.close()
        wait_for(lambda: not omss.sessions(door), "it has ended with its source")
        sink.sendall(b"mine")
        sink.close()
        read_all([kept], lambda one: one.over)
        assert bytes(kept.got[30 * PIECE :]) == b"mine"


def test_a_detached_session_is_ended_by_anyone_who_may() -> None:
    with links(["tcp4", "tcp4"]) as (source, sink), socket.socket() as door:
        number = omss.set_source(source.near, detached=True)
        omss.add_sink(source.near, sink.near)
        source.near.close()
        sink.near.close()
        feed_blindly(source, 0, 5)
        read_bytes([sink], 5 * PIECE)
        omss.end(door, number)
        read_all([sink], lambda one: one.over)
        refused(errno.ENOENT, omss.end, door, number)


def test_namespaces() -> None:
    with links(["udp4", "tcp4"]) as (source, sink):
        number = omss.set_source(source.near)

        def elsewhere() -> None:
            assert _libc.unshare(CLONE_NEWNET) == 0
            with socket.socket() as door:
                assert omss.sessions(door) == []
                assert [one.id for one in omss.sessions(door, all_namespaces=True)] == [number]
                omss.add_sink(door, sink.near, session=number)

        with process(elsewhere):
            pass
        feed(source, 0, 5)
        read_bytes([sink], 5 * PIECE)


def test_without_privilege() -> None:
    with links(["udp4", "tcp4"]) as (source, sink):
        omss.set_source(source.near)

        def try_all() -> None:
            os.setuid(65534)
            for call in (
                lambda: omss.hello(sink.near),
                lambda: omss.set_source(sink.near),
                lambda: omss.add_sink(source.near, sink.near),
                lambda: omss.remove_sink(source.near, sink.near),
                lambda: omss.status(source.near),
                lambda: omss.sessions(source.near),
                lambda: omss.end(source.near),
                lambda: omss.adopt(source.near, 1),
            ):
                refused(errno.EPERM, call)

        with process(try_all):
            assert omss.status(source.near).sinks == 0


def test_what_cannot_take_part() -> None:
    with links(["udp4", "tcp4"]) as (source, sink), contextlib.ExitStack() as stack:
        omss.set_source(source.near)
        omss.add_sink(source.near, sink.near)
        refused(errno.EBUSY, omss.add_sink, source.near, sink.near)
        refused(errno.EBUSY, omss.add_sink, source.near, source.near)
        refused(errno.EBUSY, omss.set_source, source.near)
        refused(errno.EBUSY, omss.set_source, sink.near)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        new, datagrams = stack.enter_context(socket.socket()), stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        for other in (server, new, datagrams):
            refused(errno.ENOTCONN, omss.add_sink, source.near, other)
            refused(errno.ENOTCONN, omss.set_source, other)
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        raw = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
        for other in (unix, raw):
            refused(errno.EOPNOTSUPP, omss.add_sink, source.near, other)
        refused(errno.EOPNOTSUPP, omss.set_source, raw)
        mptcp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP))
        mptcp.connect(server.getsockname())
        refused(errno.EOPNOTSUPP, omss.add_sink, source.near, mptcp)
        gro = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        gro.bind(("127.0.0.1", 0))
        gro.setsockopt(socket.SOL_UDP if hasattr(socket, "SOL_UDP") else 17, 104, 1)  # UDP_GRO
        refused(errno.EOPNOTSUPP, omss.set_source, gro)
        with open("/dev/null") as file:
            call = omss._ADD_SINK.pack(0, file.fileno(), 0, 0, 0, 0, 0, 0)
            refused(errno.ENOTSOCK, source.near.setsockopt, socket.IPPROTO_IP, omss.ADD_SINK, call)
        half = stack.enter_context(contextlib.closing(link("tcp4")))
        half.near.shutdown(socket.SHUT_WR)
        refused(errno.ENOTCONN, omss.add_sink, source.near, half.near)


def test_nothing_is_stacked_upon_a_member() -> None:
    with links(["udp4", "tcp4", "tcp4"]) as (source, sink, secret):
        omss.set_source(source.near)
        omss.add_sink(source.near, sink.near)
        with contextlib.suppress(FileNotFoundError):  # a kernel without kTLS
            refused(errno.EEXIST, sink.near.setsockopt, socket.IPPROTO_TCP, TCP_ULP, b"tls")
            secret.near.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
            refused(errno.EOPNOTSUPP, omss.add_sink, source.near, secret.near)
        omss.remove_sink(source.near, sink.near)
        with contextlib.suppress(FileNotFoundError):
            sink.near.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")


def test_a_socket_that_becomes_ipv4_is_let_go() -> None:
    """IPV6_ADDRFORM takes our way to hear of its close away: it leaves all the same, if later."""
    with links(["udp4"]) as (source,), socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        omss.set_source(source.near)
        far = socket.create_connection(("127.0.0.1", server.getsockname()[1]))
        near, _ = server.accept()
        sink = Link("tcp4", near, far)
        omss.add_sink(source.near, near)
        with contextlib.suppress(OSError):
            near.setsockopt(socket.IPPROTO_IPV6, IPV6_ADDRFORM, struct.pack("i", socket.AF_INET))
        feed(source, 0, 5)
        far.setblocking(False)
        read_bytes([sink], 5 * PIECE)
        near.close()
        feed(source, 5, 5)
        wait_for(lambda: all(one.state is SinkState.FAILED for one in omss.sinks(source.near)), "it is out")
        far.close()


def test_calls_that_make_no_sense() -> None:
    with links(["udp4", "tcp4", "tcp4"]) as (source, sink, _):
        for options in (
            {"ring": 1},
            {"ring": omss.MAX_RING + 1},
            {"entry": 187},
            {"entry": omss.MAX_ENTRY + 1},
            {"latency": omss.MAX_LATENCY + 1},
            {"service_class": omss.CLASSES},
            {"framing": 2},
        ):
            refused(errno.EINVAL, omss.set_source, source.near, **options)
        refused(errno.ENOENT, omss.status, source.near)
        refused(errno.ENOENT, omss.add_sink, source.near, sink.near)
        call = omss._SOURCE.pack(*[0] * 8)
        for blob, number in ((b"", errno.EINVAL), (call + b"\0" * 8 + b"x", errno.E2BIG), (call + bytes(9000), errno.EINVAL)):
            refused(number, source.near.setsockopt, socket.IPPROTO_IP, omss.SET_SOURCE, blob)
        source.near.setsockopt(socket.IPPROTO_IP, omss.SET_SOURCE, call[:8] + struct.pack("I", 16))
        assert omss.status(source.near).source.ring == 16
        for options in ({"join": 4}, {"on_lag": 3}, {"service_class": 8}, {"begin": 1}):
            refused(errno.EINVAL, omss.add_sink, source.near, sink.near, **options)
        for what, flags in ((4, 0), (0, 2)):
            refused(errno.EINVAL, omss._ask, source.near, what, omss._SESSION, flags=flags)
        refused(errno.EINVAL, omss._get, source.near, omss.GET_STATUS, bytearray(8))
        refused(errno.ENOENT, omss.sink_status, source.near)
        refused(errno.ENOENT, omss.remove_sink, source.near, sink.near)
        refused(errno.ENOENT, omss.remove_sink, source.near, 1 << 40)
        refused(errno.ENOENT, omss.status, source.near, 1 << 40)
        refused(errno.ENOPROTOOPT, source.near.setsockopt, socket.IPPROTO_IP, omss.BASE + 4, call)


def test_closed_at_every_moment() -> None:
    """While the source never stops: sinks are closed, reset, removed and added again from several threads."""
    stop = threading.Event()
    with links(["udp4", "tcp4"]) as (source, steady):
        omss.set_source(source.near, ring=32)
        omss.add_sink(source.near, steady.near)
        threads = [threading.Thread(target=churn, args=(source, stop, seed)) for seed in range(3)]
        for thread in threads:
            thread.start()
        number = 0
        deadline = time.monotonic() + 6
        while time.monotonic() < deadline:
            feed(source, number, 20)
            number += 20
            read_bytes([steady], number * PIECE)
        stop.set()
        for thread in threads:
            thread.join()
        assert numbers(steady.got) == list(range(number)) and outcome(steady).sent.drops.total == 0
        wait_for(lambda: omss.status(source.near).sinks == 1, "only the steady one is left")


def churn(source: Link, stop: threading.Event, seed: int) -> None:
    """One thread's sinks."""
    chosen = random.Random(seed)
    while not stop.is_set():
        sink = link(chosen.choice(KINDS), buffer=chosen.choice((0, 4096)))
        omss.add_sink(source.near, sink.near, join=Join.OLDEST, service_class=seed)
        time.sleep(chosen.random() * 0.01)
        if chosen.random() < 0.3:
            with contextlib.suppress(BlockingIOError):
                omss.remove_sink(source.near, sink.near)
        if sink.stream and chosen.random() < 0.3:
            sink.reset()
        sink.close()


def test_sources_closed_in_full_flight() -> None:
    for kind in KINDS * 5:
        with links([kind, "tcp4", "udp6"]) as (source, *sinks):
            omss.set_source(source.near, ring=16)
            for sink in sinks:
                omss.add_sink(source.near, sink.near)
            thread = threading.Thread(target=flood, args=(source,))
            thread.start()
            time.sleep(0.01)
            source.near.close()
            thread.join()
            wait_for(lambda: references() == 0, "the session has ended")  # a send may have been the last to let go


def flood(source: Link) -> None:
    """Until it is refused, or enough."""
    with contextlib.suppress(OSError):
        for number in range(200):
            send(source, piece(number))


def test_loads_under_traffic() -> None:
    """The module stays as long as it has sessions, and goes without a trace after."""
    for _ in range(LOADS):
        with links(["tcp4", "tcp4", "udp4"]) as (source, *sinks):
            omss.set_source(source.near, latency=random.choice((0, 5)))
            for sink in sinks:
                omss.add_sink(source.near, sink.near)
            thread = threading.Thread(target=flood, args=(source,))
            thread.start()
            assert delete_module() == errno.EAGAIN
            sinks[0].near.close()
            source.near.close()
            thread.join()
            wait_for(lambda: delete_module() == 0, "it can be unloaded")
            refused(errno.ENOPROTOOPT, omss.hello, sinks[1].near)
            insert_module()
            omss.hello(sinks[1].near)


def delete_module() -> int:
    """Its errno, or 0: delete_module(2)."""
    return 0 if _libc.syscall(176, b"omss", os.O_NONBLOCK) == 0 else ctypes.get_errno()


def insert_module() -> None:
    """finit_module(2)."""
    with MODULE.open("rb") as file:
        assert _libc.syscall(313, file.fileno(), b"", 0) == 0, os.strerror(ctypes.get_errno())
