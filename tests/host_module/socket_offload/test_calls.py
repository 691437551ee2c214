# SPDX-License-Identifier: Apache-2.0
"""The calls themselves: who may, what is refused, what frozen means, and that nothing a caller says hurts the kernel (whose
complaints fail the run, `tests/vm/other_kernel.py`)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guest_agent.handoff import freeze, hold, kernel, socket_offload
from guest_agent.handoff.errors import NotMovable, Reason
from guest_agent.handoff.socket_offload import DEVICE, Device
from tests.guest_agent.handoff.loopback import KINDS, signed
from tests.host_module.socket_offload import fuzz
from tests.host_module.socket_offload.connections import Pair, connected
from tests.namespaces import capture

MODULE = "/outside/socket_offload.ko"
ROUNDS = 3000
LOADS = int(os.environ.get("STREAMLIFT_LOADS", 50))


@pytest.fixture
def device() -> Iterator[Device]:
    opened = Device()
    yield opened
    opened.close()


@pytest.fixture(params=sorted(KINDS))
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with connected(request.param) as made:
        yield made


def exchange(pair: Pair, size: int = 200_000) -> None:
    """Random bytes in both directions."""
    for one, other in ((pair.server, pair.client), (pair.client, pair.server)):
        blob, got = os.urandom(size), b""
        thread = threading.Thread(target=one.sendall, args=(blob,))
        thread.start()
        while len(got) < size:
            got += other.recv(1 << 16)
        thread.join()
        assert got == blob


# Who may.


def test_nothing_works_before_the_handshake() -> None:
    fd = os.open(DEVICE, os.O_RDWR)
    with pytest.raises(PermissionError):
        fcntl.ioctl(fd, socket_offload.THAW, bytearray(16))
    os.close(fd)


def test_another_version_is_refused_and_told_ours(device: Device) -> None:
    fd = os.open(DEVICE, os.O_RDWR)
    call = bytearray(socket_offload._HANDSHAKE.pack(24, 999, 0, 0, 0, 0))
    with pytest.raises(OSError) as error:
        fcntl.ioctl(fd, socket_offload.HANDSHAKE, call)
    assert error.value.errno == errno.EPROTO
    os.close(fd)
    assert device.handshake.version == socket_offload.VERSION


def test_a_longer_structure_of_zeros_is_understood() -> None:
    """A newer program speaks to this module (copy_struct_from_user())."""
    fd = os.open(DEVICE, os.O_RDWR)
    for tail, refused in ((bytes(8), False), (b"\0" * 7 + b"\1", True)):
        call = bytearray(socket_offload._HANDSHAKE.pack(32, socket_offload.VERSION, 0, 0, 0, 0) + tail)
        with pytest.raises(OSError) if refused else contextlib.nullcontext() as error:
            fcntl.ioctl(fd, socket_offload.HANDSHAKE, call)
        assert not refused or error.value.errno == errno.E2BIG  # type: ignore[union-attr]
    os.close(fd)


def test_another_namespace_needs_its_own_right() -> None:
    """CAP_NET_ADMIN is asked for in the namespace of the socket: a root of a user namespace has it there, and not here."""
    with connected("ipv4") as pair:
        os.set_inheritable(pair.server.fileno(), True)
        code = f"""
import ctypes, socket
from guest_agent.handoff.socket_offload import Device
device, sock = Device(), socket.socket(fileno={pair.server.fileno()})
ctypes.CDLL(None).unshare(0x10000000)
try:
    device.freeze_export(sock)
except PermissionError:
    print("refused")
sock.detach()
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, close_fds=False, check=False)
        assert done.stdout == "refused\n", done.stderr


# What is refused.


def reason(device: Device, sock: socket.socket) -> Reason:
    with pytest.raises(NotMovable) as error:
        device.freeze_export(sock)
    return error.value.reason


