# SPDX-License-Identifier: Apache-2.0
"""What one host tells the next, as JSON; connections that move are in `tests/namespaces/test_pass_on.py`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from guest_agent.handoff.errors import GuestError, Reason
from hypervisor_svc import pass_on
from hypervisor_svc.connection import Connection, Guest
from hypervisor_svc.domains import Machine
from hypervisor_svc.pass_on import Inheritance, can_be_passed, is_whole, read_late, read_row, write_late, write_row
from hypervisor_svc.policy import Job
from hypervisor_svc.redirect import Flow
from tests.guest_agent.handoff.samples import SNAPSHOT

TOKEN = "0" * 31 + "a"
COUNT = 100_000


def connection(sent: int = 0) -> Connection:
    machine = Machine("vm", "uuid", "/channel", "/share", (SNAPSHOT.local.address,))
    job = Job(TOKEN, "film/1.m4s", 7, 1000, COUNT, "normal", SNAPSHOT)
    return Connection(Guest(machine), job, Flow(client=SNAPSHOT.peer, server=SNAPSHOT.local), sent=sent, ready=True)


def row(sent: int = 300) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(write_row(connection(sent), SNAPSHOT)))
    return made


def test_what_is_left_of_a_job_goes_on() -> None:
    """Twice: what earlier hosts have sent adds up."""
    found = read_row(row())
    assert (found.job.path, found.job.offset, found.job.count) == ("film/1.m4s", 1300, COUNT - 300)
    assert (found.job.snapshot, found.sent_before, found.ready) == (SNAPSHOT, 300, True)
    second = Connection(Guest(connection().guest.machine), found.job, connection().flow, sent=50, sent_before=found.sent_before)
    again = read_row(write_row(second, SNAPSHOT))
    assert (again.job.offset, again.job.count, again.sent_before, again.ready) == (1350, COUNT - 350, 350, False)


def test_what_cannot_be_taken_is_the_guests_with_all_that_was_sent() -> None:
    found = read_row(row())
    home = found.home("no such file")
    assert (home["token"], home["sent"], home["reason"], home["direct"]) == (TOKEN, 300, Reason.DRAINING.value, True)
    assert home["snapshot"] == found.request["snapshot"]


def test_who_stays() -> None:
    asked = connection()
    asked.reason = Reason.OPERATOR
    assert can_be_passed(connection()) and not can_be_passed(asked)
    assert is_whole(connection(COUNT - 1), SNAPSHOT)
    assert not is_whole(connection(COUNT), SNAPSHOT)
    closed = connection()
    closed.fin = b"FIN"
    assert not is_whole(closed, SNAPSHOT)
    assert not is_whole(connection(), replace(SNAPSHOT, unacked=bytes(pass_on.MAX_BODY)))


@pytest.mark.parametrize(
    "change", [{"sent_before": -1}, {"sent_before": True}, {"ready": 1}, {"body": "?"}, {"body": "AAAA"}, {"request": []}]
)
def test_rows_of_another_form(change: dict[str, Any]) -> None:
    with pytest.raises((GuestError, ValueError)):
        read_row({**row(), **change})


def test_an_inheritance_is_taken_once() -> None:
    kept = Inheritance()
    assert kept.keep("vm", [row()], first=True) == 1
    assert kept.tokens("vm") == [TOKEN] and not kept.tokens("another")
    found = kept.pop("vm", TOKEN)
    assert found is not None and found.job.token == TOKEN
    assert kept.pop("vm", TOKEN) is None


def test_the_first_rows_replace_what_was_kept() -> None:
    kept = Inheritance()
    kept.keep("vm", [row()], first=True)
    assert kept.keep("vm", [], first=False) == 1
    assert kept.keep("vm", [], first=True) == 0
    assert kept.pop("vm", TOKEN) is None


def test_wrong_rows_change_nothing() -> None:
    kept = Inheritance()
    kept.keep("vm", [row()], first=True)
    with pytest.raises(ValueError, match="not what it is to be"):
        kept.keep("vm", [{**row(), "ready": None}], first=True)
    assert kept.tokens("vm") == [TOKEN]


def test_nobody_is_expected_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_on, "KEPT_SECONDS", -1.0)
    kept = Inheritance()
    kept.keep("vm", [row()], first=True)
    assert not kept.tokens("vm")


def test_late_packets_are_told_once_and_stay_held() -> None:
    one = connection()
    one.held = [b"first"]
    assert [read_late(list(packet)) for packet in write_late(one)] == [(TOKEN, b"first")]
    one.held.append(b"second")
    assert [read_late(list(packet)) for packet in write_late(one)] == [(TOKEN, b"second")]
    assert one.held == [b"first", b"second"]
    for wrong in ("text", [TOKEN], [TOKEN, 5], [TOKEN, "?"]):
        with pytest.raises(ValueError):
            read_late(wrong)


def test_late_packets_wait_for_theirs() -> None:
    kept = Inheritance()
    kept.keep("vm", [row()], first=True)
    kept.late("vm", TOKEN, b"packet")
    kept.late("vm", "f" * 32, b"nobody's")
    found = kept.pop("vm", TOKEN)
    assert found is not None and found.late == [b"packet"]
