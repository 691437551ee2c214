# SPDX-License-Identifier: Apache-2.0
"""An agent of an earlier release meets this service: it is said, with the command that helps."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.namespaces.deployment import ROOT, Deployment, Process, deployed, wait_for
from tests.namespaces.topology import routed

pytestmark = pytest.mark.root


def earlier_release(folder: Path, *, speaks: int) -> Path:
    """The agent as it may have been: of version 0.0.9, with that version of the channel, and without what it says it knows."""
    shutil.copytree(ROOT / "guest_agent", folder / "guest_agent", ignore=shutil.ignore_patterns("__pycache__"))
    for path, line, was in (
        ("__init__.py", r'__version__ = ".*"', '__version__ = "0.0.9"'),
        ("handoff/wire.py", r"^VERSION = \d+", f"VERSION = {speaks}"),
        ("agent.py", r'^ +"features": .*\n', ""),
    ):
        text, count = re.subn(line, was, (folder / "guest_agent" / path).read_text(), flags=re.MULTILINE)
        assert count == 1
        (folder / "guest_agent" / path).write_text(text)
    return folder


def status_screen(deployment: Deployment) -> str:
    argv = [sys.executable, "-m", "hypervisor_svc", "--config", str(deployment.folder / "streamlift.toml"), "status"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("speaks", "cause"), [(1, "its agent is too old: 0.0.9"), (0, "it speaks another version")])
def test_an_old_agent_is_named_with_the_remedy(tmp_path: Path, speaks: int, cause: str) -> None:
    old = earlier_release(tmp_path / "old", speaks=speaks)
    share = tmp_path / "share"
    share.mkdir()
    with routed() as network, deployed(network, tmp_path, share) as deployment:
        assert "too old" not in status_screen(deployment)
        with agent_of(deployment, old):
            screen = wait_for(lambda: _if_old(status_screen(deployment)), "the old agent's hello")
    assert cause in screen
    assert "in guest, as root: python3 /srv/share/streamlift-agent.pyz install" in screen


@contextlib.contextmanager
def agent_of(deployment: Deployment, old: Path) -> Iterator[None]:
    """An earlier one, in place of this release's."""
    deployment.agent.stop()
    argv = ["env", "-C", str(old), f"PYTHONPATH={old}", *deployment.agent.argv]
    agent = Process(deployment.network.guest, argv, deployment.folder / "old.log")
    agent.start()
    try:
        yield
    finally:
        agent.stop()


def test_one_that_cannot_let_go_leaves(tmp_path: Path) -> None:
    """Before memory is copied, as its release did."""
    old, share = earlier_release(tmp_path / "old", speaks=1), tmp_path / "share"
    share.mkdir()
    with routed() as network, deployed(network, tmp_path, share) as deployment, agent_of(deployment, old):
        wait_for(lambda: deployment.machine()["agent_version"] == "0.0.9", "the old agent's hello")
        assert deployment.call("leave", machine="guest", only="share")["presence"] == "away"
        assert deployment.call("return", machine="guest")["presence"] == "here"


def _if_old(screen: str) -> str:
    return screen if "too old" in screen else ""
