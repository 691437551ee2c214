# SPDX-License-Identifier: Apache-2.0
"""Packets that are built for the road: headers, checksum, and what a merged segment says about how to cut it."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from guest_agent.handoff.segment import ones_sum
from guest_agent.handoff.snapshot import Endpoint
from hypervisor_svc.inject import CUT, build_packet, fin_segment
from hypervisor_svc.redirect import Flow

FLOWS = {
    "ipv4": Flow(Endpoint("10.77.2.2", 40000), Endpoint("10.77.1.2", 80)),
    "ipv6": Flow(Endpoint("fd77:2::2", 40000), Endpoint("fd77:1::2", 80)),
}
VNET = struct.Struct("=BBHHHH")


def segment(payload: bytes, *, timestamps: bool = True) -> bytes:
    """One as it is kept: the host's port, a checksum that nobody computed."""
    options = b"\x01\x01\x08\x0a" + bytes(8) if timestamps else b""
    return struct.pack("!HHIIBBHHH", 40000, 61007, 5, 6, (20 + len(options)) << 2, 0x18, 100, 0xDEAD, 0) + options + payload


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_packet_is_whole(name: str, size: int) -> None:
    flow, payload = FLOWS[name], os.urandom(size)
    data = build_packet(flow, segment(payload))
    flags, kind, headers, cut, start, offset = VNET.unpack_from(data)
    packet = data[VNET.size :]
    version = 4 if name == "ipv4" else 6
    assert packet[0] >> 4 == version
    assert (flags, kind, cut, start, offset) == (1, 0, 0, 20 if version == 4 else 40, 16)
    tcp = packet[start:]
    assert struct.unpack("!HH", tcp[:4]) == (40000, 80)
    assert packet[headers:] == payload
    assert tcp[4:16] == segment(payload)[4:16]
    addresses = packet[12:20] if version == 4 else packet[8:40]
    length = struct.unpack("!H", packet[2:4] if version == 4 else packet[4:6])[0]
    assert length == len(packet) - (0 if version == 4 else 40)
    if version == 4:
        assert ones_sum(packet[:20]) == 0xFFFF
    pseudo = ones_sum(addresses + struct.pack("!II", len(tcp), socket.IPPROTO_TCP))
    assert struct.unpack("!H", tcp[16:18])[0] == pseudo, "the kernel completes the sum from here"


@pytest.mark.parametrize("name", FLOWS)
def test_a_merged_segment_says_how_to_cut_it(name: str) -> None:
    _, kind, headers, cut, start, _ = VNET.unpack_from(build_packet(FLOWS[name], segment(bytes(50_000))))
    assert kind == (1 if name == "ipv4" else 4)
    assert headers == start + 32
    assert headers + cut == CUT


@pytest.mark.parametrize(
    "bad", [b"", bytes(19), bytes(20), segment(b"")[:25], segment(bytes(65_530))], ids=["none", "19", "zero", "cut", "large"]
)
def test_what_is_no_segment_is_refused(bad: bytes) -> None:
    with pytest.raises(ValueError):
        build_packet(FLOWS["ipv4"], bad)


def test_fin() -> None:
    flow = FLOWS["ipv4"]
    plain = fin_segment(flow, sequence=1, acknowledge=2, window=3)
    assert plain == bytes.fromhex("9c400050 00000001 00000002 5011 0003 0000 0000")
    stamped = fin_segment(flow, sequence=1, acknowledge=2, window=3, timestamps=(4, 5))
    assert stamped == bytes.fromhex("9c400050 00000001 00000002 8011 0003 0000 0000 0101080a 00000004 00000005")
    assert build_packet(flow, plain)
