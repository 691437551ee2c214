# SPDX-License-Identifier: Apache-2.0
"""`streamlift top`: what it draws, that it stays in its bounds, and how it ends. A terminal is a pseudo-terminal here."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hypervisor_svc import top
from hypervisor_svc.control import ControlError
from tests.hypervisor_svc.test_advice import status
from tests.hypervisor_svc.test_cli import config_in, control_server

ROOT = Path(__file__).resolve().parents[2]


def connection(number: int) -> dict[str, Any]:
    facts = {"machine": "tv1", "client": f"192.0.2.1:{number}", "server": "10.78.0.2:80", "state": "serving", "file": "f"}
    return {**facts, "sent": 1, "count": number, "answered": 0, "token": f"{number:032x}"}


def answers(command: str) -> dict[str, Any]:
    return status() if command == "status" else {"connections": [connection(number) for number in range(1, 500)]}


@pytest.mark.parametrize("height", [10, 24, 60])
def test_a_picture_is_no_higher_than_the_terminal_needs(height: int) -> None:
    console = Console(file=io.StringIO(), width=150, height=height)
    lines = console.render_lines(top.picture(answers, console))
    text = "\n".join("".join(segment.text for segment in line) for line in lines)
    assert len(lines) <= max(height, 24)
    assert "more connections; q ends" in text
    if height == 60:
        assert "192.0.2.1:499" in text and "192.0.2.1:1 " not in text  # the largest transfers first


def test_a_service_that_goes_away_is_shown_and_waited_for() -> None:
    asked = 0

    def ask(command: str) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if asked in (2, 3):
            raise ControlError("the service does not answer", "start it")
        return answers(command)

    console = Console(file=io.StringIO(), width=150, height=50)
    top.run(ask, interval=0.2, times=3, console=console)
    assert isinstance(console.file, io.StringIO)
    assert "q ends" in console.file.getvalue() and asked > 3


@pytest.mark.parametrize("ending", ["q", "Ctrl-C"])
def test_it_ends_and_leaves_the_terminal_as_it_was(ending: str, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    near, far = pty.openpty()
    before = termios.tcgetattr(far)
    with control_server(tmp_path):
        argv = [sys.executable, "-m", "hypervisor_svc", "--config", config, "top"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
        live = subprocess.Popen(argv, stdin=far, stdout=far, stderr=far, env=environment, cwd=ROOT, start_new_session=True)
        seen = _read_until(near, b"q ends")
        if ending == "q":
            os.write(near, b"q")
        else:
            live.send_signal(signal.SIGINT)
        _read_until(near, b"\x1b[?1049l")
        assert live.wait(10) == 0
    assert b"\x1b[?1049h" in seen  # a screen of its own
    assert termios.tcgetattr(far)[:4] == before[:4]
    os.close(near)
    os.close(far)


def _read_until(terminal: int, words: bytes) -> bytes:
    seen, deadline = b"", time.monotonic() + 20
    while words not in seen:
        assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], seen
        seen += os.read(terminal, 1 << 16)
    return seen
