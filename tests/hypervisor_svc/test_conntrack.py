# SPDX-License-Identifier: Apache-2.0
"""The bytes that go to the kernel, and what an independent decoder (pyroute2) reads in them."""

from __future__ import annotations

from typing import Any

import pytest
from pyroute2.netlink.nfnetlink.nfctsocket import nfct_msg

from guest_agent.handoff.snapshot import Endpoint
from hypervisor_svc import flow_set, netlink
from hypervisor_svc.conntrack import encode_create, encode_delete
from hypervisor_svc.redirect import Flow

CLIENT, SERVER, HOST = Endpoint("10.77.2.2", 40000), Endpoint("10.77.1.2", 80), Endpoint("10.77.1.1", 61000)
CLIENT6, SERVER6, HOST6 = Endpoint("fd77:2::2", 40000), Endpoint("fd77:1::2", 80), Endpoint("fd77:1::1", 61000)

_ORIGINAL = (
    "34000180 14000180 080001000a4d0202 080002000a4d0102"  # CTA_TUPLE_ORIG, _IP: source, destination
    "1c000280 0500010006000000 060002009c400000 0600030000500000"  # _PROTO: TCP, ports
)
_REPLY = "34000280 14000180 080001000a4d0102 080002000a4d0202 1c000280 0500010006000000 0600020000500000 060003009c400000"
_STATE = (
    "080003000000000e"  # SEEN_REPLY | ASSURED | CONFIRMED
    "0800070000069780"  # five days
    "20000480 1c000180 0500010003000000 0600040008080000 0600050008080000"  # ESTABLISHED, liberal both ways
)
_MAPPING = "08000800534c0000 28000d80 080001000a4d0101 080002000a4d0101 14000380 06000100ee480000 06000200ee480000"


def golden(*pieces: str) -> bytes:
    return bytes.fromhex("".join(pieces))


def test_golden_bytes() -> None:
    assert encode_delete(CLIENT, SERVER, 7) == golden("48000000 0201 0500 07000000 00000000 02000000", _ORIGINAL)
    assert encode_create(CLIENT, SERVER, HOST, 8) == golden(
        "dc000000 0001 0506 08000000 00000000 02000000", _ORIGINAL, _REPLY, _STATE, _MAPPING
    )
    assert encode_create(CLIENT, SERVER, None, 9) == golden(
        "ac000000 0001 0506 09000000 00000000 02000000", _ORIGINAL, _REPLY, _STATE
    )


@pytest.mark.parametrize(
    ("client", "server", "host"), [(CLIENT, SERVER, HOST), (CLIENT6, SERVER6, HOST6)], ids=["ipv4", "ipv6"]
)
def test_pyroute2_reads_the_same(client: Endpoint, server: Endpoint, host: Endpoint) -> None:
    message = decoded(encode_create(client, server, host, 1))
    assert tuple_of(message, "CTA_TUPLE_ORIG") == (client, server)
    assert tuple_of(message, "CTA_TUPLE_REPLY") == (server, client)
    assert message["CTA_STATUS"] == 14
    assert message["CTA_PROTOINFO"]["CTA_PROTOINFO_TCP"] == {
        "CTA_PROTOINFO_TCP_STATE": 3,
        "CTA_PROTOINFO_TCP_FLAGS_ORIGINAL": (8, 8),
        "CTA_PROTOINFO_TCP_FLAGS_REPLY": (8, 8),
    }
    mapping = message["CTA_NAT_DST"]
    version = "V6" if ":" in host.address else "V4"
    assert mapping[f"CTA_NAT_{version}_MINIP"] == mapping[f"CTA_NAT_{version}_MAXIP"] == host.address
    assert set(mapping["CTA_NAT_PROTO"].values()) == {host.port}
    assert message["CTA_MARK"] == 0x534C0000
    plain = decoded(encode_create(client, server, None, 1))
    assert "CTA_NAT_DST" not in plain and "CTA_MARK" not in plain
    assert tuple_of(decoded(encode_delete(client, server, 1)), "CTA_TUPLE_ORIG") == (client, server)


def decoded(data: bytes) -> dict[str, Any]:
    message = nfct_msg(data)
    message.decode()
    return plain_dict(message)


def plain_dict(message: Any) -> dict[str, Any]:
    """pyroute2's lists of attributes as dictionaries."""
    return {
        item[0]: plain_dict(item[1]) if isinstance(item[1], dict) and "attrs" in item[1] else item[1]
        for item in message["attrs"]
    }


def tuple_of(message: dict[str, Any], kind: str) -> tuple[Endpoint, Endpoint]:
    addresses, protocol = message[kind]["CTA_TUPLE_IP"], message[kind]["CTA_TUPLE_PROTO"]
    assert protocol["CTA_PROTO_NUM"] == 6
    source, to = addresses.values()
    return Endpoint(source, protocol["CTA_PROTO_SRC_PORT"]), Endpoint(to, protocol["CTA_PROTO_DST_PORT"])


def test_the_bytes_of_a_set_element() -> None:
    begin = "14000000 1000 0100 0b000000 00000000 0000000a"
    end = "14000000 1100 0100 0b000000 00000000 0000000a"
    element = (
        "0f000100 73747265616d6c6966740000 0a000200 686f6d6534000000"  # table "streamlift", set "home4"
        "20000380 1c000180 18000180 14000100 0a4d0202 9c400000 0a4d0102 00500000"  # the concatenated key
    )
    add = "50000000 0c0a 0504 0b000000 00000000 01000000"
    quiet = "50000000 0c0a 0104 0b000000 00000000 01000000"
    remove = "50000000 0e0a 0500 0b000000 00000000 01000000"
    flow = Flow(CLIENT, SERVER)
    encoded = flow_set.encode(flow, "home", remove=False, family=flow_set.INET, sequence=11)
    assert encoded == golden(begin, add, element, end)
    encoded = flow_set.encode(flow, "home", remove=True, family=flow_set.INET, sequence=11)
    assert encoded == golden(begin, quiet, element, remove, element, end)


def test_attributes_are_read_back_and_rubbish_ends_the_list() -> None:
    data = netlink.attribute(5, b"abc") + netlink.nest(6, netlink.attribute(1, b"x"))
    assert list(netlink.attributes(data)) == [(5, b"abc"), (6, netlink.attribute(1, b"x"))]
    assert list(netlink.attributes(data + b"\x01\x00\x00\x00")) == list(netlink.attributes(data))
