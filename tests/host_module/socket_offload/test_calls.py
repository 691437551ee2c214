# SPDX-License-Identifier: Apache-2.0
"""The calls themselves: who may, what is refused, what frozen means, and that nothing a caller says hurts the kernel (whose
complaints fail the run, `tests/vm/other_kernel.py`)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from guest_agent.handoff import freeze, hold, kernel, socket_offload
from guest_agent.handoff.errors import NotMovable, Reason
from guest_agent.handoff.snapshot import Endpoint
from guest_agent.handoff.socket_offload import DEVICE, Device
from tests.guest_agent.handoff.loopback import signed
from tests.guest_agent.handoff.samples import contradictions
from tests.host_module.socket_offload import fuzz
from tests.host_module.socket_offload.connections import Pair, connected, exchange, own_network, segment_size, timestamps

MODULE = "/outside/socket_offload.ko"
ROUNDS = 3000
LOADS = int(os.environ.get("STREAMLIFT_LOADS", 20))


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


@pytest.mark.parametrize("call", [socket_offload.FREEZE_EXPORT, socket_offload.IMPORT, socket_offload.THAW, socket_offload.ABORT])
def test_sizes_and_reserved_fields_are_looked_at(call: int, device: Device) -> None:
    """A size below that of version 1 would leave `fd` to chance; one beyond a page is nobody's; what is reserved is zero."""
    size = call >> 16 & 0x3FFF
    tried = [(0, 0, errno.EINVAL), (4, 0, errno.EINVAL), (size - 4, 0, errno.EINVAL), (1 << 20, 0, errno.E2BIG)]
    if call != socket_offload.FREEZE_EXPORT:
        tried.append((size, 1, errno.EINVAL))
    for told, reserved, expected in tried:
        last = reserved.to_bytes(2, "little").rjust(4, b"\0")
        with pytest.raises(OSError) as error:
            fcntl.ioctl(device.fileno(), call, bytearray(struct.pack("=Ii", told, -1) + bytes(size - 12) + last))
        assert error.value.errno == expected, told


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


def test_an_upper_layer_is_refused(device: Device, pair: Pair) -> None:
    """kTLS: on a socket that is to move, and on one that a connection is to enter."""
    empty = device.freeze_export(pair.server)
    pair.server.setsockopt(socket.IPPROTO_TCP, kernel.TCP_ULP, b"tls")
    with pytest.raises(NotMovable) as error:
        device.import_into(pair.server, empty)
    assert error.value.reason is Reason.UPPER_LAYER
    device.abort(pair.server)
    assert reason(device, pair.server) is Reason.UPPER_LAYER


def test_a_socket_of_bpf_is_refused(device: Device) -> None:
    """Bytes may wait in its sockmap, where nobody finds them (sk_psock)."""
    with connected("ipv4") as pair, sockmap(pair.server):
        assert reason(device, pair.server) is Reason.UPPER_LAYER


@contextlib.contextmanager
def sockmap(sock: socket.socket) -> Iterator[None]:
    """The socket is in a BPF_MAP_TYPE_SOCKMAP (bpf(2))."""
    created = hold._bpf(0, struct.pack("=IIII", 15, 4, 4, 1))
    try:
        key, value = ctypes.c_uint32(0), ctypes.c_uint32(sock.fileno())
        hold._bpf(2, struct.pack("=IIQQQ", created, 0, ctypes.addressof(key), ctypes.addressof(value), 0))
        yield
    finally:
        os.close(created)


