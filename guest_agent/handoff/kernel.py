# SPDX-License-Identifier: Apache-2.0
"""Numbers and calls of the kernel's TCP that Python's `socket` lacks. The only file of the product that knows them.

Sources: include/uapi/linux/tcp.h, include/uapi/asm-generic/socket.h, include/uapi/linux/in6.h, tcp(7).
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import NamedTuple

TCP_REPAIR = 19
TCP_REPAIR_QUEUE = 20
TCP_QUEUE_SEQ = 21
TCP_REPAIR_OPTIONS = 22
TCP_TIMESTAMP = 24
TCP_NOTSENT_LOWAT = 25
TCP_REPAIR_WINDOW = 29
TCP_ULP = 31
TCP_IS_MPTCP = 43
TCP_AO_INFO = 40

REPAIR_ON = 1
REPAIR_OFF = 0
REPAIR_OFF_NO_PROBE = -1
NO_QUEUE, RECEIVE_QUEUE, SEND_QUEUE = 0, 1, 2

TCPOPT_MSS, TCPOPT_WINDOW, TCPOPT_SACK_PERMITTED, TCPOPT_TIMESTAMP = 2, 3, 4, 8

SO_ATTACH_FILTER = 26
SO_DETACH_FILTER = 27
SO_BUF_LOCK = 72
SO_PROTOCOL = 38
SO_COOKIE = 57
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SO_ATTACH_BPF = 50
IPPROTO_MPTCP = 262
IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75

SIOCINQ = 0x541B
SIOCOUTQ = 0x5411
SIOCOUTQNSD = 0x894B

ESTABLISHED, SYN_RECV, FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSE = 1, 3, 4, 5, 6, 7
CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 8, 9, 10, 11
HALF_CLOSED_STATES = frozenset({FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING})

_libc = ctypes.CDLL(None, use_errno=True)
_UNSPECIFIED = struct.pack("=H14x", 0)
_filter_length = ctypes.c_uint(0)


def disconnect(fd: int) -> None:
    """connect(2) with AF_UNSPEC (tcp_disconnect()): the socket is closed but not its file descriptor. In repair mode
    nothing is sent."""
    if _libc.connect(fd, _UNSPECIFIED, len(_UNSPECIFIED)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def has_filter(fd: int) -> bool:
    """Whether somebody attached a filter to the socket (SO_GET_FILTER with no room: the kernel only counts)."""
    length = ctypes.c_uint(0)
    return _libc.getsockopt(fd, 1, SO_ATTACH_FILTER, None, ctypes.byref(length)) != 0 or length.value != 0


class Info(NamedTuple):
    """The part of `struct tcp_info` that a handoff needs."""

    state: int
    options: int
    send_scale: int
    receive_scale: int
    send_mss: int

    @property
    def timestamps(self) -> bool:
        """TCPI_OPT_TIMESTAMPS."""
        return bool(self.options & 1)

    @property
    def sack(self) -> bool:
        """TCPI_OPT_SACK."""
        return bool(self.options & 2)

    @property
    def scaling(self) -> bool:
        """TCPI_OPT_WSCALE."""
        return bool(self.options & 4)

    @property
    def microseconds(self) -> bool:
        """TCPI_OPT_USEC_TS, kernel 6.7 and later."""
        return bool(self.options & 64)


def parse_info(raw: bytes) -> Info:
    """Read the first 20 bytes of `struct tcp_info`."""
    state, options, scales = raw[0], raw[5], raw[6]
    return Info(state, options, scales & 15, scales >> 4, int.from_bytes(raw[16:20], "little"))
