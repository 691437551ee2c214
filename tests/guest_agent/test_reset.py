# SPDX-License-Identifier: Apache-2.0
"""The probe's bytes; that a real client learns from it that its server is gone is in `tests/namespaces/test_faults.py`."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from guest_agent import reset
from guest_agent.handoff.segment import is_intact
from guest_agent.handoff.snapshot import Endpoint, Snapshot
from tests.guest_agent.handoff.samples import SNAPSHOT

IPV6 = replace(SNAPSHOT, local=Endpoint("2001:db8::1", 80), peer=Endpoint("2001:db8::2", 50000))


@pytest.mark.parametrize("snapshot", [SNAPSHOT, replace(SNAPSHOT, timestamps=False), IPV6])
def test_probe_is_a_keepalive(snapshot: Snapshot) -> None:
    """One octet that the client has acknowledged, with a checksum that holds."""
    probe = reset.build_probe(snapshot, 0.5)
    source, to, sequence, acknowledge, offset, flags = struct.unpack_from("!HHIIBB", probe)
    assert (source, to) == (snapshot.local.port, snapshot.peer.port)
    assert (sequence, acknowledge) == ((snapshot.send_sequence - 1) % (1 << 32), snapshot.receive_next)
    assert (offset >> 2, flags) == (len(probe) - 1, 0x10)
    assert is_intact(probe, snapshot.local.address, snapshot.peer.address)


@pytest.mark.parametrize("microseconds,ticks", [(False, 500), (True, 500_000)])
def test_clock_has_gone_on(microseconds: bool, ticks: int) -> None:
    probe = reset.build_probe(replace(SNAPSHOT, timestamp=(1 << 32) - 1, timestamp_usec=microseconds), 0.5)
    assert ticks <= struct.unpack_from("!I", probe, 24)[0] + 1 <= ticks + 3
