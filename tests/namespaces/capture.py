# SPDX-License-Identifier: Apache-2.0
"""Did the client's link carry anything that one honest TCP endpoint would not have sent? Pure, but for `tcpdump`.

Every connection is judged by what came from the server's side: one address and port; the same bytes whenever a sequence
number comes again; nothing beyond the end (FIN); acknowledgements and timestamps that never go back (RFC 9293 section 3.4,
RFC 7323 section 5); and no RST, except where the test says that one is due, and then at the sequence number that is next.
Before such a RST the client may be asked to speak, once: by a keepalive whose acknowledgement may be an old one, because who
knew better is dead (`guest_agent/reset.py`)."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.namespaces.topology import Namespace

FIN, SYN, RST, ACK = 1, 2, 4, 16
_HALF, _U32 = 1 << 31, 0xFFFFFFFF
_FILE_HEADER, _RECORD = 24, struct.Struct("=IIII")
_ETHERNET = 14
AT_ONCE = ("--immediate-mode", "-s", "80000", "-B", "262144")
"""Of tcpdump(8): the kernel hands over each packet when it comes. Else it does once a second, and what came in the last one is lost
when tcpdump ends. A packet takes up the whole snapshot length of the buffer (KiB)."""


@dataclass(frozen=True)
class Packet:
    """One TCP packet; `timestamp` is its TSval."""

    source: tuple[str, int]
    to: tuple[str, int]
    sequence: int
    acknowledge: int
    flags: int
    payload: bytes
    timestamp: int | None = None


@contextlib.contextmanager
def captured(where: Namespace | None, file: Path, device: str = "eth0") -> Iterator[None]:
    """Write what passes the device (of our own namespace, if None) to a pcap file meanwhile; everything is in it afterwards."""
    argv = ["tcpdump", "-i", device, "-n", "-U", *AT_ONCE, "-w", str(file), "tcp"]
    popen = subprocess.Popen if where is None else where.popen
    with popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as tcpdump:
        assert tcpdump.stderr is not None
        while b"listening" not in (line := tcpdump.stderr.readline()):
            if not line:
                raise RuntimeError("tcpdump did not start")
        try:
            yield
        finally:
            tcpdump.send_signal(signal.SIGINT)
            words = tcpdump.stderr.read()
    if b"\n0 packets dropped by kernel" not in words:
        raise RuntimeError(f"tcpdump lost packets: {words.decode()}")


def read(file: Path) -> Iterator[Packet]:
    """The TCP packets of a pcap file (Ethernet)."""
    data = memoryview(file.read_bytes())
    at = _FILE_HEADER
    while at + _RECORD.size <= len(data):
        _, _, length, _ = _RECORD.unpack_from(data, at)
        packet = parse(bytes(data[at + _RECORD.size + _ETHERNET : at + _RECORD.size + length]))
        if packet is not None:
            yield packet
        at += _RECORD.size + length


def parse(data: bytes) -> Packet | None:
    """An IP packet; None if it is not TCP."""
    if data[0] >> 4 == 4:
        start, protocol, end = (data[0] & 15) * 4, data[9], int.from_bytes(data[2:4], "big")
        source, to = data[12:16], data[16:20]
    else:
        start, protocol, end = 40, data[6], 40 + int.from_bytes(data[4:6], "big")
        source, to = data[8:24], data[24:40]
    if protocol != 6:
        return None
    if end in (0, 40):  # merged by the kernel to more than 64 KiB: no length
        end = len(data)
    sender, receiver, sequence, acknowledge, offset, flags = struct.unpack_from("!HHIIBB", data, start)
    payload = start + (offset >> 4) * 4
    return Packet(
        (str(ipaddress.ip_address(source)), sender),
        (str(ipaddress.ip_address(to)), receiver),
        sequence,
        acknowledge,
        flags,
        data[payload:end],
        _timestamp(data[start + 20 : payload]),
    )


def _timestamp(options: bytes) -> int | None:
    at = 0
    while at + 1 < len(options) and options[at] != 0:
        if options[at] == 8:
            return int.from_bytes(options[at + 2 : at + 6], "big")
        at += 1 if options[at] == 1 else max(2, options[at + 1])
    return None


@dataclass
class _Server:
    """What the server's side of one connection has said so far; positions count from its SYN."""

    start: int
    stream: bytearray = field(default_factory=bytearray)
    known: bytearray = field(default_factory=bytearray)
    end: int | None = None
    acknowledged: int | None = None
    clock: int | None = None
    client_closed: bool = False
    probed: bool = False


