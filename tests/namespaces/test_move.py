# SPDX-License-Identifier: Apache-2.0
"""A guest moves between two hosts with everything under way: files and relays go on at the other, byte for byte."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hypervisor_svc.control import ControlError
from tests.namespaces.deployment import LIVE_PASSWORD, LIVE_PORT, wait_for
from tests.namespaces.download import Download
from tests.namespaces.test_leave import Reader
from tests.namespaces.two_hosts import GUEST, SIZE, TwoHosts
from tests.transport_stream import stream

pytestmark = pytest.mark.root


def download(hosts: TwoHosts) -> Download:
    """One client in the middle of a file."""
    return Download(hosts.client, f"http://{GUEST}/{SIZE}.bin")


def is_complete(hosts: TwoHosts, curl: Download) -> bool:
    return curl.digest() == hashlib.sha256((hosts.share / f"{SIZE}.bin").read_bytes()).hexdigest()


def is_here(hosts: TwoHosts) -> bool:
    """The guest works with the service of its host."""
    try:
        machine = hosts.host.machine()
    except ControlError:
        return False
    return bool(machine["channel"] == "hello" and machine["presence"] == "here")


def out(hosts: TwoHosts, count: int) -> None:
    wait_for(lambda: hosts.host.machine()["connections_out"] == count, f"{count} are out at {hosts.here}")


def test_one_download_through_five_moves(hosts: TwoHosts) -> None:
    curl = download(hosts)
    for _ in range(5):
        out(hosts, 1)
        time.sleep(0.3)
        assert hosts.migrate()["home"] == 1
    assert is_complete(hosts, curl)
    counters = hosts.counters()
    assert (counters["offloaded"], counters["failed"], counters["local"]) == (1, 0, {})


def test_requests_while_memory_is_copied(hosts: TwoHosts) -> None:
    """They are served before the VM moves; one that is still out moves with it."""
    late: list[Download] = []

    def meanwhile() -> None:
        small = hosts.client.run("sh", "-c", f"curl -sSf -m 10 http://{GUEST}/1400000.bin | sha256sum")
        assert small.split()[0] == hashlib.sha256((hosts.share / "1400000.bin").read_bytes()).hexdigest()
        late.append(download(hosts))
        out(hosts, len(late) + 1)

    curl = download(hosts)
    for moves in range(1, 3):
        out(hosts, moves)
        assert hosts.migrate(meanwhile)["home"] == moves + 1
    assert all(is_complete(hosts, one) for one in (curl, *late))
    counters = hosts.counters()
    assert (counters["offloaded"], counters["failed"], counters["local"]) == (5, 0, {})


def encoder(hosts: TwoHosts, path: str, content_type: str) -> socket.socket:
    """A connection of an encoder that was let in."""
    words = base64.b64encode(f"source:{LIVE_PASSWORD}".encode()).decode()
    with hosts.client.entered():
        sock = socket.create_connection((GUEST, LIVE_PORT), timeout=20)
    head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {words}\r\nContent-Type: {content_type}\r\n\r\n"
    sock.sendall(head.encode())
    assert sock.recv(1000).endswith(b"\r\n\r\n")
    return sock


def listeners(hosts: TwoHosts, path: str, count: int) -> list[Reader]:
    """So many that were answered; what comes after the head they keep."""
    wait_for(lambda: path in hosts.client.run("curl", "-sf", "-m", "5", f"http://{GUEST}:{LIVE_PORT}/"), "the mount")
    with hosts.client.entered():
        socks = [socket.create_connection((GUEST, LIVE_PORT), timeout=20) for _ in range(count)]
    for sock in socks:
        sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        assert sock.recv(1000).endswith(b"\r\n\r\n")
    return [Reader(sock) for sock in socks]


@pytest.mark.parametrize("content_type", ["video/mp2t", "audio/mpeg"])
def test_a_live_stream_goes_on_at_the_other_host(hosts: TwoHosts, content_type: str) -> None:
    """What the encoder says meanwhile waits in its connection; listeners that had everything miss nothing."""
    count, body = 8, b"".join(stream(300))
    halves = body[: len(body) // 2 + 77], body[len(body) // 2 + 77 :]
    with encoder(hosts, "/film", content_type) as source:
        out(hosts, 1)
        readers = listeners(hosts, "/film", count)
        out(hosts, count + 1)
        sender = threading.Thread(target=_send, args=(source, halves[0]))
        sender.start()
        for _ in range(2):
            time.sleep(0.2)
            assert hosts.migrate()["home"] == count + 1
            out(hosts, count + 1)
        sender.join()
        _send(source, halves[1])
        source.shutdown(socket.SHUT_WR)
        for reader in readers:
            reader.join(20)
    for reader in readers:
        assert bytes(reader.data) == body


@pytest.mark.parametrize("cut", ["while_it_serves", "while_it_leaves"])
def test_a_live_stream_whose_channel_is_cut_on_the_way(hosts: TwoHosts, cut: str) -> None:
    """While memory is copied, and while everything comes home."""
    count, body = 8, b"".join(stream(300))
    with encoder(hosts, "/film", "video/mp2t") as source:
        out(hosts, 1)
        readers = listeners(hosts, "/film", count)
        out(hosts, count + 1)
        sender = threading.Thread(target=_send, args=(source, body))
        sender.start()
        hosts.host.call("leave", only="share")
        if cut == "while_it_serves":
            hosts.cut_for_a_moment()
            hosts.host.call("leave")
        else:
            with ThreadPoolExecutor(1) as pool:
                leaving = pool.submit(hosts.host.call, "leave")
                time.sleep(0.01)
                hosts.cut()
                leaving.result()
        hosts.move()
        out(hosts, count + 1)
        sender.join()
        source.shutdown(socket.SHUT_WR)
        for reader in readers:
            reader.join(20)
    for reader in readers:
        assert bytes(reader.data) == body


def test_a_live_stream_while_the_vm_is_away(hosts: TwoHosts) -> None:
    """It needs no share: the guest relays it until it works with a host again, to new listeners too."""
    first, second, third = (os.urandom(100_000) for _ in range(3))
    with encoder(hosts, "/radio", "audio/mpeg") as source:
        out(hosts, 1)
        readers = listeners(hosts, "/radio", 3)
        out(hosts, 4)
        _send(source, first)
        hosts.host.call("leave")
        _send(source, second)
        wait_for(lambda: all(bytes(reader.data) == first + second for reader in readers), "they have what came meanwhile")
        newcomer = listeners(hosts, "/radio", 1)
        _send(source, third)
        wait_for(lambda: all(bytes(reader.data) == third for reader in newcomer), "so has one that came meanwhile")
        hosts.move()
        out(hosts, 5)
        _send(source, first)
        source.shutdown(socket.SHUT_WR)
        for reader in readers + newcomer:
            reader.join(20)
    assert all(bytes(reader.data) == first + second + third + first for reader in readers)
    assert bytes(newcomer[0].data) == third + first


def _send(sock: socket.socket, data: bytes) -> None:
    for at in range(0, len(data), 5000):
        sock.sendall(data[at : at + 5000])
        time.sleep(0.005)


# Faults.


def test_the_destination_has_no_service(hosts: TwoHosts) -> None:
    """The guest finds out that it is alone, and sends the rest itself."""
    hosts.other.service.stop()
    curl = download(hosts)
    out(hosts, 1)
    hosts.host.call("leave")
    hosts.move()
    assert is_complete(hosts, curl)
    hosts.host.service.start()
    wait_for(lambda: is_here(hosts), "its service has met the guest")
    again = download(hosts)
    out(hosts, 1)
    assert hosts.migrate()["home"] == 1
    assert is_complete(hosts, again)


def _freeze(hosts: TwoHosts) -> None:
    """The agent hangs: what is to come home does not."""
    assert hosts.agent.popen is not None
    os.kill(hosts.agent.popen.pid, signal.SIGSTOP)


def _thaw(hosts: TwoHosts) -> None:
    assert hosts.agent.popen is not None
    os.kill(hosts.agent.popen.pid, signal.SIGCONT)


def test_the_service_is_killed_in_the_drain(hosts: TwoHosts) -> None:
    """What it had is lost with it; the guest stays, and moves at the second attempt."""
    curl = download(hosts)
    out(hosts, 1)
    _freeze(hosts)
    leaving = threading.Thread(target=_leave_in_vain, args=(hosts,))
    leaving.start()
    time.sleep(0.3)
    os.kill(hosts.host.call("status")["pid"], signal.SIGKILL)
    leaving.join()
    _thaw(hosts)
    wait_for(lambda: is_here(hosts), "the guest works with the next service", patience=20)
    curl.digest(seconds=30)  # it is told; by itself it would ask after 60 s
    again = download(hosts)
    out(hosts, 1)
    assert hosts.migrate()["home"] == 1
    assert is_complete(hosts, again)


def _leave_in_vain(hosts: TwoHosts) -> None:
    with pytest.raises(ControlError, match="answer"):
        hosts.host.call("leave")


@pytest.mark.parametrize("late", ["finish", pytest.param("reset", marks=pytest.mark.long)])
def test_the_agent_hangs_in_the_drain(hosts: TwoHosts, late: str) -> None:
    """After the deadline the host finishes the file by itself, or resets the connection. The guest did not leave."""
    curl = download(hosts)
    out(hosts, 1)
    _freeze(hosts)
    failed: list[str] = []
    leaving = threading.Thread(target=lambda: failed.append(_refusal(hosts, late)))
    leaving.start()
    time.sleep(0.2)  # nothing more is sent, for now
    if late == "finish":
        assert is_complete(hosts, curl)
    else:
        assert not is_complete(hosts, curl)
    leaving.join()
    assert "does not say that it is away" in failed[0]
    _thaw(hosts)
    wait_for(lambda: hosts.host.machine()["presence"] == "here", "the guest works with its host again")
    again = download(hosts)
    out(hosts, 1)
    assert hosts.migrate()["home"] == 1
    assert is_complete(hosts, again)


def _refusal(hosts: TwoHosts, late: str) -> str:
    with pytest.raises(ControlError) as raised:
        hosts.host.call("leave", deadline=0.5, late=late)
    return str(raised.value)


def test_the_agent_is_killed_in_the_drain(hosts: TwoHosts) -> None:
    """Its next life gets the connections, and mounts what was unmounted."""
    curl = download(hosts)
    out(hosts, 1)
    _freeze(hosts)
    failed: list[str] = []
    leaving = threading.Thread(target=lambda: failed.append(_refusal(hosts, "wait")))
    leaving.start()
    time.sleep(0.2)
    hosts.agent.kill()
    hosts.agent.start()
    leaving.join()
    assert "restarted" in failed[0]
    assert is_complete(hosts, curl)
    again = download(hosts)
    out(hosts, 1)
    assert hosts.migrate()["home"] == 1
    assert is_complete(hosts, again)
