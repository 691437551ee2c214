# SPDX-License-Identifier: Apache-2.0
"""A file that was under way when its VM moves travels as it came home: the socket, frozen, in the guest's kernel, and the snapshot
that the next host is given as it is, with the rest of the file. Nobody thaws, nobody extracts, no application is asked.

    pack()     it is home, and stays frozen; from now on it has another token, so that what the last host says of it is over
    hand_on()  offered to the next host (or to the same, if the VM stays)
    put_down() in `transfers.py`: it becomes the application's, as any that was called home

    agent -> application  {"v":1,"id":7,"carried":N,"token":"..."}    N bytes are sent; by this token another agent knows it

Whoever is not handed on within CARRY_LIMIT is put down: its client must not wait for a VM that does not move."""

from __future__ import annotations

import os
import time

from guest_agent.hand_out import Send, Transfer, offer
from guest_agent.handoff.errors import HandoffError, Reason
from guest_agent.handoff.state import Guest
from guest_agent.mute import mute, unmute

CARRY_LIMIT = 5.0


def can_be_carried(transfer: Transfer) -> bool:
    """Whether there is something left of the file to send, for somebody who waits, and all that was sent is in the kernel."""
    outcome, snapshot = transfer.outcome, transfer.snapshot
    called_home = outcome.outcome == "local" and outcome.reason is Reason.DRAINING and outcome.sent < transfer.count
    complete = snapshot is not None and not snapshot.unsent and not transfer.closed
    return transfer.waits and called_home and complete and not outcome.answered and not transfer.application_gone


def pack(transfer: Transfer) -> None:
    """See above."""
    transfer.move(Guest.CARRIED)
    sent = transfer.outcome.sent
    transfer.offset, transfer.count = transfer.offset + sent, transfer.count - sent
    transfer.sent_before, transfer.outcome.sent = transfer.sent_before + sent, 0
    transfer.token, transfer.standing_by, transfer.to_be_told = os.urandom(16).hex(), False, False


def hand_on(transfer: Transfer, send: Send) -> None:
    """See above. Raises HandoffError; then it is as it was."""
    assert transfer.snapshot is not None
    mute(transfer.sock)
    try:
        offer(transfer, send)
    except HandoffError:
        unmute(transfer.sock, transfer.snapshot.options.mark)
        raise
    transfer.begun = time.monotonic()
    transfer.expected = None  # it comes home the longer way: if all of them stood by at once, new requests would have to wait
    transfer.move(Guest.OFFERED)
