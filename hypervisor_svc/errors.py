# SPDX-License-Identifier: Apache-2.0
"""What an operator is told when something is wrong: the cause, and the next command to type."""

from __future__ import annotations

import os
import shlex
import sys


class OperatorError(Exception):
    """`str()` names the cause, `hint` what to do about it. The command line prints both; nobody sees a traceback."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def as_typed(words: str) -> str:
    """A command of ours as it is typed here: from a checkout it begins with `./run` (STREAMLIFT_COMMAND)."""
    return f"{os.environ.get('STREAMLIFT_COMMAND', 'streamlift')} {words}"


def as_root() -> str:
    """What was typed, by root."""
    return f"sudo {as_typed(shlex.join(sys.argv[1:]))}"
