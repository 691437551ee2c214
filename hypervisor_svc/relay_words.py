# SPDX-License-Identifier: Apache-2.0
"""What a guest says of relays, and what the service does about it: one method per message. A connection that joins one comes the
way of all connections (`guests.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable

from guest_agent.handoff.errors import HandoffError
from guest_agent.handoff.wire import Header
from hypervisor_svc.connection import Connection, Guest
from hypervisor_svc.policy import read_relay_plan, read_token, read_udp_job
from hypervisor_svc.relay import Relays


class RelayWords:
    """`go_home(connection)`: it has left its relay."""

    def __init__(self, relays: Relays, *, go_home: Callable[[Connection], None]) -> None:
        self._relays, self._go_home = relays, go_home

    def on_relay_open(self, guest: Guest, header: Header, body: bytes) -> None:
        token = read_token(header)
        try:
            self._relays.open(guest, read_relay_plan(header))
        except HandoffError as error:
            _refuse(guest, token, token, error)
            raise
        guest.send({"type": "relay_opened", "relay": token})

    def on_relay_close(self, guest: Guest, header: Header, body: bytes) -> None:
        relay = guest.relays.get(read_token(header))
        if relay is not None:
            self._relays.close(relay)

    def on_relay_remove(self, guest: Guest, header: Header, body: bytes) -> None:
        """A sink, or the source, is to come home."""
        connection = guest.connections.get(read_token(header))
        if connection is not None and connection.relay is not None:
            self._relays.release(connection)
            self._go_home(connection)

    def on_relay_udp(self, guest: Guest, header: Header, body: bytes) -> None:
        token = read_token(header)
        try:
            job = read_udp_job(header)
            self._relays.add_udp(guest, job)
        except HandoffError as error:
            _refuse(guest, str(header.get("relay")), token, error)
            raise
        guest.send({"type": "relay_udp_added", "relay": job.relay, "token": token})

    def on_relay_udp_remove(self, guest: Guest, header: Header, body: bytes) -> None:
        relay = guest.relays.get(str(header.get("relay")))
        if relay is not None:
            self._relays.remove_udp(relay, read_token(header))

    def on_relay_status(self, guest: Guest, header: Header, body: bytes) -> None:
        relay = guest.relays.get(read_token(header))
        row = self._relays.row(relay, sinks=False) if relay is not None else None
        guest.send({"type": "relay_status", "relay": read_token(header)}, json.dumps(row).encode())


def _refuse(guest: Guest, relay: str, token: str, error: HandoffError) -> None:
    reply = {"type": "relay_refused", "relay": relay, "token": token, "reason": error.reason.value}
    guest.send({**reply, "message": str(error), "errno": error.errno})