def test_refusals(device: Device) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram, socket.socket(socket.AF_UNIX) as unix:
        assert (reason(device, datagram), reason(device, unix)) == (Reason.NOT_TCP, Reason.NOT_TCP)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as closed:
        assert (reason(device, listener), reason(device, closed)) == (Reason.NOT_ESTABLISHED, Reason.NOT_ESTABLISHED)
    with open("/dev/null") as file, pytest.raises(NotMovable):
        device.freeze_export(file)  # type: ignore[arg-type]
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, kernel.IPPROTO_MPTCP) as multipath:
        assert reason(device, multipath) is Reason.MPTCP


def test_urgent_data_is_refused(device: Device) -> None:
    with connected("ipv4") as pair:
        pair.client.send(b"!", socket.MSG_OOB)
        time.sleep(0.02)
        assert reason(device, pair.server) is Reason.URGENT_DATA


def test_a_filter_of_the_application_is_not_replaced(device: Device) -> None:
    from guest_agent.handoff.hold import Hold

    with connected("ipv4") as pair, Hold() as keep:
        pair.server.setsockopt(socket.SOL_SOCKET, kernel.SO_ATTACH_BPF, keep.program_fd)
        with pytest.raises(NotMovable) as error:
            device.freeze_export(pair.server, keep.program_fd)
        assert error.value.reason is Reason.SOCKET_FILTER
        device.freeze_export(pair.server, keep.program_fd, own=True)
        device.thaw(pair.server)
        exchange(pair)


def test_a_signed_connection_is_refused(device: Device) -> None:
    with signed() as server:
        assert reason(device, server) is Reason.AUTHENTICATED


def test_frozen_twice_and_thawed_twice(device: Device, pair: Pair) -> None:
    device.freeze_export(pair.server)
    assert reason(device, pair.server) is Reason.NOT_ESTABLISHED
    device.abort(pair.server)
    with pytest.raises(NotMovable):
        device.abort(pair.server)
    exchange(pair)


# What frozen means.


def test_frozen_says_nothing_and_then_goes_on(device: Device, tmp_path: Path) -> None:
    """Unacknowledged data, a keepalive every second, a client that speaks: not one packet while it is frozen."""
    with connected("ipv4") as pair:
        exchange(pair)
        for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1)):
            pair.server.setsockopt(socket.IPPROTO_TCP, option, value)
        pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        pair.deafen()
        pair.say(os.urandom(100_000))
        device.freeze_export(pair.server)
        hold.attach(pair.server, None)
        pair.cure()
        time.sleep(0.05)
        with capture.captured(None, tmp_path / "frozen.pcap", "lo"):
            pair.hear(b"is anybody there?")
            time.sleep(4)
        port = pair.server.getsockname()[1]
        assert [p for p in capture.read(tmp_path / "frozen.pcap") if p.source[1] == port] == []
        with pytest.raises(OSError, match="Invalid argument"):
            pair.server.send(b"x")
        hold.detach(pair.server)
        device.thaw(pair.server)
        got = b""
        while len(got) < len(pair.to_client):
            got += pair.client.recv(1 << 16)
        assert got == pair.to_client
        assert pair.server.recv(100) == b"is anybody there?"
        exchange(pair)
        assert round_trip(pair.server) < 1.0, "the time in which it was frozen is no round trip"


def round_trip(sock: socket.socket) -> float:
    """Seconds (tcpi_rtt)."""
    return int.from_bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 72)[68:], "little") / 1e6


def test_what_came_meanwhile_is_told_to_whoever_waits(device: Device, pair: Pair) -> None:
    """epoll sees what the import put into the receive queue."""
    pair.hear(b"the next request")
    time.sleep(0.02)
    snapshot = device.freeze_export(pair.server)
    empty = replace(snapshot, receive_queue=b"", receive_sequence=snapshot.receive_next)
    device.import_into(pair.server, empty)
    with select.epoll() as watch:
        watch.register(pair.server, select.EPOLLIN | select.EPOLLET)
        watch.poll(0)
        device.import_into(pair.server, snapshot)
        assert watch.poll(1)
    device.thaw(pair.server)
    assert pair.server.recv(100) == b"the next request"
    exchange(pair)


