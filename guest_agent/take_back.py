# SPDX-License-Identifier: Apache-2.0
"""Step 8: take back. The host's snapshot goes into the application's own socket, which then thaws.

The host has frozen its copy and sent the packets back our way before its snapshot reaches us, so the moment we thaw is
the moment at which ownership returns; we then tell the host, which closes silently. If we cannot, we say so, and the host
ends the connection: it is the only one that still can."""

from __future__ import annotations

from dataclasses import replace

from guest_agent.hand_out import Transfer
from guest_agent.handoff.errors import GuestError, Reason
from guest_agent.handoff.freeze import thaw
from guest_agent.handoff.restore import restore_in_place, send_unsent
from guest_agent.handoff.snapshot import decode
from guest_agent.handoff.state import Guest
from guest_agent.handoff.wire import Header


def take_back(transfer: Transfer, header: Header, body: bytes) -> None:
    """Restore the connection in place and thaw it. Raises HandoffError or OSError: then it could not come home."""
    assert transfer.snapshot is not None
    returned = decode(header["snapshot"], body)
    if (returned.local, returned.peer) != (transfer.snapshot.local, transfer.snapshot.peer):
        raise GuestError(Reason.BAD_SNAPSHOT, "the host returned another connection than it took")
    transfer.move(Guest.RETURNING)
    snapshot = replace(returned, options=transfer.snapshot.options)
    restore_in_place(transfer.sock, snapshot)
    thaw(transfer.sock)
    send_unsent(transfer.sock, snapshot)
    transfer.move(Guest.HOME)
