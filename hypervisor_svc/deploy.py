# SPDX-License-Identifier: Apache-2.0
"""Make a streaming VM through libvirt, and undo all that was made."""

import contextlib
import ipaddress
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import libvirt

from hypervisor_svc.accelerator import Accelerator, Choice, choose
from hypervisor_svc.attach import (
    NAMESPACE,
    MachineError,
    canonical,
    channel_element,
    find_domain,
    metadata_element,
    share_element,
)

NETWORK = "streamlift"
BRIDGE = "streamlift0"
MACHINES = Path("/var/lib/streamlift/machines")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class BootImage(Protocol):
    """What a VM starts from: a raw root image that is never written to, and the kernel with its initramfs."""

    @property
    def root(self) -> Path: ...
    @property
    def kernel(self) -> Path: ...
    @property
    def initrd(self) -> Path: ...


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """The VM that is wanted. Addresses are written with their prefix length, gateways without.

    routed: the VM sits on a libvirt network of its own, `bridge` is that network's bridge, and the gateways
    (by default the first addresses of the networks) are the host's own addresses on it.
    live_password: the image's live server runs, and encoders need this word.
    bridged: the VM's port joins the host's bridge `bridge`, which somebody else made.
    """

    name: str
    image: BootImage
    share_directory: Path
    address4: str | None = "10.78.0.2/24"
    address6: str | None = "fd78::2/64"
    gateway4: str | None = None
    gateway6: str | None = None
    mode: Literal["routed", "bridged"] = "routed"
    bridge: str = BRIDGE
    network: str = NETWORK
    memory_mib: int = 512
    vcpus: int = 2
    accelerator: Choice = "auto"
    read_only_share: bool = True
    live_password: str | None = None
    machines: Path = MACHINES

    @property
    def addresses(self) -> tuple[str, ...]:
        """The VM's own addresses, with their prefix lengths."""
        return tuple(address for address in (self.address4, self.address6) if address)

    @property
    def gateways(self) -> tuple[str, ...]:
        """The next hops; in routed mode each address has one."""
        given = (self.gateway4, self.gateway6)
        own = (self.address4, self.address6)
        return tuple(
            gateway or _first_host(address)
            for gateway, address in zip(given, own, strict=True)
            if address and (gateway or self.mode == "routed")
        )

    @property
    def directory(self) -> Path:
        """Where the VM's own files are."""
        return self.machines / self.name


@dataclass(frozen=True)
class Deployed:
    """A running VM that `deploy` made."""

    name: str
    uuid: str
    addresses: tuple[str, ...]
    accelerator: Accelerator
    console_log: Path


def deploy(connection: libvirt.virConnect, deployment: Deployment) -> Deployed:
    """Make the VM and start it; what was made is undone if a later step fails."""
    _check(connection, deployment)
    chosen = choose(deployment.accelerator)
    with contextlib.ExitStack() as undo:
        if deployment.mode == "routed":
            _start_network(connection, deployment)
            undo.callback(_stop_network_if_unused, connection, deployment.network)
        _make_directory(deployment)
        undo.callback(shutil.rmtree, deployment.directory, ignore_errors=True)
        _make_overlay(deployment)
        domain = connection.defineXML(ET.tostring(domain_element(deployment, chosen), encoding="unicode"))
        undo.callback(domain.undefine)
        domain.create()
        undo.pop_all()
    return Deployed(
        name=deployment.name,
        uuid=domain.UUIDString(),
        addresses=canonical(deployment.addresses),
        accelerator=chosen,
        console_log=deployment.directory / "console.log",
    )


def undeploy(connection: libvirt.virConnect, name: str) -> None:
    """Remove a VM that `deploy` made: domain, files, and the network if no VM is left on it."""
    domain = find_domain(connection, name)
    definition = ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    made = definition.find(f"metadata/{{{NAMESPACE}}}vm/{{{NAMESPACE}}}deployed")
    if made is None:
        raise MachineError(f"{name!r} was not made by 'streamlift deploy'", hint="'virsh undefine' removes other VMs")
    if domain.isActive():
        domain.destroy()
    domain.undefine()
    directory = made.get("directory")
    if directory:
        shutil.rmtree(directory, ignore_errors=True)
    network = made.get("network")
    if network:
        _stop_network_if_unused(connection, network)