def test_closing_a_frozen_socket_is_silent(device: Device, pair: Pair) -> None:
    device.freeze_export(pair.server)
    pair.server.close()
    pair.client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        pair.client.recv(1)


def test_a_holder_that_dies_leaves_it_frozen(pair: Pair) -> None:
    """It belongs to whoever has the descriptor: another process thaws it."""
    os.set_inheritable(pair.server.fileno(), True)
    code = f"""
import socket
from guest_agent.handoff.socket_offload import Device
Device().freeze_export(socket.socket(fileno={pair.server.fileno()}))
"""
    subprocess.run([sys.executable, "-c", code], close_fds=False, check=True)
    assert freeze.is_frozen(pair.server)
    device = Device()
    device.thaw(pair.server)
    device.close()
    exchange(pair)


# Nothing that a caller says hurts.


def test_the_kernel_alone_refuses_what_contradicts_itself(device: Device) -> None:
    """These blobs never went through Python's checks."""
    with connected("ipv4") as pair:
        pair.hear(b"x" * 100)
        time.sleep(0.02)
        good = device.freeze_export(pair.server)
        window = good.window
        bad: list[dict[str, Any]] = [
            {"state": 2}, {"state": 10}, {"state": 255}, {"mss": 1}, {"send_scale": 15}, {"receive_scale": 200},
            {"fin_unsent": True}, {"fin_read": True}, {"state": 5, "unsent": b"x"}, {"state": 5, "unacked": b"x"},
            {"state": 4, "unsent": b"x"}, {"window": replace(window, snd_wnd=1 << 29, max_window=1)},
            {"window": replace(window, rcv_wnd=1 << 31)},
            {"window": replace(window, rcv_wup=good.receive_next + 5)},
        ]  # fmt: skip
        for change in bad:
            with pytest.raises(NotMovable) as error:
                device.import_into(pair.server, replace(good, **change))
            assert error.value.reason is Reason.BAD_SNAPSHOT, change
        device.import_into(pair.server, good)
        device.thaw(pair.server)
        assert pair.server.recv(1000) == b"x" * 100
        exchange(pair)


def test_random_blobs(device: Device) -> None:
    """Mutated snapshots into new sockets: refused, or a connection that can be used and closed."""
    chosen, good = random.Random(20261121), fuzz.good_blob(device)
    taken = sum(fuzz.try_blob(device, chosen, fuzz.mutated(chosen, good)) for _ in range(ROUNDS))
    assert 0 < taken < ROUNDS


def test_random_calls(device: Device) -> None:
    fuzz.try_calls(device, random.Random(1), ROUNDS)


def test_calls_at_once_on_one_socket(device: Device) -> None:
    chosen = random.Random(2)
    for _ in range(30):
        fuzz.try_at_once(device, chosen)


# Coming and going.


def test_unload_with_a_frozen_socket_outstanding(pair: Pair) -> None:
    """A frozen socket refers to nothing in the module."""
    device = Device()
    device.freeze_export(pair.server)
    device.close()
    subprocess.run(["rmmod", "socket_offload"], check=True)
    assert freeze.is_frozen(pair.server)
    subprocess.run(["insmod", MODULE], check=True)
    device = Device()
    device.thaw(pair.server)
    device.close()
    exchange(pair)


def test_an_open_device_keeps_the_module(device: Device) -> None:
    assert subprocess.run(["rmmod", "socket_offload"], capture_output=True, check=False).returncode != 0


def test_loads_and_unloads_under_traffic() -> None:
    with connected("ipv4") as pair:
        done = threading.Event()

        def traffic() -> None:
            while not done.is_set():
                exchange(pair, 20_000)

        thread = threading.Thread(target=traffic)
        thread.start()
        try:
            for number in range(LOADS):
                subprocess.run(["rmmod", "socket_offload"], check=True)
                subprocess.run(["insmod", MODULE], check=True)
                if number % 20 == 0:
                    with connected("ipv6") as other:
                        device = Device()
                        device.freeze_export(other.server)
                        device.close()
        finally:
            done.set()
            thread.join()
