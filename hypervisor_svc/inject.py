# SPDX-License-Identifier: Apache-2.0
"""Packets that a frozen socket did not take are put back on the road: they come out of a TUN device, as if the client had
just sent them, and go wherever the redirect now points. Order and duplicates are TCP's business."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
import sys
from types import TracebackType

from guest_agent.handoff.snapshot import Endpoint
from hypervisor_svc.redirect import Flow

DEVICE = "streamlift-in"
_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001
_SIOCSIFFLAGS, _SIOCGIFFLAGS, _SIOCSIFMTU, _IFF_UP = 0x8914, 0x8913, 0x8922, 1
MTU = 65535
_FIN_ACK = 0x11


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    words = array.array("H", data + bytes(len(data) & 1))
    if sys.byteorder == "little":
        words.byteswap()
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _packed(endpoint: Endpoint) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in endpoint.address else socket.AF_INET, endpoint.address)


def build_packet(flow: Flow, segment: bytes) -> bytes:
    """An IP packet client -> server around a TCP segment, whose ports and checksum are made right."""
    source, to = _packed(flow.client), _packed(flow.server)
    tcp = struct.pack("!HH", flow.client.port, flow.server.port) + segment[4:16] + bytes(2) + segment[18:]
    if len(source) == 4:
        pseudo = source + to + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(tcp))
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, socket.IPPROTO_TCP, 0) + source + to
        head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    else:
        pseudo = source + to + struct.pack("!II", len(tcp), socket.IPPROTO_TCP)
        head = struct.pack("!IHBB", 6 << 28, len(tcp), socket.IPPROTO_TCP, 64) + source + to
    return head + tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]


def fin_segment(flow: Flow, *, sequence: int, acknowledge: int, window: int) -> bytes:
    """The FIN that the client sent and that nobody at home has seen (RFC 9293 section 3.10.7.4). Window unscaled."""
    ports = struct.pack("!HH", flow.client.port, flow.server.port)
    return ports + struct.pack("!IIBBHHH", sequence, acknowledge, 5 << 4, _FIN_ACK, window, 0, 0)


class Injector:
    """The TUN device; a context manager. Raises OSError if it cannot be made (no /dev/net/tun, no CAP_NET_ADMIN)."""

    def __init__(self) -> None:
        self._fd = -1
        self.injected = 0

    def __enter__(self) -> Injector:
        self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(self._fd, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN_NO_PI))
        for key, value in (("ipv6/conf/{}/disable_ipv6", "0"), ("ipv6/conf/{}/addr_gen_mode", "1"), ("ipv4/conf/{}/rp_filter", "2")):
            with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/net/{key.format(DEVICE)}", "w") as file:
                file.write(value)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            name = DEVICE.encode()
            fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si20x", name, MTU))
            flags = struct.unpack_from("16sh", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sh22x", name, 0)))[1]
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh22x", name, flags | _IFF_UP))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._fd = -1

    def inject(self, flow: Flow, segment: bytes) -> None:
        """Put one TCP segment of the client back on the road. One that does not go is as lost as any packet."""
        packet = build_packet(flow, segment)
        if len(packet) <= MTU:
            with contextlib.suppress(OSError):
                os.write(self._fd, packet)
                self.injected += 1
