# SPDX-License-Identifier: Apache-2.0
"""How many files a process has open, so that two counts can be compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

LOOKS = 10
INTERVAL = 0.02


def fewest(count: Callable[[], int]) -> int:
    """Of some looks in a row. A service closes what it was asked through a moment after it has answered; when four processes shared
    two processors, a twentieth of all looks still saw it."""
    looks = []
    for _ in range(LOOKS):
        looks.append(count())
        time.sleep(INTERVAL)
    return min(looks)


def open_files(pid: int) -> int:
    """Of a process, by procfs; see `fewest`."""
    return fewest(lambda: len(list(Path(f"/proc/{pid}/fd").iterdir())))
