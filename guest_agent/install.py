# SPDX-License-Identifier: Apache-2.0
"""`streamlift-agent install` and `uninstall`: the agent becomes a service of this guest, and is gone again.

It runs from the one file that `streamlift attach` puts on the share (a zip application), or from a folder. Steps: look
whether it can work, copy the package to where Python finds it, write the units, start them, and say whether the host answers."""

from __future__ import annotations

import importlib.resources
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from importlib.resources.abc import Traversable
from pathlib import Path

from guest_agent import offload
from guest_agent.agent import DEFAULT_PORT
from guest_agent.share import find_shares

UNITS = Path("/etc/systemd/system")
COMMAND = Path("/usr/local/bin/streamlift-agent")
AGENT_UNIT, MEDIA_UNIT, SHARE_UNIT = "streamlift-agent.service", "streamlift-media.service", "srv-share.mount"
GROUP = "streamlift"
DEFAULT_MEDIA_PORT = "--port 80"
PATIENCE = 20.0
"""Seconds for the agent to start and the host to answer."""


class InstallError(Exception):
    """It cannot be installed here; `hint` is the next command."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def install(media_port: int | None) -> str:
    """Make the agent a service, with the example media server at `media_port` if one is given; what to tell people.

    Doing it again replaces what was there. Raises InstallError."""
    _check(media_port)
    _copy_package()
    _run("groupadd", "--force", "--system", GROUP)
    units = [SHARE_UNIT, AGENT_UNIT, *([MEDIA_UNIT] if media_port else [])]
    for name in units:
        _write_unit(name, media_port)
    _run("systemctl", "daemon-reload")
    _run("systemctl", "enable", "--quiet", *units)
    _run("systemctl", "start", SHARE_UNIT)
    _run("systemctl", "restart", *units[1:])
    return _await_host()


def uninstall() -> str:
    """Undo `install`; idempotent."""
    _require_root()
    there = [name for name in (MEDIA_UNIT, AGENT_UNIT, SHARE_UNIT) if (UNITS / name).exists()]
    if there:
        _run("systemctl", "disable", "--quiet", "--now", *there)
    for name in there:
        (UNITS / name).unlink()
    _run("systemctl", "daemon-reload")
    COMMAND.unlink(missing_ok=True)
    shutil.rmtree(_package(), ignore_errors=True)
    return "streamlift-agent is gone; the group streamlift stays"


# Looking first.


def _check(media_port: int | None) -> None:
    _require_root()
    if not os.path.isdir("/run/systemd/system"):
        raise InstallError("systemd does not run here", "start the agent by hand: streamlift-agent --help")
    if not os.path.exists(DEFAULT_PORT):
        hint = "on the host: sudo streamlift attach VM --share FOLDER --address ADDRESS --restart"
        raise InstallError(f"this VM has no channel to the host ({DEFAULT_PORT} is missing)", hint)
    if not find_shares() and subprocess.run(["modprobe", "-q", "9pnet_virtio"], check=False).returncode:
        raise InstallError("this kernel has no 9p, by which the share is mounted", "sudo apt-get install linux-image-amd64")
    if media_port and _taken(media_port):
        raise InstallError(f"port {media_port} is taken", f"see by whom: ss -ltnp 'sport = :{media_port}'; or choose another")


def _require_root() -> None:
    if os.geteuid() != 0:
        raise InstallError("installing needs root", f"sudo python3 {' '.join(sys.argv)}")


def _taken(port: int) -> bool:
    """By another than our own media server, which is restarted."""
    unit = UNITS / MEDIA_UNIT
    if unit.exists() and f"--port {port}\n" in unit.read_text():
        return False
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return True
    return False


# Putting it there.


def _package() -> Path:
    """Where this Python looks for what the administrator installs: on Debian /usr/local/lib/python3.11/dist-packages."""
    return Path(sysconfig.get_path("purelib")) / "guest_agent"


def _copy_package() -> None:
    """The new one aside first: an agent that runs keeps the files that it has open."""
    package = _package()
    aside = package.with_name("guest_agent.new")
    shutil.rmtree(aside, ignore_errors=True)
    _copy(importlib.resources.files("guest_agent"), aside)
    shutil.rmtree(package, ignore_errors=True)
    aside.rename(package)
    COMMAND.write_text(f"#!/bin/sh\nexec {sys.executable} -m guest_agent \"$@\"\n")
    COMMAND.chmod(0o755)


def _copy(source: Traversable, target: Path) -> None:
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.is_dir():
            if entry.name != "__pycache__":
                _copy(entry, target / entry.name)
        else:
            (target / entry.name).write_bytes(entry.read_bytes())


def _write_unit(name: str, media_port: int | None) -> None:
    text = (importlib.resources.files("guest_agent") / name).read_text().replace("/usr/bin/python3", sys.executable)
    if media_port:
        text = text.replace(DEFAULT_MEDIA_PORT, f"--port {media_port}")
    (UNITS / name).write_text(text)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last_words = (done.stderr or done.stdout).strip() or str(done.returncode)
        raise InstallError(f"{' '.join(command)}: {last_words}", f"journalctl -b -u {AGENT_UNIT} -u {SHARE_UNIT}")


def _await_host() -> str:
    """The agent runs; whether the host's service answers is worth waiting for, and no failure."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        agent = offload.status()["agent"]
        if agent and agent.get("host") == "up":
            return f"streamlift-agent runs, and the host's service {agent.get('service_version')} answers"
        time.sleep(0.2)
    return "streamlift-agent runs, but the host's service does not answer; on the host: sudo streamlift status"
