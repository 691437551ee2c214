# SPDX-License-Identifier: Apache-2.0
"""Work that can wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from guest_agent.handoff.one_by_one import OneByOne


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_others_come_between(at_once: int) -> None:
    """In order, and nobody waits for more than so many."""
    seen: list[object] = []

    async def test() -> None:
        loop = asyncio.get_running_loop()
        queue = OneByOne(seen.append, at_once=at_once)

        def look() -> None:
            seen.append("look")
            if queue._waiting:
                loop.call_soon(look)

        for number in range(7):
            queue.add(number)
        loop.call_soon(look)
        await asyncio.sleep(0.05)

    asyncio.run(test())
    assert [one for one in seen if one != "look"] == list(range(7))
    words = "".join("." if one == "look" else "x" for one in seen)
    assert max(len(run) for run in words.split(".")) <= at_once


def _acts(act: Callable[[OneByOne[int], int], None]) -> list[int]:
    seen: list[int] = []

    async def test() -> None:
        def note(number: int) -> None:
            seen.append(number)
            act(queue, number)

        queue = OneByOne(note, after=0.001)
        queue.add(0)
        queue.add(1)
        await asyncio.sleep(0.05)

    asyncio.run(test())
    return seen


def test_more_may_be_added_meanwhile() -> None:
    assert _acts(lambda queue, number: queue.add(number + 2) if number < 4 else None) == [0, 1, 2, 3, 4, 5]


def test_what_is_removed_does_not_come() -> None:
    assert _acts(lambda queue, number: queue.remove(1)) == [0]


def test_it_goes_on_after_a_mistake() -> None:
    def fail(queue: OneByOne[int], number: int) -> None:
        if number == 0:
            raise ValueError("expected by this test")

    assert _acts(fail) == [0, 1]
