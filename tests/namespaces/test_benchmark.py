# SPDX-License-Identifier: Apache-2.0
"""`streamlift bench` on a VM that serves: what it counts is what the media server counts, and all is as before in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor_svc.control import ControlError
from tests.client import make_content
from tests.namespaces.deployment import ROOT, Deployment, deployed, wait_for
from tests.namespaces.topology import routed

pytestmark = pytest.mark.root
SIZE = 1_000_000


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    make_content(str(tmp_path / "share"), (SIZE, 100))
    with routed() as network, deployed(network, tmp_path, tmp_path / "share") as found:
        yield found


def bench(deployment: Deployment, *arguments: str) -> subprocess.CompletedProcess[str]:
    """On the host, as its operator types it."""
    argv = ["ip", "netns", "exec", deployment.network.host.name, sys.executable, "-m", "hypervisor_svc"]
    argv += ["--config", str(deployment.folder / "streamlift.toml"), "bench", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_both_ways_are_measured_and_counted(deployment: Deployment, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    path = f"/{SIZE}.bin"
    done = bench(deployment, "--domain", "guest", "--path", path, "--requests", "4", "--blocks", "3", "--json", str(report))
    assert done.returncode == 0, done.stderr
    assert "The offload gives" in done.stdout and "Mbit/s" in done.stdout
    found = json.loads(report.read_text())
    assert found["size"] == SIZE and found["url"] == f"http://10.77.1.2:80{path}"
    assert [block["side"] for block in found["blocks"]] == ["offloaded", "in the VM"] * 3
    for block in found["blocks"]:
        went_out = 4 if block["side"] == "offloaded" else 0
        assert (len(block["seconds"]), block["bytes"]) == (4, 4 * SIZE)
        assert (block["counters"]["handed_out"], block["counters"]["failed"]) == (went_out, 0)
    assert {"restore", "redirect"} <= found["steps"].keys()
    wait_offloaded(deployment, 13)
    assert deployment.counters()["local"] == {"handed_back_by_operator": 13}
    deployment.network.host.run("curl", "-sf", "-o", "/dev/null", f"http://10.77.1.2{path}")
    wait_offloaded(deployment, 14)  # the pause is over


def wait_offloaded(deployment: Deployment, count: int) -> None:
    """The server counts a transfer when its connection is home, which may be after its client has everything."""
    wait_for(lambda: deployment.counters()["offloaded"] == count, f"{count} offloaded")


@pytest.mark.parametrize(
    ("arguments", "cause", "hint"),
    [
        (("--domain", "nobody", "--path", "x"), "no VM named 'nobody' has a channel here (known: guest)", "attach nobody"),
        (("--domain", "guest", "--path", "none.bin"), "404", "--path names a file"),
        (("--domain", "guest", "--path", "x", "--port", "81"), "Connection refused", "--port PORT"),
    ],
)
def test_what_cannot_be_measured(deployment: Deployment, arguments: tuple[str, ...], cause: str, hint: str) -> None:
    done = bench(deployment, *arguments)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert cause in first and hint in second


def test_a_pause_ends_by_itself(deployment: Deployment) -> None:
    deployment.call("pause", machine="guest", seconds=0.5)
    ended = time.monotonic() + 0.5
    deployment.network.client.run("curl", "-sf", "-o", "/dev/null", f"http://10.77.1.2/{SIZE}.bin")
    time.sleep(max(0, ended - time.monotonic()))
    deployment.network.client.run("curl", "-sf", "-o", "/dev/null", f"http://10.77.1.2/{SIZE}.bin")
    wait_offloaded(deployment, 1)
    for seconds in (-1, 601, float("nan")):
        with pytest.raises(ControlError, match="a pause is"):
            deployment.call("pause", machine="guest", seconds=seconds)
