# SPDX-License-Identifier: Apache-2.0
"""A fault at each step of a migration: nothing is lost but what the fault itself destroyed, and the next migration works."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import libvirt
import pytest

from hypervisor_svc.attach import channel_path
from tests.audience import Crowd
from tests.vm.libvirt_host import wait_for
from tests.vm.moving import Moving, assert_unharmed, moving
from tests.vm.product import ROOT, Product
from tests.vm.two_hosts import TwoHosts

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.long, pytest.mark.timeout(600)]

CROWD = Crowd(segments=6, lives=3, files=3)
SLOWLY, STEADILY = ("--bandwidth", "16"), ("--bandwidth", "128")
"""So many MiB a second: there is time for a fault. A migration that goes on to its end is no slower than it must be (README.md:
what an emulator's memory loses)."""
SIGNAL = "systemctl kill --signal"


@pytest.fixture(scope="module")
def machine(two_hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moving]:
    """A VM with a shell."""
    with moving(two_hosts, tmp_path_factory.mktemp("faults"), "routed", shell=True) as scene:
        yield scene


def presence(product: Product) -> str:
    """Of the VM at a service."""
    return str(product.machine().get("presence"))


def wait_present(product: Product, wanted: str) -> None:
    wait_for(lambda: presence(product) == wanted, seconds=60, what=f"the VM is {wanted}")


def assert_moves(machine: Moving) -> None:
    """A migration works."""
    wait_present(machine.here, "here")
    with machine.watched(CROWD) as watchers:
        machine.move()
        watchers.wait_out(machine.here)
        assert_unharmed(watchers.stop())


@contextlib.contextmanager
def survived(machine: Moving, crowd: Crowd = CROWD, *, slow: int = 2) -> Iterator[None]:
    """What happens in the block hurts nobody, and the next migration works."""
    with machine.watched(crowd, slow=slow) as watchers:
        yield
        wait_present(machine.here, "here")
        watchers.wait_out(machine.here)
        assert_unharmed(watchers.stop())
    assert_moves(machine)


@pytest.mark.parametrize("percent", [10, 50, 90])
def test_cancelled(percent: int, machine: Moving) -> None:
    with survived(machine):
        source, process = machine.here, machine.begin(*SLOWLY)
        with machine.domain() as domain, never_done(domain):
            wait_for(lambda: _copied(domain) >= percent, seconds=100, what=f"{percent} % are copied")
            machine.cancel(process)
            cancelled = machine.end(process)
        assert (cancelled.status, machine.here) == (1, source), cancelled


@contextlib.contextmanager
def never_done(domain: libvirt.virDomain) -> Iterator[None]:
    """A migration goes on and on: the VM may not stand still for long enough to end it."""
    before = domain.migrateGetMaxDowntime()
    domain.migrateSetMaxDowntime(1)
    try:
        yield
    finally:
        domain.migrateSetMaxDowntime(before)


def _copied(domain: libvirt.virDomain) -> float:
    """Percent of the memory."""
    told = domain.jobStats()
    total = told.get("memory_total", 0)
    return 100 * (1 - told["memory_remaining"] / total) if total else 0.0


def test_no_service_at_the_destination(machine: Moving) -> None:
    with survived(machine):
        source, target = machine.here, machine.there
        target.kill()
        try:
            refused = machine.end(machine.begin())
            assert (refused.status, machine.here) == (1, source), refused
        finally:
            target.start()


def test_the_destinations_service_dies_meanwhile(machine: Moving) -> None:
    with survived(machine):
        source, target, process = machine.here, machine.there, machine.begin(*STEADILY)
        wait_present(source, "loose")
        target.kill()
        machine.end(process)
        target.start()


def test_the_destination_lacks_the_share(machine: Moving) -> None:
    source, target, folder = machine.here, machine.there.host, machine.share.parent
    with survived(machine):
        target.run("mount", "-t", "tmpfs", "none", folder)
        try:
            failed = machine.end(machine.begin())
            assert (failed.status, machine.here) == (1, source), failed
        finally:
            target.run("umount", folder)


def test_the_channel_is_cut(machine: Moving) -> None:
    with survived(machine):
        source, channel = machine.here, _channel(machine)
        process = machine.begin(*STEADILY)
        wait_present(source, "loose")
        service = str(source.ask("status")["pid"])
        source.host.run("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.vm.faults", service, channel)
        machine.end(process)


def _channel(machine: Moving) -> str:
    with machine.domain() as domain:
        return str(channel_path(ET.fromstring(domain.XMLDesc())))


_HALF_CLOSED = """
import socket, sys
client = socket.create_connection((sys.argv[1], 80))
client.sendall(b"GET /long.bin HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
print("asked", flush=True)
sys.stdin.readline()
client.shutdown(socket.SHUT_WR)
print("closed", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def must_come_home(machine: Moving) -> Iterator[None]:
    """A client that has closed its side, and reads nothing: its connection is none that goes from host to host (`pass_on.py`)."""
    (machine.share / "long.bin").write_bytes(bytes(64_000_000))
    argv = machine.hosts.fabric.client.command(sys.executable, "-c", _HALF_CLOSED, machine.address)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None and client.stdout is not None
        assert client.stdout.readline() == "asked\n"
        wait_for(lambda: "long.bin" in _files_out(machine), seconds=60, what="its file is out")
        client.stdin.write("\n")
        client.stdin.flush()
        assert client.stdout.readline() == "closed\n"
        try:
            yield
        finally:
            client.kill()


def _files_out(machine: Moving) -> set[str]:
    return {row["file"] for row in machine.here.ask("connections")["connections"]}


def stop_in_the_drain(machine: Moving) -> subprocess.Popen[str]:
    """Move, with an agent that stands still once it has let go, and something that cannot do without it: else the drain might be
    over before anybody can kill. Everything is on its way home or to the next host, and not all has arrived. An emulated VM needs
    seconds to start another agent."""
    process, source = machine.begin(*STEADILY, "--deadline", "60"), machine.here
    wait_present(source, "loose")
    machine.in_guest(f"{SIGNAL} STOP streamlift-agent")

    def drains() -> bool:
        states = {row["state"] for row in source.ask("connections")["connections"]}
        return states == {"returning", "passed"}

    wait_for(drains, seconds=100, what="the drain has begun")
    return process


def test_the_sources_service_is_killed_in_the_drain(machine: Moving) -> None:
    """What it had out is lost; the VM and all others are not."""
    with machine.watched(Crowd(segments=8, rate=250_000)), must_come_home(machine):
        source, process = machine.here, stop_in_the_drain(machine)
        source.kill()
        machine.in_guest(f"{SIGNAL} CONT streamlift-agent")
        failed = machine.end(process)
        assert (failed.status, machine.here) == (1, source), failed
        source.start()
        machine.wait_ready()
    assert_moves(machine)


def test_the_agent_is_killed_in_the_drain(machine: Moving) -> None:
    """Its next life gets the sockets; only relays end with the life that opened them."""
    with survived(machine, Crowd(segments=8, rate=250_000), slow=0), must_come_home(machine):
        process = stop_in_the_drain(machine)
        machine.in_guest(f"{SIGNAL} KILL streamlift-agent")
        machine.end(process)


def test_the_command_is_killed(machine: Moving) -> None:
    """Nobody is left who would say `return`."""
    with survived(machine):
        source, process = machine.here, machine.begin(*SLOWLY)
        wait_present(source, "loose")
        source.host.namespaces.send(process, signal.SIGKILL)
        machine.end(process)
        wait_for(lambda: "here" in map(presence, machine.products), seconds=100, what="the VM is served again")
        machine.find()
