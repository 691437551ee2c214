# SPDX-License-Identifier: Apache-2.0
"""Packets that frozen sockets did not take (`guest_agent/handoff/hold.py`): the host's own, and those that a guest sends after a
connection that has gone out. What belongs to a thawed connection goes back on the road; the rest waits with its own."""

from __future__ import annotations

import asyncio
import struct

from guest_agent.handoff.errors import GuestError, Reason
from guest_agent.handoff.hold import Hold
from guest_agent.handoff.segment import is_intact
from guest_agent.handoff.state import Host
from hypervisor_svc.connection import Connection, Guest
from hypervisor_svc.inject import Injector
from hypervisor_svc.redirect import Flow

MAX_SEGMENTS = 4096


class HeldPackets:
    """By the cookie of the socket that did not take them. `keep` may be None: then they are lost, and retransmitted."""

    def __init__(self, keep: Hold | None, injector: Injector) -> None:
        self._keep, self._injector = keep, injector
        self._by_cookie: dict[int, Connection] = {}
        if keep is not None:
            asyncio.get_running_loop().add_reader(keep, self.collect)

    def close(self) -> None:
        """The hold is the caller's."""
        if self._keep is not None:
            asyncio.get_running_loop().remove_reader(self._keep)

    def add(self, connection: Connection) -> None:
        """A connection that the host has."""
        self._by_cookie[connection.cookie] = connection

    def remove(self, connection: Connection) -> None:
        """The opposite; idempotent."""
        self._by_cookie.pop(connection.cookie, None)

    def collect(self) -> None:
        """Sort what the hold kept."""
        if self._keep is None:
            return
        for cookie, segment in self._keep.drain():
            connection = self._by_cookie.get(cookie)
            if connection is None:
                continue
            assert connection.endpoint is not None
            if not is_intact(segment, connection.flow.client.address, connection.endpoint.address):
                connection.guest.counters["damaged_packets"] += 1
                continue
            connection.guest.counters["held_packets"] += 1
            if connection.state is Host.SERVING:
                self._injector.inject(connection.flow, segment)
            else:
                connection.held.append(segment)

    def put_back(self, guest: Guest, flow: Flow, body: bytes) -> None:
        """Those of a guest's `late` message. Raises GuestError."""
        for segment in _segments(body):
            guest.counters["late_packets"] += 1
            self._injector.inject(flow, segment)


def _segments(body: bytes) -> list[bytes]:
    """Split the body of a `late` message. Raises GuestError."""
    segments: list[bytes] = []
    at = 0
    while at < len(body) and len(segments) < MAX_SEGMENTS:
        if at + 4 > len(body):
            raise GuestError(Reason.BAD_REQUEST, "late packets: a length is cut short")
        (length,) = struct.unpack_from(">I", body, at)
        if not 20 <= length <= 65535 or at + 4 + length > len(body):
            raise GuestError(Reason.BAD_REQUEST, f"late packets: a segment of {length} bytes")
        segments.append(body[at + 4 : at + 4 + length])
        at += 4 + length
    return segments
