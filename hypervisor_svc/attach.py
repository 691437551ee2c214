# SPDX-License-Identifier: Apache-2.0
"""What makes a libvirt domain a Streamlift VM: the channel, the shared folder and the addresses.

`attach` adds them to a VM that exists and `detach` takes them away; `deploy` puts the same elements into the
VMs that it makes.
"""

import contextlib
import ipaddress
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import libvirt

from hypervisor_svc.errors import OperatorError

CHANNEL_NAME = "org.streamlift.offload.0"
SHARE_TAG = "streamlift"
NAMESPACE = "https://streamlift.org/xmlns/1"
PREFIX = "streamlift"
SHUTDOWN_LIMIT = 120.0
"""Seconds for a VM to shut down."""

ET.register_namespace(PREFIX, NAMESPACE)


class MachineError(OperatorError):
    """A VM cannot be changed as asked."""


@dataclass(frozen=True)
class Change:
    """What `attach` or `detach` did: the parts, and whether the VM must be restarted to see all of them."""

    parts: tuple[str, ...]
    restart_needed: bool
    share: Path | None = None

    @property
    def message(self) -> str:
        """One line for people."""
        ending = "; restart the VM (shut it down and start it again) to complete it" if self.restart_needed else ""
        return (f"changed: {', '.join(self.parts)}" if self.parts else "nothing to change") + ending


def attach(
    connection: libvirt.virConnect,
    name: str,
    *,
    share_directory: Path | None = None,
    addresses: Sequence[str] = (),
    read_only: bool = True,
) -> Change:
    """Give a VM the channel, the share and its addresses. Doing it twice changes nothing the second time; what is not given
    stays as it is.

    The channel reaches a running VM at once; the share needs a restart, for QEMU cannot plug 9p.
    """
    domain = find_domain(connection, name)
    share = (share_directory or _share_path(_definition(domain)) or Path()).resolve()
    if not share_directory and _share_path(_definition(domain)) is None:
        raise MachineError(f"{name!r} has no share yet", hint="name the folder with the media files: --share FOLDER")
    if not share.is_dir():
        raise MachineError(f"{share} is not a folder", hint="create it, or name the folder with the media files")
    parts: list[str] = []
    if _channel(_definition(domain)) is None:
        _add_channel(domain)
        parts.append("channel")
    if _share_path(_definition(domain)) != share:
        _put_share(connection, domain, share=share, read_only=read_only)
        parts.append("share")
    if addresses and addresses_of(_definition(domain)) != canonical(addresses):
        _set_addresses(domain, canonical(addresses))
        parts.append("addresses")
    return Change(tuple(parts), _is_incomplete(domain), share)


def detach(connection: libvirt.virConnect, name: str) -> Change:
    """Take away what `attach` gave. Doing it twice changes nothing the second time."""
    domain = find_domain(connection, name)
    parts: list[str] = []
    restart = False
    channel = _channel(_definition(domain))
    if channel is not None:
        restart |= not _remove_channel(domain, channel)
        parts.append("channel")
    if _share_path(_definition(domain)) is not None:
        _drop_share(connection, domain)
        restart |= bool(domain.isActive())
        parts.append("share")
    if addresses_of(_definition(domain)):
        _set_addresses(domain, ())
        parts.append("addresses")
    return Change(tuple(parts), restart)


def complete(connection: libvirt.virConnect, name: str) -> None:
    """What a running VM lacks of what `attach` gave it, it gets by a fresh start: shut it down as its power button does, wait,
    and start it again. One that has all runs on; one that is off is started."""
    domain = find_domain(connection, name)
    if domain.isActive():
        if not _is_incomplete(domain):
            return
        domain.shutdown()
        deadline = time.monotonic() + SHUTDOWN_LIMIT
        while domain.isActive():
            if time.monotonic() > deadline:
                hint = f"switch it off from inside (poweroff), then: virsh start {name}"
                raise MachineError(f"{name!r} does not hear its power button: not off after {SHUTDOWN_LIMIT:g} s", hint)
            time.sleep(0.2)
    domain.create()


def find_domain(connection: libvirt.virConnect, name: str) -> libvirt.virDomain:
    """The VM with this name, or an error that lists those that exist."""
    try:
        return connection.lookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        names = ", ".join(sorted(domain.name() for domain in connection.listAllDomains())) or "none"
        raise MachineError(f"there is no VM named {name!r}", hint=f"VMs here: {names}") from error


def channel_element() -> ET.Element:
    """The port; with no source, libvirt chooses the socket's path and keeps it safe."""
    channel = ET.Element("channel", type="unix")
    ET.SubElement(channel, "target", type="virtio", name=CHANNEL_NAME)
    return channel


def share_element(share: Path, *, read_only: bool) -> ET.Element:
    """The folder as a 9p file system with our mount tag.

    QEMU must not renumber inodes (multidevs="remap"): by the number the service knows that the file it opens is
    the one that the guest has open.
    """
    filesystem = ET.Element("filesystem", type="mount", accessmode="passthrough")
    ET.SubElement(filesystem, "source", dir=str(share))
    ET.SubElement(filesystem, "target", dir=SHARE_TAG)
    if read_only:
        ET.SubElement(filesystem, "readonly")
    return filesystem


