# SPDX-License-Identifier: Apache-2.0
"""The judge of captures must be able to find fault. Pure."""

from __future__ import annotations

import struct

import pytest

from tests.namespaces.capture import ACK, FIN, RST, SYN, Packet, judge, parse

CLIENT, SERVER = ("10.77.2.2", 40000), ("10.77.1.2", 80)
START = 0xFFFFFFF0


def server(payload: bytes = b"", *, at: int = 0, flags: int = ACK, acknowledge: int = 100, timestamp: int = 1000) -> Packet:
    return Packet(SERVER, CLIENT, (START + at) & 0xFFFFFFFF, acknowledge, flags, payload, timestamp)


OPEN = [
    Packet(CLIENT, SERVER, 99, 0, SYN, b""),
    Packet(SERVER, CLIENT, START - 1, 100, SYN | ACK, b"", 999),
    server(b"HTTP/1.1 200 OK\r\n"),
    server(b"a file that goes on past the wrap", at=17, timestamp=1001),
]
CLOSE = Packet(CLIENT, SERVER, 100, 0, FIN | ACK, b"")


def faults(*more: Packet, resets: int = 0) -> list[str]:
    return judge(iter([*OPEN, *more]), {SERVER}, resets=resets)


@pytest.mark.parametrize(
    "more",
    [
        [],
        [server(b"HTTP/1.1 200", timestamp=1002)],
        [server(b"wrap", at=46, timestamp=1002), server(b"and more", at=50, timestamp=1002)],
        [server(b"later", at=60, timestamp=1002), server(b"0123456789", at=50, timestamp=1002)],
        [server(b"\0", at=-1, timestamp=1002)],
        [server(at=50, flags=FIN | ACK, timestamp=1002), server(at=50, flags=FIN | ACK, timestamp=1003)],
        [CLOSE, server(at=50, flags=RST)],
    ],
    ids=["as it is", "again", "overlap", "gap", "probe", "fin", "reset of a closed one"],
)
def test_an_honest_endpoint(more: list[Packet]) -> None:
    assert faults(*more) == []


@pytest.mark.parametrize(
    ("packet", "word"),
    [
        (server(b"HTTP/1.1 404", timestamp=1002), "other bytes"),
        (server(at=50, flags=RST | ACK), "were reset"),
        (server(b"x", at=50, acknowledge=99, timestamp=1002), "acknowledges"),
        (server(b"x", at=50, timestamp=900), "clock"),
        (server(b"x", at=-5, timestamp=1002), "before the beginning"),
        (Packet(("10.77.1.2", 61000), CLIENT, START, 100, ACK, b""), "not a server's address"),
        (Packet(("10.77.2.1", 61000), CLIENT, START, 100, ACK, b""), "not a server's address"),
    ],
)
def test_two_owners(packet: Packet, word: str) -> None:
    (fault,) = faults(packet)
    assert word in fault


def test_nothing_follows_a_fin() -> None:
    assert "after the FIN" in faults(server(at=50, flags=FIN | ACK, timestamp=1002), server(b"x", at=50, timestamp=1003))[0]


def test_a_reset_may_be_due_but_only_where_the_stream_is() -> None:
    assert faults(server(at=50, flags=RST), resets=1) == []
    assert "RST at" in faults(server(at=5000, flags=RST), resets=1)[0]


@pytest.mark.parametrize("version", [4, 6])
def test_parse(version: int) -> None:
    options = b"\x01\x01\x08\x0a" + struct.pack("!II", 77, 0)
    tcp = struct.pack("!HHIIBBHHH", 80, 40000, 7, 8, 8 << 4, ACK, 1, 0, 0) + options + b"data"
    if version == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + bytes([10, 77, 1, 2, 10, 77, 2, 2])
        ends = SERVER, CLIENT
    else:
        head = struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + bytes(15) + b"\1" + bytes(15) + b"\2"
        ends = ("::1", 80), ("::2", 40000)
    assert parse(head + tcp + b"padding") == Packet(*ends, 7, 8, ACK, b"data", 77)