@pytest.mark.parametrize(("layer", "length"), [(1, 0), (1, 5), (77, 0), (0, 5)])
def test_the_place_of_ktls_is_refused(layer: int, length: int, device: Device, pair: Pair) -> None:
    """What a newer program may put there: refused by its reason, and the socket can take what we know."""
    snapshot = device.freeze_export(pair.server)
    blob = bytearray(socket_offload.pack(snapshot))
    struct.pack_into("=II", blob, socket_offload._SNAPSHOT.size - 8, layer, length)
    with pytest.raises(NotMovable) as error:
        device.import_blob(pair.server, bytes(blob) + bytes(length))
    assert error.value.reason is (Reason.UPPER_LAYER if layer else Reason.BAD_SNAPSHOT)
    if layer:
        with pytest.raises(NotMovable) as error:
            socket_offload.unpack(memoryview(blob))
        assert error.value.reason is Reason.UPPER_LAYER
    device.import_into(pair.server, snapshot)
    device.thaw(pair.server)
    exchange(pair)


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


# Nothing that a caller says hurts.


def test_a_blob_gives_no_larger_buffers_than_anybody_gets(device: Device, pair: Pair) -> None:
    snapshot = device.freeze_export(pair.server)
    large = (1 << 30) - 1
    device.import_into(pair.server, replace(snapshot, options=replace(snapshot.options, send_buffer=large, receive_buffer=large)))
    for name, autotuned, most in ((socket.SO_SNDBUF, "tcp_wmem", "wmem_max"), (socket.SO_RCVBUF, "tcp_rmem", "rmem_max")):
        limits = Path(f"/proc/sys/net/ipv4/{autotuned}").read_text().split()[2], Path(f"/proc/sys/net/core/{most}").read_text()
        assert pair.server.getsockopt(socket.SOL_SOCKET, name) == max(int(limits[0]), 2 * int(limits[1]))
    device.thaw(pair.server)
    exchange(pair)


def test_an_import_that_fails_leaves_an_ordinary_socket(device: Device, pair: Pair) -> None:
    """Closed, not frozen, and without the right to take a port that another has (SK_FORCE_REUSE); it may be tried again."""
    snapshot = device.freeze_export(pair.server)
    nowhere = Endpoint("2001:db8::99" if snapshot.is_ipv6 else "192.0.2.99", 5000)
    with socket.socket(pair.server.family, socket.SOCK_STREAM) as sock, contextlib.closing(pair.server):
        with pytest.raises(OSError) as error:
            device.import_into(sock, snapshot, bind=nowhere)
        assert error.value.errno == errno.EADDRNOTAVAIL
        assert not freeze.is_frozen(sock)
        with socket.socket(sock.family, socket.SOCK_STREAM) as listener:
            listener.bind(("::1" if snapshot.is_ipv6 else "::ffff:127.0.0.1" if sock.family == socket.AF_INET6 else "127.0.0.1", 0))
            listener.listen()
            with pytest.raises(OSError) as error:
                sock.bind(listener.getsockname())
            assert error.value.errno == errno.EADDRINUSE
        pair.server.close()
        device.import_into(sock, snapshot)
        device.thaw(sock)
        pair.server = sock.dup()
        exchange(pair)


def test_segments_fit_whatever_this_machine_thinks_of_timestamps(device: Device) -> None:
    """Their option takes 12 bytes of each: connect(2) reckons with this machine's, the connection goes on with its own."""
    with own_network():
        subprocess.run(["ip", "link", "set", "lo", "mtu", "1500"], check=True)
        with connected("ipv4") as pair:
            timestamps(False)
            size = segment_size(pair.server)
            assert size == 1500 - 40 - 12
            snapshot = device.freeze_export(pair.server)
            assert snapshot.warm is not None
            unknown = replace(snapshot, warm=snapshot.warm._replace(mss_cache=0))
            pair.server.close()
            pair.server = socket.socket()
            device.import_into(pair.server, unknown)
            device.thaw(pair.server)
            assert segment_size(pair.server) == size
            exchange(pair)


def test_the_kernel_alone_refuses_what_contradicts_itself(device: Device) -> None:
    """These blobs never went through Python's checks, which refuse the same: `tests/guest_agent/handoff/test_snapshot.py`."""
    with connected("ipv4") as pair:
        pair.hear(b"x" * 100)
        time.sleep(0.02)
        good = device.freeze_export(pair.server)
        for change in contradictions(good):
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
