# SPDX-License-Identifier: Apache-2.0
"""What becomes of a VM's connections when it goes, in whatever way, and who must ask: other people's migrations, maintenance,
pauses, saving, and the VM's own end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.audience import Crowd, Found
from tests.vm.libvirt_host import wait_for
from tests.vm.moving import MACHINE, Moving, assert_unharmed, moving
from tests.vm.two_hosts import TwoHosts

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.long, pytest.mark.timeout(600)]

CROWD = Crowd(segments=6, lives=3, files=3)


@pytest.fixture(scope="module")
def machine(two_hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moving]:
    """A VM with a shell."""
    with moving(two_hosts, tmp_path_factory.mktemp("departures"), "routed", shell=True) as scene:
        yield scene


def virsh(machine: Moving, *words: str) -> str:
    """What somebody who does not know us types."""
    return machine.here.host.run("virsh", "--quiet", "--connect", machine.here.host.uri, *words)


def migrate_by_virsh(machine: Moving) -> str:
    options = ("--live", "--p2p", "--unsafe", "--persistent", "--undefinesource")
    return virsh(machine, "migrate", *options, MACHINE, machine.there.host.uri)


def wait_here(machine: Moving) -> None:
    wait_for(lambda: machine.here.machine().get("presence") == "here", seconds=60, what="the VM is here")


def test_virsh_is_refused_until_the_vm_has_left(machine: Moving) -> None:
    """Nobody is hurt by the refusal; the service says what to do."""
    with machine.watched(CROWD) as watchers:
        with pytest.raises(RuntimeError, match="mounted"):
            migrate_by_virsh(machine)
        watchers.wait_out(machine.here)
        assert f"streamlift leave {MACHINE}" in machine.here.log.read_text()
        machine.here.command("leave", MACHINE)
        assert not machine.here.ask("connections")["connections"]
        source = machine.here
        migrate_by_virsh(machine)
        machine.find()
        assert machine.here is not source
        wait_here(machine)
        watchers.wait_out(machine.here)
        assert_unharmed(watchers.stop())


def test_hand_back_all(machine: Moving) -> None:
    """Maintenance: everything comes home, and goes out again with the next request."""
    with machine.watched(Crowd(segments=6, rate=250_000)) as watchers:
        machine.here.command("hand-back", "--all", MACHINE)
        watchers.wait_out(machine.here)
        found = watchers.stop()
    assert found.faults == []


def test_leave_and_return(machine: Moving) -> None:
    """Nothing is out while it is away."""
    with machine.watched(CROWD) as watchers:
        machine.here.command("leave", MACHINE)
        assert machine.here.machine()["presence"] == "away"
        time.sleep(1)
        assert not machine.here.ask("connections")["connections"]
        machine.here.command("return", MACHINE)
        watchers.wait_out(machine.here)
        assert_unharmed(watchers.stop())


def test_pause_and_resume(machine: Moving) -> None:
    with machine.watched(CROWD) as watchers, machine.domain() as domain:
        domain.suspend()
        time.sleep(3)
        domain.resume()
        watchers.wait_out(machine.here)
        assert_unharmed(watchers.stop())


def test_save_and_restore(machine: Moving, tmp_path: Path) -> None:
    """Refused while the share is mounted; after `leave` the connections are saved with the VM, and live on after it is restored."""
    saved = tmp_path / "saved"
    with machine.watched(CROWD) as watchers:
        with pytest.raises(RuntimeError, match="mounted"):
            virsh(machine, "save", MACHINE, str(saved))
        machine.here.command("leave", MACHINE)
        virsh(machine, "save", MACHINE, str(saved))
        wait_for(lambda: not machine.here.machine(), seconds=60, what="the service sees the VM go")
        virsh(machine, "restore", str(saved))
        wait_here(machine)
        watchers.wait_out(machine.here)
        assert_unharmed(watchers.stop())


def assert_ended(machine: Moving, found: Found) -> None:
    """Every client heard of the end, no one got a wrong byte, and the VM serves others afterwards."""
    assert not any("wrong bytes" in fault or "no packet" in fault for fault in found.faults)
    wait_for(lambda: not machine.here.redirects(), seconds=80, what="the last packets have passed")
    machine.wait_ready()
    with machine.watched(CROWD) as watchers:
        assert_unharmed(watchers.stop())


def test_reboot(machine: Moving) -> None:
    """The guest's kernel ends its connections, and the host those that it has."""
    with machine.watched(Crowd(segments=6, rate=250_000)) as watchers:
        hellos = machine.here.log.read_text().count("answers")
        machine.in_guest("systemctl reboot", wait=False)
        wait_for(lambda: machine.here.log.read_text().count("answers") > hellos, seconds=100, what="the next life's hello")
        machine.wait_ready()
        found = watchers.stop()
    assert len(found.faults) == 6
    assert_ended(machine, found)


@pytest.mark.parametrize("how", ["poweroff", "destroy", "kill"])
def test_the_vm_ends(how: str, machine: Moving) -> None:
    """By itself, by its operator, by a crash of QEMU."""
    with machine.watched(CROWD) as watchers:
        with machine.domain() as domain:
            if how == "poweroff":
                machine.in_guest("systemctl poweroff", wait=False)
            elif how == "destroy":
                domain.destroy()
            else:
                process = machine.here.host.run("cat", f"/run/libvirt/qemu/{MACHINE}.pid").strip()
                machine.here.host.run("kill", f"-{signal.SIGKILL.value}", process)
            wait_for(lambda: not domain.isActive(), seconds=60, what="the VM has ended")
            wait_for(lambda: not machine.here.machine(), seconds=60, what="the service sees the VM go")
            assert not machine.here.ask("connections")["connections"]
            found = watchers.stop()
            domain.create()
    assert_ended(machine, found)
