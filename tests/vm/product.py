# SPDX-License-Identifier: Apache-2.0
"""The product with a real VM: the service on a hypervisor in namespaces, and what its clients and operators see of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from hypervisor_svc import control
from tests.open_files import fewest
from tests.vm.libvirt_host import LibvirtHost, wait_for

ROOT = Path(__file__).resolve().parents[2]
PATHS = os.environ.get("PYTHONPATH", str(ROOT))
"""Where Python finds the product, and its C extension."""


class Product:
    """The service on a `LibvirtHost`, the VM "guest" as clients see it, and the client beside it."""

    def __init__(self, host: LibvirtHost, folder: Path, share: Path, *, extra: str = "") -> None:
        self.host, self.share = host, share
        self.log = folder / "service.log"
        self._runtime, self.config = folder / "run", folder / "streamlift.toml"
        service = f'[service]\nruntime_dir = "{self._runtime}"\n[libvirt]\nuri = "{host.uri}"\n'
        self.config.write_text(service + extra, encoding="utf-8")

    def start(self, **faults: str) -> None:
        """Start the service and wait until it answers; `faults` become environment variables of this life only."""
        environment = {"PYTHONPATH": PATHS, **faults}
        with self.log.open("ab") as log:
            self._process = self.host.start(*self._command("serve"), output=log, environment=environment)
        wait_for(self._answers, seconds=30, what="the service")

    @property
    def control(self) -> Path:
        """Its control socket."""
        return self._runtime / "control.sock"

    def stop(self) -> None:
        """End the service."""
        self.host.namespaces.signal(self._process, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL for the service and, in the same breath, for the supervisor that would start it again."""
        pid = str(self.ask("status")["pid"])
        supervisor = self.host.run("ps", "-o", "ppid=", "-p", pid).strip()
        self.host.run("kill", "-KILL", supervisor, pid)
        self._process.wait(timeout=10)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask the service through its control socket."""
        return control.call(str(self.control), command, **arguments)

    def _answers(self) -> bool:
        with contextlib.suppress(control.ControlError):
            return bool(self.ask("status"))
        return False

    def status(self) -> dict[str, Any]:
        """What `streamlift status --json` prints."""
        status: dict[str, Any] = json.loads(self.command("status", "--json"))
        return status

    def command(self, *arguments: str) -> str:
        """Run the command line `streamlift` on the host; what it prints."""
        return self.host.run("env", f"PYTHONPATH={PATHS}", *self._command(*arguments))

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command line on the host; whoever calls waits for its end."""
        argv = self.host.namespaces.command("env", f"PYTHONPATH={PATHS}", *self._command(*arguments))
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, process_group=0)

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "hypervisor_svc", "--config", str(self.config), *arguments]

    def machine(self) -> dict[str, Any]:
        """The VM's part of the status; empty while the service does not know it."""
        return next(iter(self.ask("status")["machines"]), {})

    def wait_ready(self, address: str) -> None:
        """Until the agent's hello has arrived and the media server answers there."""
        wait_for(lambda: self.machine().get("channel") == "hello", seconds=60, what="the agent's hello")
        wait_for(lambda: self.fetch(address, ".streamlift", check=False), seconds=60, what=f"the media server at {address}")

    def wait_home(self) -> None:
        """Until no connection is out."""
        wait_for(lambda: not self.ask("connections")["connections"], seconds=30, what="all connections home")

    def fetch(self, address: str, path: str, *, port: int = 80, check: bool = True) -> bytes:
        """A body as the client gets it, with curl."""
        command = self.host.client.command("curl", "-gsSf", "--max-time", "60", f"http://{bracketed(address)}:{port}/{path}")
        return subprocess.run(command, capture_output=True, check=check).stdout

    def counters(self, address: str) -> dict[str, Any]:
        """The media server's own counters."""
        counters: dict[str, Any] = json.loads(self.fetch(address, ".streamlift"))
        return counters

    def load(self, address: str, *, requests: int, connections: int, timeout: float = 280) -> dict[str, Any]:
        """Run `tests.client` in the client's namespace; its report."""
        command = self.host.client.command(sys.executable, "-m", "tests.client", "--server", f"{bracketed(address)}:80")
        command += ["--root", str(self.share), "--requests", str(requests), "--connections", str(connections)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False)
        assert done.stdout, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def open_files(self) -> int:
        """File descriptors of the service."""
        folder = f"/proc/{self.ask('status')['pid']}/fd"
        return fewest(lambda: len(self.host.run("ls", folder).split()))

    def redirects(self) -> list[str]:
        """Connections that conntrack maps to another address."""
        tables = [self.host.run("conntrack", "-L", "-f", family, "--dst-nat") for family in ("ipv4", "ipv6")]
        return "".join(tables).splitlines()


def bracketed(address: str) -> str:
    """An address as URLs have it."""
    return f"[{address}]" if ":" in address else address
