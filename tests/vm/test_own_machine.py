# SPDX-License-Identifier: Apache-2.0
"""A person with an ordinary VM follows the README: every command of it is typed here as it is printed there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.libvirt_host import LibvirtHost, wait_for
from tests.vm.own_machine import ADDRESS, NAME, OwnMachine, own_machine
from tests.vm.product import ROOT

pytestmark = [pytest.mark.vm, pytest.mark.root]

FILM = Path("/srv/media/film.mp4")
COPY = Path("/tmp/film.mp4")
MOST_COMMANDS = 6


def printed() -> list[tuple[str, str]]:
    """(where, command) of the README's part about an own VM; comments say where."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text.split("## Your own VM\n", 1)[1].split("\n## ", 1)[0]
    where, found = "", []
    for line in re.findall(r"^    (\S.*)$", part, re.MULTILINE):
        if line.startswith("#"):
            where = "vm" if "in the VM" in line else "host"
        else:
            found.append((where, line))
    return found


class Person:
    """At the host's shell, in the checkout, as root."""

    def __init__(self, host: LibvirtHost, folder: Path) -> None:
        self.host, self._log = host, folder / "typed.log"
        (folder / "bin").mkdir()
        sudo = folder / "bin" / "sudo"
        sudo.write_text('#!/bin/sh\nexec "$@"\n')
        sudo.chmod(0o755)
        self._path = f"{folder}/bin:{os.environ['PATH']}"

    def type(self, command: str) -> str:
        """What was said; a command that ends with & runs on. Raises RuntimeError if it fails."""
        before = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("a") as log:
            words = ("env", "-C", str(ROOT), f"PATH={self._path}", "timeout", "300", "bash", "-c", command)
            done = subprocess.run(self.host.namespaces.command(*words), stdout=log, stderr=log, check=False)
        said = self._log.read_bytes()[before:].decode()
        if done.returncode:
            raise RuntimeError(f"{command}: {said[-2000:]}")
        return said


@pytest.fixture
def person(libvirt_host: LibvirtHost, tmp_path: Path) -> Iterator[Person]:
    """What they have: a folder with a film, at a place of its own that only this hypervisor sees."""
    for place in ("/srv", "/run/streamlift"):
        Path(place).mkdir(exist_ok=True)
        libvirt_host.run("mount", "-t", "tmpfs", "none", place)
    film = tmp_path / "film"
    film.write_bytes(os.urandom(20_000_000))
    libvirt_host.run("mkdir", FILM.parent)
    libvirt_host.run("cp", film, FILM)
    yield Person(libvirt_host, tmp_path)
    stop_service(libvirt_host)
    libvirt_host.run("umount", "/srv")
    libvirt_host.run("umount", "-l", "/run/streamlift")
    COPY.unlink(missing_ok=True)


def stop_service(host: LibvirtHost) -> None:
    """It runs on in the background, as the README has it."""
    asked = host.run("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "hypervisor_svc", "status", "--json", check=False)
    if asked:
        supervisor = host.run("ps", "-o", "ppid=", "-p", str(json.loads(asked)["pid"])).strip()
        host.run("kill", "-TERM", supervisor)


@pytest.mark.parametrize("runs", [False, pytest.param(True, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_the_readme_takes_a_person_to_an_offloaded_transfer(
    person: Person, libvirt_host: LibvirtHost, tmp_path: Path, runs: bool
) -> None:
    """Whether the VM is off when it is attached, or runs and is started anew."""
    commands = printed()
    assert 0 < len(commands) <= MOST_COMMANDS
    with own_machine(libvirt_host, runs=runs) as machine:
        for where, command in commands:
            said = follow(person, machine, where, command)
        assert hashlib.sha256(COPY.read_bytes()).digest() == hashlib.sha256((tmp_path / "film").read_bytes()).digest()
        wait_for(lambda: "1 came home" in person.type(commands[-1][1]), seconds=60, what="the connection home")
        assert "1 went out" in person.type(commands[-1][1])
        assert "! " not in said.split("connections", 1)[1], "something is still missing"
        if runs:
            assert_wrong_turns_are_said(machine)
            undo(person, machine)


def assert_wrong_turns_are_said(machine: OwnMachine) -> None:
    """A port that another server has."""
    taken = "python3 -c 'import socket, time; server = socket.create_server((\"\", 8099)); time.sleep(20)' & sleep 1"
    with pytest.raises(RuntimeError, match=r"port 8099 is taken\s+see by whom: ss -ltnp 'sport = :8099'"):
        machine.type(f"{taken}; python3 /srv/share/streamlift-agent.pyz install --media-port 8099")


def undo(person: Person, machine: OwnMachine) -> None:
    """As the README says below its commands; and what the next ones say of a VM that is half undone."""
    machine.type("streamlift-agent uninstall")
    assert "streamlift" not in machine.type("ls /etc/systemd/system /usr/local/bin")
    wait_for(lambda: "no agent answers in it" in person.type("sudo ./run streamlift status"), seconds=30, what="what is missing")
    assert "changed: channel, share, addresses" in person.type(f"sudo ./run streamlift detach {NAME}")
    wait_for(lambda: f"{NAME}: it has no channel" in person.type("sudo ./run streamlift status"), seconds=30, what="no channel")
    with pytest.raises(RuntimeError, match=rf"sudo ./run streamlift attach {NAME} --share FOLDER --address ADDRESS"):
        person.type(f"sudo ./run streamlift bench --domain {NAME} --path film.mp4")


def follow(person: Person, machine: OwnMachine, where: str, command: str) -> str:
    """One command, where the README says."""
    assert NAME in command or ADDRESS in command or where == "vm" or "streamlift" in command
    if where == "vm":
        machine.wait_booted()
        return machine.type(command)
    return person.type(command)
