# SPDX-License-Identifier: Apache-2.0
"""Packets that a frozen socket did not take are put back on the road: they come out of a TUN device, as if the client had
just sent them, and go wherever the redirect now points. Order and duplicates are TCP's business.

What was kept may be many segments that the kernel had merged (GRO). The device takes it whole, with a virtio_net_hdr that
says how to cut it again where the road needs that, and leaves the checksum to the kernel."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from types import TracebackType
from typing import Self

from guest_agent.handoff.segment import ones_sum, packed, pseudo_sum
from hypervisor_svc.redirect import Flow

DEVICE = "streamlift-in"
MTU = 65535
ADDRESS = "192.0.0.8"
"""The IPv4 dummy address (RFC 7600): nobody's, and never on the wire."""
_SIOCSIFADDR = 0x8916
CUT = 1280
"""Size of the packets into which a merged one is cut, bytes: what every road takes (RFC 8200 section 5)."""

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x1, 0x1000, 0x4000
_SIOCSIFFLAGS, _SIOCGIFFLAGS, _SIOCSIFMTU, _IFF_UP = 0x8914, 0x8913, 0x8922, 1
_VNET_NEEDS_CSUM, _VNET_NONE, _VNET_TCPV4, _VNET_TCPV6 = 1, 0, 1, 4
_VNET_HEADER = struct.Struct("=BBHHHH")  # flags, kind, headers' length, cut payload, checksum's start and offset
_CHECKSUM_AT = 16
_FIN_ACK = 0x11
_TIMESTAMPS = b"\x01\x01\x08\x0a"  # no-operation twice, kind, length (RFC 7323, appendix A)
_SETTINGS = (
    ("ipv6/conf/{}/disable_ipv6", "0"),
    ("ipv6/conf/{}/addr_gen_mode", "1"),  # no link-local address
    ("ipv6/conf/{}/accept_ra", "0"),
    ("ipv4/conf/{}/rp_filter", "2"),  # loose: these packets do not come the way that their answers go
    ("ipv4/conf/{}/forwarding", "1"),  # also where the host only bridges
)


def _ip_header(flow: Flow, length: int) -> tuple[bytes, int]:
    """Header of a packet client -> server with `length` bytes of TCP, and the sum of its pseudo header (RFC 9293, 3.1)."""
    source, to = packed(flow.client.address), packed(flow.server.address)
    pseudo = pseudo_sum(flow.client.address, flow.server.address, length)
    if len(source) == 16:
        return struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_TCP, 64) + source + to, pseudo
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, 64, socket.IPPROTO_TCP, 0) + source + to
    return head[:10] + struct.pack("!H", ~ones_sum(head) & 0xFFFF) + head[12:], pseudo


def build_packet(flow: Flow, segment: bytes) -> bytes:
    """A virtio_net_hdr and an IP packet client -> server around a TCP segment, whose ports are made the flow's.

    The checksum holds only the pseudo header's sum; the kernel completes it. Raises ValueError for what is no segment."""
    if len(segment) < 20 or not 20 <= (tcp_length := segment[12] >> 4 << 2) <= len(segment):
        raise ValueError("not a TCP segment")
    if len(segment) > MTU - 40:
        raise ValueError("the segment does not fit into a packet")
    header, pseudo = _ip_header(flow, len(segment))
    headers = len(header) + tcp_length
    merged = len(segment) - tcp_length > CUT - headers
    kind = (_VNET_TCPV6 if len(header) == 40 else _VNET_TCPV4) if merged else _VNET_NONE
    cut = CUT - headers if merged else 0
    return b"".join(
        (
            _VNET_HEADER.pack(_VNET_NEEDS_CSUM, kind, headers, cut, len(header), _CHECKSUM_AT),
            header,
            struct.pack("!HH", flow.client.port, flow.server.port),
            segment[4:16],
            struct.pack("!H", pseudo),
            segment[18:],
        )
    )


def fin_segment(
    flow: Flow, *, sequence: int, acknowledge: int, window: int, timestamps: tuple[int, int] | None = None
) -> bytes:
    """The FIN that the client sent and that nobody at home has seen (RFC 9293 section 3.10.7.4). `window` unscaled,
    `timestamps` as (TSval, TSecr)."""
    options = _TIMESTAMPS + struct.pack("!II", *timestamps) if timestamps else b""
    offset = (20 + len(options)) << 2
    ports = struct.pack("!HH", flow.client.port, flow.server.port)
    return ports + struct.pack("!IIBBHHH", sequence, acknowledge, offset, _FIN_ACK, window, 0, 0) + options


class Injector:
    """The TUN device; a context manager. Raises OSError if it cannot be made (no /dev/net/tun, no CAP_NET_ADMIN)."""

    def __init__(self) -> None:
        self._fd = -1
        self.injected = 0
        self.lost = 0

    def __enter__(self) -> Self:
        self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._configure()
        except OSError:
            os.close(self._fd)
            raise
        return self

    def _configure(self) -> None:
        name = DEVICE.encode()
        fcntl.ioctl(self._fd, _TUNSETIFF, struct.pack("16sH22x", name, _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR))
        for key, value in _SETTINGS:
            with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/net/{key.format(DEVICE)}", "w") as file:
                file.write(value)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            # A device without an address fails every reverse path filter but "off" (fib_validate_source, no_addr).
            address = struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(ADDRESS))
            fcntl.ioctl(control, _SIOCSIFADDR, struct.pack("16s16s8x", name, address))
            fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si20x", name, MTU))
            flags = struct.unpack_from("16sh", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sh22x", name, 0)))[1]
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh22x", name, flags | _IFF_UP))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._fd = -1

    def inject(self, flow: Flow, segment: bytes) -> None:
        """Put one TCP segment of the client back on the road. One that does not go is as lost as any packet."""
        try:
            os.write(self._fd, build_packet(flow, segment))
            self.injected += 1
        except (OSError, ValueError):
            self.lost += 1
