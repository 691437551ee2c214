# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from guest_agent.handoff.recent import Recent

LIMIT = 8


def test_the_oldest_are_forgotten() -> None:
    recent: Recent[str, int] = Recent(LIMIT)
    for number in range(LIMIT + 2):
        recent[str(number)] = number
    assert len(recent) == LIMIT
    assert "1" not in recent and recent["2"] == 2


def test_what_is_said_again_is_remembered_once() -> None:
    recent: Recent[str, int] = Recent(LIMIT)
    recent["a"] = 1
    recent["a"] = 2
    assert dict(recent) == {"a": 2}
