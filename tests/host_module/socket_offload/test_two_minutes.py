# SPDX-License-Identifier: Apache-2.0
"""Two minutes frozen, one wait for connections of every kind: nothing leaves, and then no timer has counted the time. In a network
namespace of its own: `tests/vm/test_modules.py` runs it beside the other tests."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

from guest_agent.handoff import hold, kernel
from guest_agent.handoff.socket_offload import Device
from tests.guest_agent.handoff.loopback import KINDS
from tests.host_module.socket_offload.connections import (
    Pair,
    connected,
    exchange,
    own_network,
    put,
    receive_all,
    round_trip,
    wait_for,
)
from tests.namespaces import capture

SECONDS = 120
USER_TIMEOUT_MS = 20_000
"""After so long without an acknowledgement a connection is given up (TCP_USER_TIMEOUT): less than it is frozen."""
DATA = ("receive", "unacked", "unsent", "out-of-order")
WAYS = ("thawed", "imported")


def prepare(pair: Pair, data: str) -> None:
    """Everything that could make it speak: data under way and being sent again, a keepalive every second, a full window."""
    for name, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)):
        pair.server.setsockopt(socket.IPPROTO_TCP, name, value)
    put(pair, kernel.ESTABLISHED, data)
    pair.deafen()
    pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if data == "unacked":
        wait_for(lambda: pair.server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 3)[2], "a retransmission")


def wake(device: Device, pair: Pair, data: str) -> None:
    """What the client says afterwards is heard as well."""
    hold.detach(pair.server)
    device.thaw(pair.server)
    if data == "out-of-order":
        pair.client.sendall(pair.to_server)
    receive_all(pair)
    exchange(pair)
    assert round_trip(pair.server) < 10, "the time in which it was frozen is no round trip"


def test_two_minutes(tmp_path: Path) -> None:
    device = Device()
    with own_network(), contextlib.ExitStack() as stack:
        pairs = {}
        for kind in sorted(KINDS):
            for data in DATA:
                for way in WAYS:
                    pair = pairs[kind, data, way] = stack.enter_context(connected(kind))
                    prepare(pair, data)
        time.sleep(0.3)  # what the clients had put off to say is said: nobody would be there while a socket is rebuilt
        for (_, _, way), pair in pairs.items():
            snapshot = device.freeze_export(pair.server)
            if way == "imported":
                device.import_into(pair.server, snapshot)
            hold.attach(pair.server, None)
            pair.cure()
        device.close()  # it may be unloaded meanwhile
        ports = {pair.server.getsockname()[1] for pair in pairs.values()}
        with capture.captured(None, tmp_path / "frozen.pcap", "lo"):
            time.sleep(SECONDS)
        assert [packet for packet in capture.read(tmp_path / "frozen.pcap") if packet.source[1] in ports] == []
        device = loaded()
        for (_, data, _), pair in pairs.items():
            wake(device, pair, data)
        device.close()


def loaded() -> Device:
    """The device, as soon as it is there: another test may just be loading it."""
    found: list[Device] = []

    def look() -> bool:
        with contextlib.suppress(OSError):
            found.append(Device())
        return bool(found)

    wait_for(look, "the module")
    return found[0]
