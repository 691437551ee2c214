# SPDX-License-Identifier: Apache-2.0
"""What may travel with its VM, and what it is then. That it arrives, `tests/namespaces/test_carry.py` shows."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from guest_agent.carry import can_be_carried, pack
from guest_agent.hand_out import Outcome, Transfer
from guest_agent.handoff.errors import Reason
from guest_agent.handoff.state import Guest
from guest_agent.share import NO_FILE
from tests.guest_agent.handoff.samples import SNAPSHOT

CALLED_HOME = Outcome("local", 300, Reason.DRAINING)
TOKEN = "0" * 32


@pytest.fixture
def transfer() -> Iterator[Transfer]:
    """Called home after 300 of 1,000 bytes."""
    with socket.socket() as sock:
        made = Transfer(TOKEN, sock, NO_FILE, 50, 1000, "normal", reply=lambda outcome: None, waits=True)
        made.state, made.outcome, made.snapshot = Guest.RETURNING, replace(CALLED_HOME), replace(SNAPSHOT, unsent=b"")
        yield made


def test_the_rest_of_it_is_carried(transfer: Transfer) -> None:
    assert can_be_carried(transfer)
    pack(transfer)
    assert (transfer.state, transfer.offset, transfer.count, transfer.sent_before) == (Guest.CARRIED, 350, 700, 300)
    assert transfer.outcome.sent == 0 and len(transfer.token) == 32 and transfer.token != TOKEN


def test_it_may_be_carried_twice(transfer: Transfer) -> None:
    pack(transfer)
    transfer.state, transfer.outcome = Guest.RETURNING, Outcome("local", 100, Reason.DRAINING)
    pack(transfer)
    assert (transfer.offset, transfer.count, transfer.sent_before) == (450, 600, 400)


@pytest.mark.parametrize(
    "changes",
    [
        {"waits": False},
        {"application_gone": True},
        {"closed": True},
        {"snapshot": None},
        {"snapshot": replace(SNAPSHOT, unsent=b"x")},
        {"outcome": Outcome("offloaded", 1000)},
        {"outcome": Outcome("local", 1000, Reason.DRAINING)},
        {"outcome": Outcome("local", 300, Reason.OPERATOR)},
        {"outcome": Outcome("failed", 300, Reason.READ_ERROR)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_goes_home_instead(transfer: Transfer, changes: dict[str, object]) -> None:
    for name, value in changes.items():
        setattr(transfer, name, value)
    assert not can_be_carried(transfer)
