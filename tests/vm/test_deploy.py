# SPDX-License-Identifier: Apache-2.0
"""Deploy, attach and watch, against a real libvirtd; no guest needs to finish its boot here."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import libvirt
import pytest

from hypervisor_svc import accelerator, attach
from hypervisor_svc.attach import MachineError
from hypervisor_svc.deploy import undeploy
from hypervisor_svc.domains import Domains, Machine, read_machine
from tests.vm.conftest import Deploy
from tests.vm.libvirt_host import LibvirtHost
from vm_images.build import Image

pytestmark = [pytest.mark.vm, pytest.mark.root]

# A VM as anybody may have one: no channel, no share, and nothing to boot from.
STRANGER = """
<domain type='qemu'>
  <name>stranger</name>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices><controller type='virtio-serial'/><memballoon model='none'/></devices>
</domain>
"""


def leftovers(host: LibvirtHost, connection: libvirt.virConnect) -> list[str]:
    """Whatever a deployment could leave behind."""
    cards = [line.split()[0] for line in host.run("ip", "-br", "link").splitlines()]
    return [
        *(domain.name() for domain in connection.listAllDomains()),
        *(network.name() for network in connection.listAllNetworks()),
        *(str(path) for path in host.machines.iterdir()),
        *(card for card in cards if card.startswith(("vnet", "streamlift"))),
        *host.run("nft", "list", "ruleset").splitlines(),
    ]


def test_undeploy_leaves_nothing_behind(
    libvirt_host: LibvirtHost, connection: libvirt.virConnect, image: Image, deploy_machine: Deploy
) -> None:
    before = leftovers(libvirt_host, connection)
    deployed = deploy_machine(image, name="first")
    assert "streamlift0" in libvirt_host.run("ip", "-br", "address", "show", "streamlift0")
    assert (libvirt_host.machines / "first" / "root.qcow2").exists()
    assert deployed.addresses == ("10.78.0.2", "fd78::2")
    undeploy(connection, "first")
    assert leftovers(libvirt_host, connection) == before


def test_the_network_stays_while_a_vm_is_on_it(connection: libvirt.virConnect, image: Image, deploy_machine: Deploy) -> None:
    deploy_machine(image, name="first")
    deploy_machine(image, name="second", address4="10.78.0.3/24", address6="fd78::3/64")
    undeploy(connection, "first")
    assert [network.name() for network in connection.listAllNetworks()] == ["streamlift"]
    undeploy(connection, "second")
    assert connection.listAllNetworks() == []


def test_a_failed_deployment_undoes_itself(
    libvirt_host: LibvirtHost, connection: libvirt.virConnect, image: Image, deploy_machine: Deploy
) -> None:
    before = leftovers(libvirt_host, connection)
    broken = dataclasses.replace(image, kernel=Path("/nonexistent/vmlinuz"))
    with pytest.raises(libvirt.libvirtError):
        deploy_machine(broken, name="broken")
    assert leftovers(libvirt_host, connection) == before


def test_refusals_say_what_to_do(connection: libvirt.virConnect, image: Image, deploy_machine: Deploy, tmp_path: Path) -> None:
    deploy_machine(image, name="first")
    with pytest.raises(MachineError, match="exists already"):
        deploy_machine(image, name="first")
    with pytest.raises(MachineError, match="without the address"):
        deploy_machine(image, name="second", address4="10.79.0.2/24")
    with pytest.raises(MachineError, match="not a folder"):
        deploy_machine(image, name="second", share_directory=tmp_path / "missing")
    with pytest.raises(MachineError, match="cannot be a VM's name"):
        deploy_machine(image, name="../second")
    with pytest.raises(MachineError) as caught:
        undeploy(connection, "nobody")
    assert "first" in caught.value.hint
    assert [domain.name() for domain in connection.listAllDomains()] == ["first"]


def test_bridged_vm_is_known_by_its_bridge(
    libvirt_host: LibvirtHost, connection: libvirt.virConnect, image: Image, deploy_machine: Deploy
) -> None:
    libvirt_host.run("ip", "link", "add", "br-test", "type", "bridge")
    try:
        deploy_machine(image, name="bridged", mode="bridged", bridge="br-test")
        machine = read_machine(connection, connection.lookupByName("bridged"))
        assert machine is not None and machine.bridge == "br-test"
        undeploy(connection, "bridged")
    finally:
        libvirt_host.run("ip", "link", "delete", "br-test")


def test_attach_and_detach_a_running_vm(connection: libvirt.virConnect, tmp_path: Path) -> None:
    domain = connection.defineXML(STRANGER)
    domain.create()
    try:
        before = attach._definition(domain)
        assert read_machine(connection, domain) is None
        change = attach.attach(connection, "stranger", share_directory=tmp_path, addresses=["192.0.2.9"])
        assert change.parts == ("channel", "share", "addresses")
        assert change.restart_needed  # 9p cannot be plugged
        # The channel and the addresses are there at once.
        machine = read_machine(connection, domain)
        assert machine is not None
        assert (machine.addresses, machine.share) == (("192.0.2.9",), None)
        again = attach.attach(connection, "stranger", share_directory=tmp_path, addresses=["192.0.2.9"])
        assert again.parts == () and again.restart_needed  # still the machine that was started before

        domain.destroy()
        domain.create()
        machine = read_machine(connection, domain)
        assert machine is not None and machine.share == str(tmp_path)

        assert attach.detach(connection, "stranger").parts == ("channel", "share", "addresses")
        assert attach.detach(connection, "stranger").parts == ()
        after = attach._definition(domain)
        assert [len(after.findall(f"devices/{kind}")) for kind in ("channel", "filesystem")] == [0, 0]
        assert attach.addresses_of(after) == attach.addresses_of(before) == ()
    finally:
        domain.destroy()
        domain.undefine()


class Watched:
    """What `Domains` reported, in order, and a way to wait for the next report."""

    def __init__(self) -> None:
        self.reports: asyncio.Queue[Machine | str] = asyncio.Queue()

    async def next(self) -> Machine | str:
        return await asyncio.wait_for(self.reports.get(), 20)


def test_vms_are_found_at_the_start_and_live(
    libvirt_host: LibvirtHost, connection: libvirt.virConnect, image: Image, deploy_machine: Deploy
) -> None:
    async def scenario() -> None:
        watched = Watched()
        domains = Domains(libvirt_host.uri, on_up=watched.reports.put_nowait, on_down=watched.reports.put_nowait)
        first = await asyncio.to_thread(deploy_machine, image, name="first")
        domains.start()
        try:
            up = await watched.next()
            assert isinstance(up, Machine) and up.uuid == first.uuid
            await asyncio.to_thread(undeploy, connection, "first")
            assert await watched.next() == first.uuid
            await asyncio.to_thread(deploy_machine, image, name="second")
            up = await watched.next()
            assert isinstance(up, Machine) and up.name == "second"
            # libvirtd goes and comes back: the VM runs on, and is neither lost nor reported again.
            await asyncio.to_thread(libvirt_host.restart_libvirtd)
            await asyncio.sleep(6)
            assert watched.reports.empty() and domains.connected
            with_new_connection = libvirt_host.connect()
            await asyncio.to_thread(undeploy, with_new_connection, "second")
            with_new_connection.close()
            assert await watched.next() == up.uuid
        finally:
            domains.stop()

    asyncio.run(scenario())


def test_a_trial_tells_whether_an_accelerator_works(tmp_path: Path) -> None:
    assert accelerator.runs_with("tcg")
    chosen = accelerator.choose(cache=tmp_path)
    assert chosen == ("tcg" if accelerator.kvm_obstacle() else "kvm")
    assert accelerator.choose(cache=tmp_path) == chosen
