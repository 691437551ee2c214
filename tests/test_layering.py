# SPDX-License-Identifier: Apache-2.0
"""What may import what, and what every file must carry."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    *("README.md", "CHANGELOG.md", "LICENSE", "run", ".ci", ".gitignore", "pyproject.toml"),
    *("host_module", "guest_agent", "hypervisor_svc", "vm_images", "tests"),
}


def tracked() -> list[Path]:
    command = ["git", "-c", "safe.directory=*", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.fail("not a git checkout")
    return [ROOT / name for name in listed if (ROOT / name).exists()]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "guest_agent":
                yield from (f"guest_agent.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_the_service_imports_only_the_shared_steps_of_the_guest() -> None:
    for path in (ROOT / "hypervisor_svc").rglob("*.py"):
        of_guest = [name for name in imported(path) if name.split(".")[0] == "guest_agent"]
        assert all(name.startswith("guest_agent.handoff") for name in of_guest), (path.name, of_guest)


def test_the_guest_needs_the_standard_library_only() -> None:
    allowed = sys.stdlib_module_names | {"guest_agent"}
    for path in (ROOT / "guest_agent").rglob("*.py"):
        foreign = [name for name in imported(path) if name.split(".")[0] not in allowed]
        assert not foreign, (path.name, foreign)


def test_the_shared_steps_do_not_know_the_agent() -> None:
    for path in (ROOT / "guest_agent" / "handoff").rglob("*.py"):
        wrong = [n for n in imported(path) if n.startswith("guest_agent") and not n.startswith("guest_agent.handoff")]
        assert not wrong, (path.name, wrong)


def test_every_source_file_names_its_licence() -> None:
    sources = [path for path in tracked() if path.suffix in (".py", ".service", ".toml", ".sh") or path.name == "run"]
    assert [str(path) for path in sources if "SPDX-License-Identifier: " not in path.read_text()[:400]] == []


def test_nothing_else_at_the_top_level() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in tracked()} <= TOP_LEVEL
