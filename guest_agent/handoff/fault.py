# SPDX-License-Identifier: Apache-2.0
"""Fault injection at the transitions of a handoff, for tests and drills, like the kernel's (Documentation/fault-injection).

STREAMLIFT_FAULT is a comma-separated list of SIDE:STATE=ACTION[@N], read once at start: on reaching STATE for the Nth time
(default: every time) the process is killed (`kill`), an OSError is raised (`raise`: EIO) or the process sleeps
0.3 seconds (`stall`). @FILE takes the list from a file, which is deleted before the first action: a process that is started
again does not meet its fault again. Unset, it costs one comparison."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

_RULE = re.compile(r"(guest|host):([a-z_]+)=(kill|raise|stall)(?:@(\d+))?")
_seen: Counter[str] = Counter()


def _rules(text: str) -> dict[str, tuple[str, int]]:
    rules = {}
    for part in filter(None, text.split(",")):
        match = _RULE.fullmatch(part)
        if not match:
            raise ValueError(f"STREAMLIFT_FAULT: {part!r} is not SIDE:STATE=kill|raise|stall[@N]")
        rules[f"{match[1]}:{match[2]}"] = (match[3], int(match[4] or 0))
    return rules


def _read(text: str) -> str:
    if not text.startswith("@"):
        return text
    file = Path(text[1:])
    return file.read_text().strip() if file.exists() else ""


_WANTED = os.environ.get("STREAMLIFT_FAULT", "")
_RULES = _rules(_read(_WANTED))


def reach(point: str) -> None:
    """Do what the rule for `point` ("side:state") says, if there is one."""
    if _RULES and point in _RULES:
        _act(point)


def _act(point: str) -> None:
    action, turn = _RULES[point]
    _seen[point] += 1
    if turn and _seen[point] != turn:
        return
    if _WANTED.startswith("@"):
        try:
            Path(_WANTED[1:]).unlink()
        except FileNotFoundError:
            return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stall":
        time.sleep(0.3)
    else:
        raise OSError(errno.EIO, f"injected fault at {point}")