def judge(packets: Iterator[Packet], servers: set[tuple[str, int]], *, resets: int = 0) -> list[str]:
    """What no honest endpoint would have sent, in words. `servers` are the addresses and ports that clients speak to. A RST is
    fine towards a client that has closed; beyond that at most `resets` connections may end with one, and may be probed before."""
    connections: dict[tuple[tuple[str, int], tuple[str, int]], _Server] = {}
    faults: list[str] = []
    reset: set[tuple[tuple[str, int], tuple[str, int]]] = set()
    clients: set[str] = set()
    for packet in packets:
        if packet.to in servers:
            clients.add(packet.source[0])
            known = connections.get((packet.to, packet.source))
            if known and packet.flags & (FIN | RST):
                known.client_closed = True
            continue
        key = (packet.source, packet.to)
        if packet.source not in servers:
            if packet.to[0] in clients:
                faults.append(f"{packet.source} speaks to {packet.to}: not a server's address")
            continue
        if packet.flags & SYN:
            connections[key] = _Server(packet.sequence + 1)
        elif key in connections:
            server = connections[key]
            if packet.flags & RST and not server.client_closed:
                reset.add(key)
            if resets and not server.probed and _is_probe(server, packet):
                server.probed = True
                continue
            faults += [f"{packet.source} to {packet.to}: {fault}" for fault in _check(server, packet)]
    if len(reset) > resets:
        faults.append(f"{len(reset)} connections were reset, {resets} were to be: {sorted(reset)}")
    return faults


def _is_probe(server: _Server, packet: Packet) -> bool:
    """A keepalive (RFC 9293 section 3.8.4), with its garbage octet, or with an acknowledgement that is older than the last."""
    below = (packet.sequence - server.start - len(server.stream)) & _HALF
    old = server.acknowledged is not None and (packet.acknowledge - server.acknowledged) & _HALF
    return bool(below and packet.flags == ACK and (len(packet.payload) == 1 or (old and not packet.payload)))


def _check(server: _Server, packet: Packet) -> Iterator[str]:
    position = (packet.sequence - server.start) & _U32
    position = position - (1 << 32) if position >= _HALF else position
    if packet.flags & RST:
        if position > len(server.stream) + 1:
            yield f"RST at {position}, the stream is at {len(server.stream)}"
        return
    if packet.payload:
        yield from _check_payload(server, packet.payload, position)
    if packet.flags & FIN:
        end = position + len(packet.payload)
        if server.end not in (None, end):
            yield f"FIN at {end}, and another at {server.end}"
        server.end = end
    yield from _check_order(server, packet)


def _check_payload(server: _Server, payload: bytes, position: int) -> Iterator[str]:
    if position < -1:
        yield f"data at {position}, before the beginning"
        return
    if position < 0:
        return  # a keepalive or a window probe (RFC 9293 section 3.8.4)
    end = position + len(payload)
    if server.end is not None and end > server.end:
        yield f"data up to {end}, after the FIN at {server.end}"
    have = min(end, len(server.stream))
    if position < have:
        old, seen = server.stream[position:have], server.known[position:have]
        if old != payload[: have - position] and any(k and a != b for k, a, b in zip(seen, old, payload, strict=False)):
            yield f"other bytes than before at {position}"
    if end > len(server.stream):
        grown = end - len(server.stream)
        server.stream += bytes(grown)
        server.known += bytes(grown)
    server.stream[position:end] = payload
    server.known[position:end] = b"\x01" * len(payload)


def _check_order(server: _Server, packet: Packet) -> Iterator[str]:
    if packet.flags & ACK:
        if server.acknowledged is not None and (packet.acknowledge - server.acknowledged) & _HALF:
            yield f"acknowledges {packet.acknowledge}, and {server.acknowledged} before"
        server.acknowledged = packet.acknowledge
    if packet.timestamp is not None:
        if server.clock is not None and (packet.timestamp - server.clock) & _HALF:
            yield f"its clock went back by {(server.clock - packet.timestamp) & _U32}"
        server.clock = packet.timestamp
