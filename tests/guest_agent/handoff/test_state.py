# SPDX-License-Identifier: Apache-2.0
"""The life cycle's table."""

from __future__ import annotations

import pytest

from guest_agent.handoff.state import (
    GUEST_MOVES,
    HOST_MOVES,
    Guest,
    Host,
    ImpossibleTransition,
    move_guest,
    move_host,
)


def test_every_state_has_a_row() -> None:
    assert set(GUEST_MOVES) == set(Guest)
    assert set(HOST_MOVES) == set(Host)


def test_the_whole_way_out_and_back() -> None:
    guest = Guest.HOME
    for step in (Guest.FROZEN, Guest.OFFERED, Guest.OUT, Guest.RETURNING, Guest.HOME):
        guest = move_guest(guest, step)
    for step in (Guest.FROZEN, Guest.OFFERED, Guest.OUT, Guest.RETURNING, Guest.CARRIED, Guest.OFFERED, Guest.OUT):
        guest = move_guest(guest, step)
    host = Host.OFFERED
    for there in (Host.RESTORED, Host.REDIRECTED, Host.SERVING, Host.FROZEN, Host.RETURNING, Host.GONE):
        host = move_host(host, there)


@pytest.mark.parametrize("to", [Guest.OUT, Guest.RETURNING, Guest.OFFERED])
def test_a_guest_cannot_skip_the_freeze(to: Guest) -> None:
    with pytest.raises(ImpossibleTransition):
        move_guest(Guest.HOME, to)


def test_every_host_state_before_the_commit_can_be_undone() -> None:
    for state in (Host.OFFERED, Host.RESTORED, Host.REDIRECTED):
        assert move_host(state, Host.GONE) is Host.GONE


def test_the_end_is_the_end() -> None:
    for host in Host:
        with pytest.raises(ImpossibleTransition):
            move_host(Host.GONE, host)
    for guest in Guest:
        with pytest.raises(ImpossibleTransition):
            move_guest(Guest.DEAD, guest)
