# SPDX-License-Identifier: Apache-2.0
"""Work that can wait: some of it between two looks of the event loop at everything else, so that thousands keep nobody waiting."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class OneByOne(Generic[T]):
    """Calls `act` for what is added, in order, for `at_once` so many between two looks; a queue begins `after` so many seconds."""

    def __init__(self, act: Callable[[T], None], *, at_once: int = 1, after: float = 0.0) -> None:
        self._act, self._at_once, self._after = act, at_once, after
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[T] = deque()
        self._timer: asyncio.Handle | None = None

    def add(self, item: T) -> None:
        """It comes when those before it have come."""
        self._waiting.append(item)
        if self._timer is None:
            self._timer = self._loop.call_later(self._after, self._some)

    def remove(self, item: T) -> None:
        """It does not come; idempotent."""
        with contextlib.suppress(ValueError):
            self._waiting.remove(item)

    def _some(self) -> None:
        some = [self._waiting.popleft() for _ in range(min(self._at_once, len(self._waiting)))]
        self._timer = self._loop.call_soon(self._some) if self._waiting else None
        for item in some:
            self._act(item)