def domain_element(deployment: Deployment, chosen: Accelerator) -> ET.Element:
    """The domain's XML."""
    domain = ET.Element("domain", type="kvm" if chosen == "kvm" else "qemu")
    ET.SubElement(domain, "name").text = deployment.name
    _add_metadata(domain, deployment)
    ET.SubElement(domain, "memory", unit="MiB").text = str(deployment.memory_mib)
    ET.SubElement(domain, "vcpu").text = str(deployment.vcpus)
    ET.SubElement(domain, "cpu", mode="host-passthrough" if chosen == "kvm" else "maximum")
    _add_boot(domain, deployment)
    ET.SubElement(ET.SubElement(domain, "features"), "acpi")
    ET.SubElement(domain, "clock", offset="utc")
    ET.SubElement(domain, "on_crash").text = "destroy"
    _add_devices(ET.SubElement(domain, "devices"), deployment)
    return domain


def network_element(deployment: Deployment) -> ET.Element:
    """The network of the routed mode: "open", so libvirt writes no firewall rules, and without DHCP or DNS."""
    network = ET.Element("network")
    ET.SubElement(network, "name").text = deployment.network
    metadata = ET.SubElement(network, "metadata")
    ET.SubElement(metadata, f"{{{NAMESPACE}}}network")
    ET.SubElement(network, "forward", mode="open")
    ET.SubElement(network, "bridge", name=deployment.bridge, stp="off", delay="0")
    ET.SubElement(network, "dns", enable="no")
    for address in deployment.addresses:
        interface = ipaddress.ip_interface(address)
        gateway = next(g for g in deployment.gateways if ipaddress.ip_address(g) in interface.network)
        family = "ipv4" if interface.version == 4 else "ipv6"
        prefix = str(interface.network.prefixlen)
        ET.SubElement(network, "ip", family=family, address=gateway, prefix=prefix)
    return network


def kernel_arguments(deployment: Deployment) -> str:
    """The guest reads its name and addresses from here: see vm_images/guest/network and live."""
    words = ["console=ttyS0", "quiet", "net.ifnames=0", "panic=-1", f"systemd.hostname={deployment.name}"]
    words += [f"streamlift.address={ipaddress.ip_interface(address)}" for address in deployment.addresses]
    words += [f"streamlift.gateway={ipaddress.ip_address(gateway)}" for gateway in deployment.gateways]
    if deployment.live_password is not None:
        words.append(f"streamlift.live_password={deployment.live_password}")
    return " ".join(words)


def _check(connection: libvirt.virConnect, deployment: Deployment) -> None:
    if not NAME.fullmatch(deployment.name):
        raise MachineError(f"{deployment.name!r} cannot be a VM's name", hint="use letters, digits, '-', '_' and '.'")
    if deployment.live_password is not None and not NAME.fullmatch(deployment.live_password):
        raise MachineError("this cannot be the live server's password", hint="use letters, digits, '-', '_' and '.'")
    if any(domain.name() == deployment.name for domain in connection.listAllDomains()):
        raise MachineError(f"a VM named {deployment.name!r} exists already", hint="choose another name or undeploy it first")
    if not deployment.share_directory.is_dir():
        raise MachineError(f"{deployment.share_directory} is not a folder", hint="create it first")
    canonical(deployment.addresses)
    if not deployment.addresses:
        raise MachineError("the VM needs an address", hint="for example 10.78.0.2/24")
    _check_gateways(deployment)


def _check_gateways(deployment: Deployment) -> None:
    """The guest could not use a next hop outside its own networks, and nobody would see its complaint."""
    networks = [ipaddress.ip_interface(address).network for address in deployment.addresses]
    for text in deployment.gateways:
        try:
            gateway = ipaddress.ip_address(text)
        except ValueError as error:
            raise MachineError(str(error), hint="write a gateway like 192.0.2.1, without a prefix length") from error
        if not gateway.is_link_local and not any(gateway in network for network in networks):
            raise MachineError(
                f"the gateway {gateway} is in none of the VM's networks", hint="is the address's prefix length right?"
            )


def _first_host(address: str) -> str:
    network = ipaddress.ip_interface(address).network
    return str(network.network_address + 1)


