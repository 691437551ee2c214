# SPDX-License-Identifier: Apache-2.0
"""`streamlift top`: the status, drawn again while it changes, with the busiest connections below it.

It asks once an interval, draws once an answer, and shows as many connections as the terminal has lines left."""

from __future__ import annotations

import contextlib
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from hypervisor_svc.control import ControlError
from hypervisor_svc.tables import connection_table, status_screen

LEAST_INTERVAL = 0.2
"""Seconds: nobody reads faster, and each answer costs the service a little."""
Ask = Callable[[str], dict[str, Any]]


def run(ask: Ask, *, interval: float, times: int | None = None, console: Console | None = None) -> None:
    """Until `q` or Ctrl-C, or `times` pictures. Raises ControlError if the service is away at first; if it goes away later, that
    is shown, and it is waited for."""
    console, interval = console or Console(), max(interval, LEAST_INTERVAL)
    ask("status")
    with _keys() as key, Live(console=console, screen=console.is_terminal, auto_refresh=False, transient=False) as live:
        with contextlib.suppress(KeyboardInterrupt):
            drawn = 0
            while True:
                live.update(picture(ask, console), refresh=True)
                drawn += 1
                if drawn == times or key(interval) == "q":
                    return


def picture(ask: Ask, console: Console) -> RenderableType:
    """What is seen now."""
    try:
        status, connections = ask("status"), ask("connections")["connections"]
    except ControlError as error:
        return Text(f"{error}\n  {error.hint}")
    above = status_screen(status)
    left = console.height - len(console.render_lines(above, pad=False)) - 3  # heading, the last line, the cursor's
    connections.sort(key=lambda connection: -connection["count"])
    shown = connections[: max(left, 0)]
    ending = f"{len(connections) - len(shown)} more connections; " if len(shown) < len(connections) else ""
    return Group(above, *([connection_table(shown)] if shown else []), Text(f"{ending}q ends", style="dim"))


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """`key(seconds)`: the key that is pressed within that time, or ""; the terminal is as before in the end."""
    if not sys.stdin.isatty():
        yield _wait
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield _key
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _wait(seconds: float) -> str:
    time.sleep(seconds)
    return ""


def _key(seconds: float) -> str:
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return sys.stdin.read(1) if ready else ""
