# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from hypervisor_svc.schedule import Schedule


@dataclass(eq=False)
class Work:
    """Takes `left` turns and writes its name for each."""

    name: str
    owner: str
    rank: tuple[int, int]
    left: int
    schedule: Schedule
    done: list[str]

    def turn(self) -> None:
        self.done.append(self.name)
        self.left -= 1
        if self.left:
            self.schedule.add(self)


def _order(make: Callable[[Callable[..., Work]], list[Work]], *, remove: str = "") -> str:
    async def run() -> str:
        schedule = Schedule()
        done: list[str] = []
        tasks = make(lambda name, owner, rank, left: Work(name, owner, rank, left, schedule, done))
        for task in tasks:
            schedule.add(task)
            schedule.add(task)
        for task in tasks:
            if task.name == remove:
                schedule.remove(task)
        for _ in range(20):
            await asyncio.sleep(0)
        schedule.close()
        return "".join(done)

    return asyncio.run(run())


def test_a_higher_class_is_strictly_first() -> None:
    assert _order(lambda work: [work("a", "one", (0, 2), 3), work("b", "two", (1, 0), 3)]) == "bbbaaa"


def test_within_a_class_vms_take_turns() -> None:
    def many_and_one(work: Callable[..., Work]) -> list[Work]:
        return [work("a", "one", (1, 1), 2), work("b", "one", (1, 1), 2), work("c", "two", (1, 0), 3)]

    assert _order(many_and_one) == "acbcacb"


def test_within_a_vm_its_priorities_decide() -> None:
    assert _order(lambda work: [work("a", "one", (1, 0), 2), work("b", "one", (1, 2), 2)]) == "bbaa"


def test_who_is_removed_gets_no_turn() -> None:
    assert _order(lambda work: [work("a", "one", (1, 1), 2), work("b", "one", (1, 1), 2)], remove="a") == "bb"


def test_a_higher_class_that_comes_later_overtakes() -> None:
    async def run() -> str:
        schedule = Schedule()
        done: list[str] = []
        urgent = Work("b", "two", (2, 0), 2, schedule, done)

        class Late(Work):
            def turn(self) -> None:
                super().turn()
                if self.left == 70:
                    self.schedule.add(urgent)

        schedule.add(Late("a", "one", (0, 0), 100, schedule, done))
        while len(done) < 102:
            await asyncio.sleep(0)
        return "".join(done)

    order = asyncio.run(run())
    assert order.index("bb") == 30 and order.count("a") == 100
