# SPDX-License-Identifier: Apache-2.0
"""The XML that is given to libvirt, and what is read back from it."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest

from hypervisor_svc import attach
from hypervisor_svc.deploy import Deployment, _check_gateways, domain_element, kernel_arguments, network_element


@dataclass(frozen=True)
class Parts:
    root: Path = Path("/images/root.ext4")
    kernel: Path = Path("/images/vmlinuz")
    initrd: Path = Path("/images/initrd.img")


@pytest.fixture
def deployment() -> Deployment:
    return Deployment(name="media", image=Parts(), share_directory=Path("/srv/media"))


def reparsed(element: ET.Element) -> ET.Element:
    return ET.fromstring(ET.tostring(element, encoding="unicode"))


def test_domain_has_channel_share_and_addresses(deployment: Deployment) -> None:
    domain = reparsed(domain_element(deployment, "tcg"))
    assert domain.get("type") == "qemu"
    assert attach.addresses_of(domain) == ("10.78.0.2", "fd78::2")
    assert attach.share_path(domain) == Path("/srv/media")
    target = domain.find("devices/channel/target")
    assert target is not None and target.get("name") == "org.streamlift.offload.0"
    # No source: libvirt chooses the path, so no two VMs can be given the same one.
    assert domain.find("devices/channel/source") is None
    assert attach.channel_path(domain) is None


def test_kvm_passes_the_processor_through(deployment: Deployment) -> None:
    domain = domain_element(deployment, "kvm")
    cpu = domain.find("cpu")
    assert domain.get("type") == "kvm"
    assert cpu is not None and cpu.get("mode") == "host-passthrough"


def test_share_is_read_only_unless_asked(deployment: Deployment) -> None:
    writable = dataclasses.replace(deployment, read_only_share=False)
    assert domain_element(deployment, "tcg").find("devices/filesystem/readonly") is not None
    assert domain_element(writable, "tcg").find("devices/filesystem/readonly") is None


def test_routed_network_is_open_and_carries_the_gateways(deployment: Deployment) -> None:
    network = network_element(deployment)
    forward = network.find("forward")
    assert forward is not None and forward.get("mode") == "open"
    assert network.find(".//dhcp") is None
    found = [(ip.get("family"), ip.get("address"), ip.get("prefix")) for ip in network.iterfind("ip")]
    assert found == [("ipv4", "10.78.0.1", "24"), ("ipv6", "fd78::1", "64")]


def test_bridged_domain_joins_the_bridge_without_a_network(deployment: Deployment) -> None:
    bridged = dataclasses.replace(
        deployment, mode="bridged", bridge="br0", address4="192.0.2.7/24", gateway4="192.0.2.254", address6=None
    )
    source = domain_element(bridged, "tcg").find("devices/interface/source")
    assert source is not None and source.attrib == {"bridge": "br0"}
    assert bridged.gateways == ("192.0.2.254",)


def test_bridged_domain_has_no_gateway_unless_given(deployment: Deployment) -> None:
    assert dataclasses.replace(deployment, mode="bridged").gateways == ()


@pytest.mark.parametrize("gateway", ["192.0.3.1", "192.0.2.1/24", "router"])
def test_a_gateway_that_the_vm_cannot_reach_is_refused(deployment: Deployment, gateway: str) -> None:
    bridged = dataclasses.replace(deployment, mode="bridged", bridge="br0", address4="192.0.2.7/24", gateway4=gateway)
    with pytest.raises(attach.MachineError) as caught:
        _check_gateways(bridged)
    assert caught.value.hint


def test_a_link_local_gateway_is_reachable(deployment: Deployment) -> None:
    _check_gateways(dataclasses.replace(deployment, mode="bridged", bridge="br0", gateway6="fe80::1"))


def test_kernel_arguments_hand_over_the_network(deployment: Deployment) -> None:
    words = kernel_arguments(deployment).split()
    assert [word for word in words if word.startswith("streamlift.")] == [
        "streamlift.address=10.78.0.2/24",
        "streamlift.address=fd78::2/64",
        "streamlift.gateway=10.78.0.1",
        "streamlift.gateway=fd78::1",
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [("10.0.0.2/24", "10.0.0.2"), ("FD78:0:0::2", "fd78::2"), ("192.0.2.1", "192.0.2.1")],
)
def test_addresses_are_written_canonically(given: str, expected: str) -> None:
    assert attach.canonical([given]) == (expected,)


@pytest.mark.parametrize("bad", ["", "10.0.0", "10.0.0.2/33", "host.example"])
def test_bad_addresses_are_refused_with_a_hint(bad: str) -> None:
    with pytest.raises(attach.MachineError) as caught:
        attach.canonical([bad])
    assert caught.value.hint


def test_channel_path_comes_from_the_live_xml() -> None:
    live = ET.fromstring(
        "<domain><devices><channel type='unix'><source mode='bind' path='/run/x/org.streamlift.offload.0'/>"
        "<target type='virtio' name='org.streamlift.offload.0' state='connected'/></channel></devices></domain>"
    )
    assert attach.channel_path(live) == Path("/run/x/org.streamlift.offload.0")


def test_other_channels_and_shares_are_not_ours() -> None:
    other = ET.fromstring(
        "<domain><devices><channel type='unix'><source mode='bind' path='/run/ga'/>"
        "<target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        "<filesystem type='mount'><source dir='/home'/><target dir='home'/></filesystem></devices></domain>"
    )
    assert attach.channel_path(other) is None
    assert attach.share_path(other) is None
    assert attach.addresses_of(other) == ()
