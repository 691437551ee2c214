# SPDX-License-Identifier: Apache-2.0
"""What is remembered of connections that are over. How they end, the tests in namespaces show."""

from __future__ import annotations

from hypervisor_svc.ends import REMEMBERED, Recent


def test_the_oldest_are_forgotten() -> None:
    recent: Recent[int] = Recent()
    for number in range(REMEMBERED + 2):
        recent[str(number)] = number
    assert len(recent) == REMEMBERED
    assert "1" not in recent and recent["2"] == 2


def test_what_is_said_again_is_remembered_once() -> None:
    recent: Recent[int] = Recent()
    recent["a"] = 1
    recent["a"] = 2
    assert dict(recent) == {"a": 2}
