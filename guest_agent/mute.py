# SPDX-License-Identifier: Apache-2.0
"""A place-holder must not speak: its timers still run, and a retransmission of bytes that the host sends now would show the
client a second owner.

One policy rule per family drops what carries MARK (`ip rule add fwmark 0x534c0003 blackhole`, rtnetlink(7)), and a socket is
muted by giving it that SO_MARK: one system call, which also makes the kernel forget the socket's cached route."""

from __future__ import annotations

import errno
import os
import socket
import struct

MARK = 0x534C0003
PRIORITY = 21324
"""Of the rule: after the local table, before the main one."""

_NEW_RULE, _REQUEST, _ACK, _CREATE, _EXCL = 32, 0x1, 0x4, 0x400, 0x200
_BLACKHOLE = 6
_FRA_PRIORITY, _FRA_FWMARK, _FRA_FWMASK = 6, 10, 16


def install() -> None:
    """Make the rules; those that exist are left. Raises OSError (no CAP_NET_ADMIN, no CONFIG_IP_MULTIPLE_TABLES)."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        for family in (socket.AF_INET, socket.AF_INET6):
            netlink.send(_request(family))
            number = -struct.unpack_from("=i", netlink.recv(4096), 16)[0]
            if number not in (0, errno.EEXIST, errno.EAFNOSUPPORT):
                raise OSError(number, f"policy rule: {os.strerror(number)}")


def _request(family: int) -> bytes:
    """struct nlmsghdr, struct fib_rule_hdr and its attributes."""
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, _BLACKHOLE, 0)
    for kind, value in ((_FRA_PRIORITY, PRIORITY), (_FRA_FWMARK, MARK), (_FRA_FWMASK, 0xFFFFFFFF)):
        body += struct.pack("=HHI", 8, kind, value)
    flags = _REQUEST | _ACK | _CREATE | _EXCL
    return struct.pack("=IHHII", 16 + len(body), _NEW_RULE, flags, 1, 0) + body


def mute(sock: socket.socket) -> None:
    """From now on nothing that the socket sends leaves this machine."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)


def unmute(sock: socket.socket, mark: int) -> None:
    """Undo `mute`; `mark` is the application's own SO_MARK."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
