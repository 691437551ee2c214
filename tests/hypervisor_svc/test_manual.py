# SPDX-License-Identifier: Apache-2.0
"""The manual pages: whole, and such that man(1) and mandoc(1) have nothing to say about them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hypervisor_svc import manual
from hypervisor_svc.cli import app
from hypervisor_svc.config import documented

PAGES = ("streamlift.1", "streamlift-agent.1", "streamlift.toml.5")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    result = CliRunner().invoke(app, ["man", "--out", str(folder)])
    assert result.exit_code == 0 and result.output.split() == [str(folder / name) for name in PAGES]
    return folder


@pytest.mark.root
@pytest.mark.parametrize("name", PAGES)
def test_the_checkers_are_content(pages: Path, name: str) -> None:
    for command in (["mandoc", "-T", "lint", name], ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", f"./{name}"]):
        done = subprocess.run(command, cwd=pages, capture_output=True, text=True, check=False)
        said = done.stderr + (done.stdout if command[0] == "mandoc" else "")
        assert (done.returncode, said) == (0, ""), command


def test_every_command_and_every_key_is_there(pages: Path) -> None:
    commands = (pages / PAGES[0]).read_text()
    root = typer.main.get_command(app)
    for command, context in manual._commands(root, typer.Context(root, info_name="streamlift")):
        assert f".SS {context.command_path}".replace("-", "\\-") in commands
        assert "Examples:" in command.epilog, f"{context.command_path} has no example"
        for parameter in command.params:
            assert parameter.opts[-1].replace("-", "\\-") in commands
    keys = (pages / PAGES[2]).read_text()
    assert all(f"\\fB{key}\\fR" in keys for _, model in documented() for key in model.model_fields)


def test_examples_are_commands_that_exist() -> None:
    root = typer.main.get_command(app)
    for command, context in manual._commands(root, typer.Context(root, info_name="streamlift")):
        lines = [line.split() for line in command.epilog.splitlines() if line.startswith("  ")]
        assert lines and all(set(context.command_path.split()) <= set(line) for line in lines), context.command_path


def test_the_agents_page_is_its_help(pages: Path) -> None:
    page = (pages / PAGES[1]).read_text().replace("\\", "")
    for part in ("--allow", "install", "uninstall", "--media-port", "/run/streamlift/agent.sock"):
        assert part in page


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `streamlift --show-completion` prints makes a shell ask; and this is the answer it gets."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # there may be no shell among those who run us
    if shell == "bash" and shutil.which("bash"):
        script = CliRunner().invoke(app, ["--show-completion", shell], prog_name="streamlift").output
        assert "_STREAMLIFT_COMPLETE" in script
    asked = {"COMP_WORDS": "streamlift hand", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "streamlift hand"}
    environment = {**os.environ, **asked, "_STREAMLIFT_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    answer = CliRunner().invoke(app, [], prog_name="streamlift", env=environment)
    assert "hand-back" in answer.output
