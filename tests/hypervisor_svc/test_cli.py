# SPDX-License-Identifier: Apache-2.0
"""The command line: help for everything, and errors that say what to do."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hypervisor_svc import __version__
from hypervisor_svc.cli import app
from hypervisor_svc.control import ControlError, ControlServer, call
from tests.hypervisor_svc.test_advice import status

COMMANDS = ("serve", "check", "deploy", "undeploy", "attach", "detach", "status", "top", "connections", "relays", "hand-back",
            "image", "module", "config", "man")  # fmt: skip


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_version_needs_no_command() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output == f"streamlift {__version__}\n"


def test_help_lists_every_command() -> None:
    text = invoke("--help").output
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    assert invoke(command, "--help").exit_code == 0


def config_in(folder: Path) -> str:
    path = folder / "streamlift.toml"
    path.write_text(f'[service]\nruntime_dir = "{folder}"\n')
    return str(path)


def test_a_service_that_is_away_is_said_with_a_remedy(tmp_path: Path) -> None:
    result = invoke("--config", config_in(tmp_path), "status")
    assert result.exit_code == 1
    assert "does not answer" in result.output and "systemctl start streamlift" in result.output


def test_a_bad_configuration_is_said_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[policy]\nwrong = 1\n")
    result = invoke("--config", str(path), "status")
    assert result.exit_code == 1
    assert "bad.toml:2" in result.output


def test_hand_back_needs_a_token_or_all(tmp_path: Path) -> None:
    result = invoke("--config", config_in(tmp_path), "hand-back", "vm1")
    assert result.exit_code == 2
    assert "--all" in result.output


def test_a_value_that_is_not_allowed_is_a_usage_error(tmp_path: Path) -> None:
    result = invoke("deploy", "vm1", "--share", str(tmp_path), "--mode", "flying")
    assert result.exit_code == 2
    assert "'flying' is none of routed, bridged" in result.output


def test_the_module_is_explained_where_there_is_none(tmp_path: Path) -> None:
    sockets, relays = json.loads(invoke("module", "status", "--json").output)
    if not sockets["loaded"]:
        assert sockets["used"] == "tcp_repair" and "streamlift module build" in sockets["why"]
    if not relays["loaded"]:
        assert relays["used"] == "user" and "not loaded" in relays["why"]
    result = invoke("module", "build", "--headers", str(tmp_path))
    assert result.exit_code == 1
    assert "apt-get install linux-headers-" in result.output
    assert "there are: socket_offload, omss" in invoke("module", "load", "nonsense").output


@contextmanager
def control_server(folder: Path) -> Iterator[None]:
    """A control socket with one command, in a thread of its own."""
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    def refuse(request: dict[str, Any]) -> dict[str, Any]:
        raise ValueError(f"no VM named {request['machine']!r}")

    async def main() -> None:
        handlers = {
            "connections": lambda request: {"connections": []},
            "hand_back": refuse,
            "status": lambda request: status(),
        }
        async with ControlServer(str(folder / "control.sock"), handlers):
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    ready.wait(5)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def test_answers_of_the_service_reach_people_and_programs(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with control_server(tmp_path):
        assert json.loads(invoke("--config", config, "connections", "--json").output) == []
        assert "client" in invoke("--config", config, "connections").output
        refused = invoke("--config", config, "hand-back", "--all", "vm1")
        assert refused.exit_code == 1 and "no VM named 'vm1'" in refused.output
        with pytest.raises(ControlError, match="no command"):
            call(str(tmp_path / "control.sock"), "dance")
    assert not (tmp_path / "control.sock").exists()
