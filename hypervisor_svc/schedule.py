# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is: transfers of files and relays share one thread, by class.

Each piece of work is a task: a quantum of a file for one client, a quantum of a relay's sinks. The class of its VM decides
first, and strictly: nothing of a lower one is done while something of a higher one can be (Hung 2010 section 3.4; the operator
says which VM is in which). Within a class VMs take turns, so that one with a thousand clients does not starve one with a
single client; within a VM its own priorities decide, strictly too; within a priority tasks take turns."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Protocol

PRIORITIES = ("low", "normal", "high")
TURNS_PER_ROUND = 8
"""Turns between two looks at everything else that the service has to do."""


class Task(Protocol):
    """Something that can be done in pieces of well under a millisecond."""

    @property
    def owner(self) -> Hashable:
        """Whose work it is: the VM."""

    @property
    def rank(self) -> tuple[int, int]:
        """The class of its VM, and its own priority within it; greater comes first."""

    def turn(self) -> None:
        """Do one piece. A task that has more to do adds itself again."""


class Schedule:
    """Tasks that can go on, and the loop that lets them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._classes: dict[int, OrderedDict[Hashable, _Owner]] = {}
        self._ready: set[Task] = set()
        self._round: asyncio.Handle | None = None
        self._taking = False

    def close(self) -> None:
        """Nobody gets another turn."""
        self._ready.clear()
        self._classes.clear()
        if self._round is not None:
            self._round.cancel()

    def add(self, task: Task) -> None:
        """It can go on; harmless if it waits already."""
        if task in self._ready:
            return
        self._ready.add(task)
        level, priority = task.rank
        owners = self._classes.setdefault(level, OrderedDict())
        owners.setdefault(task.owner, _Owner()).add(task, priority)
        if self._round is None and not self._taking:
            self._round = self._loop.call_soon(self._take_turns)

    def remove(self, task: Task) -> None:
        """It cannot, after all."""
        self._ready.discard(task)

    def _take_turns(self) -> None:
        self._round, self._taking = None, True
        try:
            for _ in range(TURNS_PER_ROUND):
                task = self._next()
                if task is None:
                    return
                task.turn()
        finally:
            self._taking = False
            if self._ready:
                self._round = self._loop.call_soon(self._take_turns)

    def _next(self) -> Task | None:
        while self._classes:
            level = max(self._classes)
            owners = self._classes[level]
            owner, tasks = next(iter(owners.items()))
            task = tasks.take()
            if tasks.empty:
                del owners[owner]
            else:
                owners.move_to_end(owner)
            if not owners:
                del self._classes[level]
            if task in self._ready:
                self._ready.discard(task)
                return task
        return None


class _Owner:
    """The tasks of one VM."""

    def __init__(self) -> None:
        self._queues: dict[int, deque[Task]] = {}

    @property
    def empty(self) -> bool:
        return not self._queues

    def add(self, task: Task, priority: int) -> None:
        self._queues.setdefault(priority, deque()).append(task)

    def take(self) -> Task:
        priority = max(self._queues)
        queue = self._queues[priority]
        task = queue.popleft()
        if not queue:
            del self._queues[priority]
        return task
