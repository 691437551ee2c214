# SPDX-License-Identifier: Apache-2.0
"""The demo as a stranger runs it, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.demo.content import LADDERS, MANIFEST
from tests.demo.report import LARGE, STEPS, Report, Row
from tests.vm.product import ROOT
from tests.vm.setups import NAMES


def links() -> str:
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout


@pytest.mark.vm
def test_a_stranger_sees_it_work(tmp_path: Path) -> None:
    """The demo, a player on this machine that reaches the VM, and Ctrl-C."""
    before, found = links(), tmp_path / "demo.json"
    argv = [sys.executable, "-m", "tests.demo", "--keep", "--json", str(found)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, process_group=0) as demo:
        assert demo.stdout is not None
        try:
            words = (word for line in demo.stdout for word in line.split())
            url = next((word for word in words if word.startswith("http")), "")
            next((word for word in words if word == "Ctrl-C"), "")
            with urllib.request.urlopen(f"{url}/tv/{MANIFEST}", timeout=20) as answer:
                assert b"<MPD" in answer.read()
        finally:
            os.killpg(demo.pid, signal.SIGINT)
    assert demo.returncode == 0
    assert_complete(json.loads(found.read_text()))
    deadline = time.monotonic() + 5
    while links() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert links() == before


@pytest.mark.vm
def test_a_live_stream(tmp_path: Path) -> None:
    """`./run demo live`: fifty clients, of which five do not read for twenty seconds."""
    found = tmp_path / "demo.json"
    argv = [sys.executable, "-m", "tests.demo", "live", "--json", str(found)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    report = json.loads(found.read_text())
    assert report["holds"] and report["relay"]["engine"] and len(report["frames"]) == 50


@pytest.mark.vm
@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_vm_that_moves(tmp_path: Path) -> None:
    """`./run demo migrate`: curl and ffmpeg get every byte, and nothing stays."""
    before, found = links(), tmp_path / "demo.json"
    argv = [sys.executable, "-m", "tests.demo", "migrate", "--json", str(found)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=450, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    report = json.loads(found.read_text())
    assert report["holds"] and not any(report["verdicts"].values())
    assert links() == before


def assert_complete(report: dict[str, Any]) -> None:
    """Every ladder was fetched, matched and offloaded, and measured in each set-up."""
    assert report["holds"]
    assert [ladder["name"] for ladder in report["ladders"]] == [ladder.name for ladder in LADDERS]
    for ladder, made in zip(report["ladders"], LADDERS, strict=True):
        assert ladder["faults"] == []
        # curl fetches each segment whole and in part, ffmpeg once more
        assert ladder["offloaded"] == ladder["large_answers"] == 3 * made.segments
        assert all(ladder["handoff_us"][step]["samples"] == ladder["offloaded"] for step in STEPS)
        assert set(ladder["local"]) == {"too_small"}
        assert all(min(ladder["mbit_per_second"][setup]) > 0 for setup in NAMES)


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"faults": ["wrong bytes"]}, False),
        ({"local": {"table_full": 1}}, False),
        ({"offloaded": 11}, False),
        ({"sizes": [LARGE - 1], "offloaded": 0}, False),
    ],
)
def test_the_verdict(change: dict[str, Any], holds: bool) -> None:
    row = Row("tv", 4, [LARGE] * 12 + [LARGE - 1] * 6, offloaded=12)
    row.local["too_small"] = 6
    for name, value in change.items():
        setattr(row, name, value)
    assert Report("10.78.0.2", "tcg", [row]).holds is holds
