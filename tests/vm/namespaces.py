# SPDX-License-Identifier: Apache-2.0
"""Namespaces of this machine that a process keeps alive: a hypervisor's, a client's, a router's. Needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


class Namespaces:
    """A process that keeps namespaces alive; `command(...)` is how to run something inside."""

    def __init__(self, *kinds: str) -> None:
        self._kinds = kinds
        options = [f"--{kind}" for kind in kinds]
        if "mount" in kinds:
            options += ["--propagation", "private"]
        if "pid" in kinds:
            options += ["--fork", "--kill-child=SIGKILL", "--mount-proc"]
        # In a pid namespace this shell is the first process: it must reap what daemons leave behind ("wait"), and
        # the namespaces must not outlive us (--pdeathsig).
        wait = "sleep infinity & wait" if "pid" in kinds else "exec sleep infinity"
        holder = ("sh", "-c", f"echo ready; {wait}")
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *options, *holder],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for us
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("unshare failed: are we root?")
        self.pid = _first_child(self._process.pid) if "pid" in kinds else self._process.pid

    def command(self, *arguments: str | Path) -> list[str]:
        """The command line that runs `arguments` inside."""
        kinds = [f"--{kind}" for kind in self._kinds]
        return ["nsenter", f"--target={self.pid}", *kinds, "--", *(str(argument) for argument in arguments)]

    def run(self, *arguments: str | Path, check: bool = True) -> str:
        """Run a program inside to its end and return what it printed."""
        result = subprocess.run(self.command(*arguments), capture_output=True, text=True, check=False)
        if check and result.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, arguments))}: {result.stderr.strip() or result.returncode}")
        return result.stdout

    def start(
        self,
        *arguments: str | Path,
        output: IO[Any] | int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program inside that runs on; both of its outputs go to `output`."""
        return subprocess.Popen(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            env={**os.environ, **(environment or {})},
            process_group=0,
        )

    def send(self, process: subprocess.Popen[Any], number: int) -> None:
        """Signal what runs here. In a pid namespace nsenter stands between, and passes no signal on."""
        if process.poll() is None:
            os.kill(_first_child(process.pid) if "pid" in self._kinds else process.pid, number)

    def signal(self, process: subprocess.Popen[Any], number: int) -> None:
        """Signal it and wait for its end."""
        self.send(process, number)
        process.wait(timeout=20)

    def close(self) -> None:
        """End the namespaces, and with a pid namespace all that ran in it."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def link(near: Namespaces, near_card: str, far: Namespaces, far_card: str) -> None:
    """A veth pair between two network namespaces, both ends up."""
    ends = ("ip", "link", "add", near_card, "netns", str(near.pid), "type", "veth")
    subprocess.run([*ends, "peer", "name", far_card, "netns", str(far.pid)], check=True)
    for side, card in ((near, near_card), (far, far_card)):
        side.run("ip", "link", "set", card, "up")


def give_addresses(side: Namespaces, card: str, *addresses: str) -> None:
    """Addresses with their prefix lengths. An IPv6 address of ours need not be probed for a second."""
    for address in addresses:
        side.run("ip", "address", "add", address, "dev", card, *(("nodad",) if ":" in address else ()))


def _first_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()[0])
