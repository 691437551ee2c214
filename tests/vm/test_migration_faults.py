# SPDX-License-Identifier: Apache-2.0
"""A fault at each step of a migration: nothing is lost but what the fault itself destroyed, and the next migration works."""

from __future__ import annotations

import contextlib
import signal
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import libvirt
import pytest

from hypervisor_svc.attach import channel_path
from tests.audience import Crowd
from tests.vm.faults import cut_connection
from tests.vm.libvirt_host import wait_for
from tests.vm.moving import Moving, Watchers, assert_unharmed, moving
from tests.vm.product import Product
from tests.vm.two_hosts import TwoHosts

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.long, pytest.mark.timeout(600)]

CROWD = Crowd(segments=6, lives=3, files=3)
SLOWLY = ("--bandwidth", "8")
"""So many MiB a second: there is time for a fault."""
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


def assert_still_served(machine: Moving, watchers: Watchers) -> None:
    """Those who watched before the fault, and the next migration with others."""
    wait_present(machine.here, "here")
    watchers.wait_out(machine.here)
    assert_unharmed(watchers.stop())
    assert_moves(machine)


def assert_moves(machine: Moving) -> None:
    """A migration works."""
    wait_present(machine.here, "here")
    with machine.watched(CROWD) as watchers:
        machine.move()
        watchers.wait_out(machine.here)
        assert_unharmed(watchers.stop())


@contextlib.contextmanager
def watched(machine: Moving) -> Iterator[Watchers]:
    with machine.watched(CROWD, slow=2) as watchers:
        yield watchers


@pytest.mark.parametrize("percent", [10, 50, 90])
def test_cancelled(percent: int, machine: Moving) -> None:
    with watched(machine) as watchers:
        source, process = machine.here, machine.begin(*SLOWLY)
        with machine.domain() as domain:
            wait_for(lambda: _copied(domain) >= percent, seconds=100, what=f"{percent} % are copied")
        machine.cancel(process)
        cancelled = machine.end(process)
        assert (cancelled.status, machine.here) == (1, source), cancelled
        assert_still_served(machine, watchers)


def _copied(domain: libvirt.virDomain) -> float:
    """Percent of the memory."""
    told = domain.jobStats()
    total = told.get("memory_total", 0)
    return 100 * (1 - told["memory_remaining"] / total) if total else 0.0


def test_no_service_at_the_destination(machine: Moving) -> None:
    with watched(machine) as watchers:
        source, target = machine.here, machine.there
        target.kill()
        try:
            refused = machine.end(machine.begin())
            assert (refused.status, machine.here) == (1, source), refused
        finally:
            target.start()
        assert_still_served(machine, watchers)


def test_the_destinations_service_dies_meanwhile(machine: Moving) -> None:
    with watched(machine) as watchers:
        source, target, process = machine.here, machine.there, machine.begin(*SLOWLY)
        wait_present(source, "away")
        target.kill()
        machine.end(process)
        target.start()
        assert_still_served(machine, watchers)


def test_the_destination_lacks_the_share(machine: Moving) -> None:
    source, target, folder = machine.here, machine.there.host, machine.share.parent
    with watched(machine) as watchers:
        target.run("mount", "-t", "tmpfs", "none", folder)
        try:
            failed = machine.end(machine.begin())
            assert (failed.status, machine.here) == (1, source), failed
        finally:
            target.run("umount", folder)
        assert_still_served(machine, watchers)


@pytest.mark.parametrize("when", ["leaving", "away"])
def test_the_channel_is_cut(when: str, machine: Moving) -> None:
    with watched(machine) as watchers:
        source, channel = machine.here, _channel(machine)
        process = machine.begin(*SLOWLY)
        wait_present(source, when)
        cut_connection(source.ask("status")["pid"], channel)
        machine.end(process)
        assert_still_served(machine, watchers)


def _channel(machine: Moving) -> str:
    with machine.domain() as domain:
        return str(channel_path(ET.fromstring(domain.XMLDesc())))


def test_the_sources_service_is_killed_in_the_drain(machine: Moving) -> None:
    """What it had out is lost; the VM and all others are not."""
    with watched(machine):
        source = machine.here
        machine.in_guest(f"{SIGNAL} STOP streamlift-agent")  # else the drain might be over before anybody can kill
        process = machine.begin()
        wait_present(source, "leaving")
        source.kill()
        machine.in_guest(f"{SIGNAL} CONT streamlift-agent")
        failed = machine.end(process)
        assert (failed.status, machine.here) == (1, source), failed
        source.start()
        machine.wait_ready()
        assert_moves(machine)


def test_the_agent_is_killed_in_the_drain(machine: Moving) -> None:
    """Its next life gets the sockets; only relays end with the life that opened them."""
    with machine.watched(Crowd(segments=8, rate=250_000)) as watchers:
        source = machine.here
        machine.in_guest(f"{SIGNAL} STOP streamlift-agent")
        process = machine.begin()
        wait_present(source, "leaving")
        machine.in_guest(f"{SIGNAL} KILL streamlift-agent")
        machine.end(process)
        assert_still_served(machine, watchers)


def test_the_command_is_killed(machine: Moving) -> None:
    """Nobody is left who would say `return`."""
    with watched(machine) as watchers:
        source, process = machine.here, machine.begin(*SLOWLY)
        wait_present(source, "away")
        source.host.namespaces.send(process, signal.SIGKILL)
        machine.end(process)
        wait_for(lambda: "here" in map(presence, machine.products), seconds=100, what="the VM is served again")
        machine.find()
        assert_still_served(machine, watchers)