def _add_metadata(domain: ET.Element, deployment: Deployment) -> None:
    ours = metadata_element(canonical(deployment.addresses))
    network = deployment.network if deployment.mode == "routed" else ""
    ET.SubElement(ours, f"{{{NAMESPACE}}}deployed", directory=str(deployment.directory), network=network)
    ET.SubElement(domain, "metadata").append(ours)


def _add_boot(domain: ET.Element, deployment: Deployment) -> None:
    system = ET.SubElement(domain, "os")
    ET.SubElement(system, "type", arch="x86_64", machine="q35").text = "hvm"
    ET.SubElement(system, "kernel").text = str(deployment.image.kernel)
    ET.SubElement(system, "initrd").text = str(deployment.image.initrd)
    ET.SubElement(system, "cmdline").text = kernel_arguments(deployment)


def _add_devices(devices: ET.Element, deployment: Deployment) -> None:
    disk = ET.SubElement(devices, "disk", type="file", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type="qcow2", discard="unmap")
    ET.SubElement(disk, "source", file=str(deployment.directory / "root.qcow2"))
    ET.SubElement(disk, "target", dev="vda", bus="virtio")
    devices.append(_interface(deployment))
    devices.append(channel_element())
    devices.append(share_element(deployment.share_directory.resolve(), read_only=deployment.read_only_share))
    serial = ET.SubElement(devices, "serial", type="pty")
    ET.SubElement(serial, "log", file=str(deployment.directory / "console.log"), append="off")
    rng = ET.SubElement(devices, "rng", model="virtio")
    ET.SubElement(rng, "backend", model="random").text = "/dev/urandom"
    ET.SubElement(devices, "controller", type="usb", model="none")
    ET.SubElement(devices, "memballoon", model="none")


def _interface(deployment: Deployment) -> ET.Element:
    if deployment.mode == "routed":
        interface = ET.Element("interface", type="network")
        ET.SubElement(interface, "source", network=deployment.network)
    else:
        interface = ET.Element("interface", type="bridge")
        ET.SubElement(interface, "source", bridge=deployment.bridge)
    ET.SubElement(interface, "model", type="virtio")
    # No boot code for the card: the machine starts from its kernel, and each such file costs start-up time.
    ET.SubElement(interface, "rom", enabled="no")
    return interface


def _start_network(connection: libvirt.virConnect, deployment: Deployment) -> None:
    try:
        network = connection.networkLookupByName(deployment.network)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_NETWORK:
            raise
        network = connection.networkDefineXML(ET.tostring(network_element(deployment), encoding="unicode"))
    if not network.isActive():
        try:
            network.create()
        except libvirt.libvirtError:
            _stop_network_if_unused(connection, deployment.network)
            raise
    _check_network(network, deployment)


def _check_network(network: libvirt.virNetwork, deployment: Deployment) -> None:
    """A network that was there before must be able to carry the VM's addresses."""
    present = {ip.get("address") for ip in ET.fromstring(network.XMLDesc()).iterfind("ip")}
    for gateway in deployment.gateways:
        if gateway not in present:
            raise MachineError(
                f"network {deployment.network!r} exists without the address {gateway}",
                hint="choose addresses from its range, or another network name and bridge",
            )


def _stop_network_if_unused(connection: libvirt.virConnect, name: str) -> None:
    try:
        network = connection.networkLookupByName(name)
    except libvirt.libvirtError:
        return
    if ET.fromstring(network.XMLDesc()).find(f"metadata/{{{NAMESPACE}}}network") is None:
        return  # Somebody else made it.
    for domain in connection.listAllDomains():
        definition = ET.fromstring(domain.XMLDesc())
        if any(source.get("network") == name for source in definition.iterfind("devices/interface/source")):
            return
    if network.isActive():
        network.destroy()
    network.undefine()


def _make_directory(deployment: Deployment) -> None:
    # Left over from a VM that was undefined by other means: nothing refers to it any more.
    shutil.rmtree(deployment.directory, ignore_errors=True)
    deployment.directory.mkdir(parents=True, mode=0o711)


def _make_overlay(deployment: Deployment) -> None:
    """The VM's own disk: what differs from the image that all VMs share."""
    overlay = deployment.directory / "root.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(deployment.image.root), str(overlay)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise MachineError(f"cannot make the VM's disk: {result.stderr.strip()}", hint="is qemu-utils installed?")
