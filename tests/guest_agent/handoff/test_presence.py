# SPDX-License-Identifier: Apache-2.0
"""Every move that the table allows, and none else."""

from __future__ import annotations

from itertools import product

import pytest

from guest_agent.handoff.presence import PRESENCE_MOVES, Presence, move_presence

ALLOWED = {
    ("here", "letting_go"),
    ("here", "leaving"),
    ("letting_go", "loose"),
    ("letting_go", "leaving"),
    ("letting_go", "returning"),
    ("loose", "leaving"),
    ("loose", "returning"),
    ("leaving", "away"),
    ("leaving", "returning"),
    ("away", "returning"),
    ("returning", "here"),
    ("returning", "letting_go"),
    ("returning", "leaving"),
}


@pytest.mark.parametrize(("now", "to"), list(product(Presence, Presence)))
def test_moves(now: Presence, to: Presence) -> None:
    if (now.value, to.value) in ALLOWED:
        assert move_presence(now, to) is to
    else:
        with pytest.raises(RuntimeError, match=f"{now.value} -> {to.value}"):
            move_presence(now, to)


def test_from_everywhere_there_is_a_way_back() -> None:
    for start in Presence:
        reached, todo = {start}, [start]
        while todo:
            for to in PRESENCE_MOVES[todo.pop()] - reached:
                reached.add(to)
                todo.append(to)
        assert Presence.HERE in reached