def metadata_element(addresses: Sequence[str]) -> ET.Element:
    """The addresses that belong to the VM: the service redirects no other address for it."""
    element = ET.Element(f"{{{NAMESPACE}}}vm")
    for address in addresses:
        ET.SubElement(element, f"{{{NAMESPACE}}}address").text = address
    return element


def canonical(addresses: Sequence[str]) -> tuple[str, ...]:
    """Plain addresses in their canonical text; `10.0.0.2/24` counts as `10.0.0.2`."""
    try:
        return tuple(str(ipaddress.ip_interface(address).ip) for address in addresses)
    except ValueError as error:
        raise MachineError(str(error), hint="write addresses like 192.0.2.7 or 2001:db8::7") from error


def addresses_of(definition: ET.Element) -> tuple[str, ...]:
    """The addresses in a domain's metadata; empty if there are none."""
    found = definition.findall(f"metadata/{{{NAMESPACE}}}vm/{{{NAMESPACE}}}address")
    return tuple(address.text for address in found if address.text)


def channel_path(definition: ET.Element) -> Path | None:
    """The socket of the channel of a running domain (live XML); None if it has no channel."""
    channel = _channel(definition)
    source = channel.find("source") if channel is not None else None
    path = source.get("path") if source is not None else None
    return Path(path) if path else None


def share_path(definition: ET.Element) -> Path | None:
    """The host's folder behind our mount tag, or None."""
    return _share_path(definition)


def _definition(domain: libvirt.virDomain) -> ET.Element:
    return ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))


def _channel(definition: ET.Element) -> ET.Element | None:
    for channel in definition.iterfind("devices/channel"):
        target = channel.find("target")
        if target is not None and target.get("name") == CHANNEL_NAME:
            return channel
    return None


def _shares(definition: ET.Element) -> list[ET.Element]:
    found = []
    for filesystem in definition.iterfind("devices/filesystem"):
        target = filesystem.find("target")
        if target is not None and target.get("dir") == SHARE_TAG:
            found.append(filesystem)
    return found


def _share_path(definition: ET.Element) -> Path | None:
    for filesystem in _shares(definition):
        source = filesystem.find("source")
        if source is not None and source.get("dir"):
            return Path(str(source.get("dir")))
    return None


def _is_incomplete(domain: libvirt.virDomain) -> bool:
    """Whether it runs without something that its configuration has."""
    if not domain.isActive():
        return False
    live, wanted = ET.fromstring(domain.XMLDesc()), _definition(domain)
    return _channel(live) is None or _share_path(live) != _share_path(wanted)


def _add_channel(domain: libvirt.virDomain) -> None:
    """Add the channel to the configuration and, if it runs, to the VM."""
    text = ET.tostring(channel_element(), encoding="unicode")
    domain.attachDeviceFlags(text, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    if domain.isActive():
        # No virtio-serial controller or no free port in the running machine: the configuration has both.
        with contextlib.suppress(libvirt.libvirtError):
            domain.attachDeviceFlags(text, libvirt.VIR_DOMAIN_AFFECT_LIVE)


def _remove_channel(domain: libvirt.virDomain, channel: ET.Element) -> bool:
    text = ET.tostring(channel, encoding="unicode")
    domain.detachDeviceFlags(text, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    if not domain.isActive():
        return True
    live = _channel(ET.fromstring(domain.XMLDesc()))
    if live is None:
        return True
    try:
        domain.detachDeviceFlags(ET.tostring(live, encoding="unicode"), libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError:
        return False
    return True


def _put_share(connection: libvirt.virConnect, domain: libvirt.virDomain, *, share: Path, read_only: bool) -> None:
    definition = _without_shares(domain)
    devices = definition.find("devices")
    assert devices is not None
    devices.append(share_element(share, read_only=read_only))
    connection.defineXML(ET.tostring(definition, encoding="unicode"))


def _drop_share(connection: libvirt.virConnect, domain: libvirt.virDomain) -> None:
    connection.defineXML(ET.tostring(_without_shares(domain), encoding="unicode"))


def _without_shares(domain: libvirt.virDomain) -> ET.Element:
    definition = ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))
    devices = definition.find("devices")
    assert devices is not None
    for filesystem in _shares(definition):
        devices.remove(filesystem)
    return definition


def _set_addresses(domain: libvirt.virDomain, addresses: Sequence[str]) -> None:
    """What `deploy` keeps beside the addresses stays: `undeploy` knows its VMs by it."""
    element = metadata_element(addresses)
    deployed = _definition(domain).find(f"metadata/{{{NAMESPACE}}}vm/{{{NAMESPACE}}}deployed")
    if deployed is not None:
        element.append(deployed)
    _set_metadata(domain, element if len(element) else None)


def _set_metadata(domain: libvirt.virDomain, element: ET.Element | None) -> None:
    flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
    if domain.isActive():
        flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
    text = None
    if element is not None:
        # libvirt puts our namespace on every element that has none, and refuses one that is declared already.
        for part in element.iter():
            part.tag = part.tag.removeprefix(f"{{{NAMESPACE}}}")
        text = ET.tostring(element, encoding="unicode")
    domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, text, PREFIX, NAMESPACE, flags)
