# SPDX-License-Identifier: Apache-2.0
"""A file that is under way when its VM moves goes from host to host, and not through the guest, whose socket stays the silent
place-holder that it is. So what has to be done while nobody serves does not wait for the guest::

    source        frozen and extracted; the frozen copy stays (`ends.py`). The VM stays: it thaws, and has lost nothing. The VM is
                  gone: it closes silently. What clients say to it meanwhile is told as well
    destination   keeps what is about to come, and touches nothing. The VM runs here: open, restore, redirect, thaw, as with any
                  other (`handoff.py`)
    guest         is not asked. After the move its agent asks the next host by the transfer's token (`resume`); what the last host
                  had not answered it offers again (`hand_out_again`)

What both do with it is in `passing.py`; who brings it over is `migrate.py`, before QEMU may stop the VM, and what comes later until
the VM has gone. What the destination cannot take is given to the guest, as if it had come home (`Inherited.home`). The client is
asked at once how far it is (`ask_client.py`)."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass, field
from typing import Any

from guest_agent.handoff.errors import Reason
from guest_agent.handoff.snapshot import Snapshot, encode
from guest_agent.handoff.wire import Header
from hypervisor_svc.anticipate import Anticipation, read_anticipation, write_anticipation
from hypervisor_svc.connection import Connection
from hypervisor_svc.policy import Job, RelayJob, read_job

LatePacket = tuple[str, str]
"""A TCP segment of a client, as JSON: the connection's token, and base64."""
Row = dict[str, Any]
"""One connection, as JSON: {"request": a hand_out message, "body": its queues (base64), "sent_before": bytes, "ready": bool,
"anticipation": `anticipate.py`}. Of one that waits for its client's next request the count is 0."""

KEPT_SECONDS = 60.0
"""Until a VM that was to come is not expected any more."""
MAX_BODY = 4 << 20
"""Bytes of queues; one that has more goes home."""


def can_be_passed(connection: Connection) -> bool:
    """Whether there is a file, and nobody wants the connection back for another reason."""
    return not isinstance(connection.job, RelayJob) and connection.reason is None


def is_whole(connection: Connection, snapshot: Snapshot) -> bool:
    """Whether what was frozen is all that the next host needs: something is left to send, or may be asked for, no FIN of the client
    is to be said again, and not too much waits."""
    queued = len(snapshot.receive_queue) + len(snapshot.unacked) + len(snapshot.unsent)
    goes_on = connection.sent < connection.job.count or connection.goes_on
    return not connection.fin and queued <= MAX_BODY and goes_on


def write_row(connection: Connection, snapshot: Snapshot) -> Row:
    """For the next host: the job is what is left of it."""
    header, body = encode(snapshot)
    job, sent = connection.job, connection.sent
    request = {
        "type": "hand_out",
        "token": job.token,
        "path": job.path,
        "inode": job.inode,
        "offset": job.offset + sent,
        "count": job.count - sent,
        "priority": job.priority,
        "snapshot": header,
    }
    told = {
        "sent_before": connection.sent_before + sent,
        "ready": connection.ready is True,
        "anticipation": write_anticipation(connection.anticipation),
    }
    return {"request": request, "body": base64.b64encode(body).decode(), **told}


@dataclass(frozen=True)
class Inherited:
    """One connection that is to be taken: `sent_before` bytes were sent by other hosts; `ready`: the guest's place-holder stands
    where the connection will end."""

    request: Header
    body: bytes
    job: Job
    sent_before: int
    ready: bool
    anticipation: Anticipation | None
    late: list[bytes] = field(default_factory=list)

    def home(self, message: str) -> Header:
        """What the guest is told of one that cannot be taken: it is its own at once."""
        return {
            "type": "hand_back",
            "token": self.job.token,
            "sent": self.sent_before,
            "reason": Reason.DRAINING.value,
            "message": message,
            "errno": 0,
            "cursor": None,
            "answered": self.anticipation.answered if self.anticipation is not None else [],
            "direct": True,
            "closed": False,
            "snapshot": self.request["snapshot"],
        }


def write_late(connection: Connection) -> list[LatePacket]:
    """What has come since the last time. It stays held: if the VM stays, it is needed here."""
    fresh, connection.told = connection.held[connection.told :], len(connection.held)
    return [(connection.token, base64.b64encode(segment).decode()) for segment in fresh]


def read_late(packet: object) -> tuple[str, bytes]:
    """The inverse. Raises ValueError for anything else."""
    match packet:
        case [str(token), str(segment)]:
            return token, base64.b64decode(segment, validate=True)
    raise ValueError("a packet is a token and base64")


def read_row(row: object) -> Inherited:
    """The inverse of `write_row`. Raises GuestError, KeyError, TypeError or ValueError for anything else."""
    if not isinstance(row, dict):
        raise TypeError("a connection is one JSON object")
    request, sent, ready = row["request"], row["sent_before"], row["ready"]
    if not isinstance(request, dict) or type(sent) is not int or sent < 0 or type(ready) is not bool:
        raise ValueError("a connection: request, sent_before or ready is not what it is to be")
    body = base64.b64decode(row["body"], validate=True)
    anticipation = read_anticipation(row.get("anticipation"))
    job = read_job(request, body, least=0 if anticipation is not None else 1)
    return Inherited(request, body, job, sent, ready, anticipation)


class Inheritance:
    """What VMs that are about to come had out at the hosts that they leave, by the VM's name and the transfer's token."""

    def __init__(self) -> None:
        self._by_machine: dict[str, tuple[float, dict[str, Inherited]]] = {}

    def keep(self, machine: str, rows: list[object], *, first: bool) -> int:
        """Add to what is kept for this VM, or begin anew. How many there are. Raises what `read_row` raises; then nothing is."""
        found = [read_row(row) for row in rows]
        kept = {} if first else self._of(machine)
        kept.update((one.job.token, one) for one in found)
        self._by_machine[machine] = time.monotonic() + KEPT_SECONDS, kept
        return len(kept)

    def tokens(self, machine: str) -> list[str]:
        """What waits to be taken."""
        return list(self._of(machine))

    def late(self, machine: str, token: str, segment: bytes) -> None:
        """For one that is not taken yet; of any other it is lost."""
        inherited = self._of(machine).get(token)
        if inherited is not None:
            inherited.late.append(segment)

    def pop(self, machine: str, token: str) -> Inherited | None:
        """One, once."""
        return self._of(machine).pop(token, None)

    def _of(self, machine: str) -> dict[str, Inherited]:
        until, kept = self._by_machine.get(machine, (0.0, {}))
        if not kept or time.monotonic() > until:
            self._by_machine.pop(machine, None)
            return {}
        return kept
