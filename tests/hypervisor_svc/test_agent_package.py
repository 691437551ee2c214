# SPDX-License-Identifier: Apache-2.0
"""The agent as one file: whole, reproducible, and run by a Python that knows nothing of this checkout."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from guest_agent import __version__
from hypervisor_svc import agent_package
from vm_images.root import AGENT, AGENT_UNITS


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / agent_package.NAME
    agent_package.write(path)
    return path


def run(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    argv = ["/usr/bin/python3", str(package), *arguments]
    return subprocess.run(argv, cwd="/", env=environment, capture_output=True, text=True, check=False)


def test_equal_sources_give_equal_bytes(package: Path, tmp_path: Path) -> None:
    agent_package.write(tmp_path / "again.pyz")
    assert (tmp_path / "again.pyz").read_bytes() == package.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.pyz", agent_package.NAME]


def test_all_of_the_agent_is_in_it(package: Path) -> None:
    inside = set(zipfile.ZipFile(package).namelist())
    assert {f"guest_agent/{path.relative_to(AGENT)}" for path in AGENT.rglob("*.py")} <= inside
    assert {f"guest_agent/{unit}" for unit in AGENT_UNITS} <= inside


def test_it_runs_alone(package: Path) -> None:
    assert run(package, "--version").stdout.strip() == __version__
    assert "install" in run(package, "--help").stdout


def test_it_cannot_be_installed_on_the_host(package: Path) -> None:
    """No root, no systemd, or no channel: whichever comes first, one cause and one command."""
    done = run(package, "install")
    first, second = done.stderr.splitlines()
    assert done.returncode == 1
    assert first.startswith("streamlift-agent: ") and second.startswith("  ")
    causes = ("needs root", "systemd does not run", "has no channel to the host")
    assert any(cause in first for cause in causes)
