# SPDX-License-Identifier: Apache-2.0
"""VMs, one fixture argument away."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from hypervisor_svc import control
from hypervisor_svc.deploy import Deployed, Deployment, deploy, undeploy
from tests.vm.libvirt_host import LibvirtHost, wait_for
from vm_images.build import Image, build

Deploy = Callable[..., Deployed]
ROOT = Path(__file__).resolve().parents[2]


class Product:
    """The service on a `LibvirtHost`, the VM "guest" as clients see it, and the client beside it."""

    def __init__(self, host: LibvirtHost, folder: Path, share: Path, *, extra: str = "") -> None:
        self.host, self.share = host, share
        self.log = folder / "service.log"
        self._runtime, self._config = folder / "run", folder / "streamlift.toml"
        service = f'[service]\nruntime_dir = "{self._runtime}"\n[libvirt]\nuri = "{host.uri}"\n'
        self._config.write_text(service + extra, encoding="utf-8")

    def start(self) -> None:
        """Start the service and wait until it answers."""
        with self.log.open("ab") as log:
            self._process = self.host.start(*self._command("serve"), output=log, environment={"PYTHONPATH": str(ROOT)})
        wait_for(self._answers, seconds=10, what="the service")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the service, with SIGKILL its supervisor first."""
        pid = self.ask("status")["pid"] if number == signal.SIGKILL else None
        self.host.namespaces.signal(self._process, number)
        if pid is not None:  # it was told to end when its supervisor died; it shall not have the time
            self.host.run("kill", "-KILL", str(pid), check=False)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask the service through its control socket."""
        return control.call(str(self._runtime / "control.sock"), command, **arguments)

    def _answers(self) -> bool:
        with contextlib.suppress(control.ControlError):
            return bool(self.ask("status"))
        return False

    def status(self) -> dict[str, Any]:
        """What `streamlift status --json` prints."""
        status: dict[str, Any] = json.loads(self.host.run("env", f"PYTHONPATH={ROOT}", *self._command("status", "--json")))
        return status

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "hypervisor_svc", "--config", str(self._config), *arguments]

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

    def fetch(self, address: str, path: str, *, check: bool = True) -> bytes:
        """A body as the client gets it, with curl."""
        command = self.host.client.command("curl", "-gsSf", "--max-time", "60", f"http://{bracketed(address)}/{path}")
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
        return len(self.host.run("ls", f"/proc/{self.ask('status')['pid']}/fd").split())

    def redirects(self) -> list[str]:
        """Connections that conntrack maps to another address."""
        tables = [self.host.run("conntrack", "-L", "-f", family, "--dst-nat") for family in ("ipv4", "ipv6")]
        return "".join(tables).splitlines()


def bracketed(address: str) -> str:
    """An address as URLs have it."""
    return f"[{address}]" if ":" in address else address


@pytest.fixture(scope="session")
def libvirt_host() -> Iterator[LibvirtHost]:
    """A hypervisor in namespaces of its own, with a client namespace beside it."""
    with LibvirtHost() as host:
        yield host


@pytest.fixture
def connection(libvirt_host: LibvirtHost) -> Iterator[libvirt.virConnect]:
    """A connection to its libvirtd."""
    with contextlib.closing(libvirt_host.connect()) as connection:
        yield connection


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """The folder that the test's VM shares with the host."""
    directory = tmp_path / "share"
    directory.mkdir()
    return directory


@pytest.fixture
def serve(libvirt_host: LibvirtHost, tmp_path: Path, share: Path) -> Iterator[Callable[..., Product]]:
    """`serve(extra="...")`: the service, with more lines in its configuration; it is stopped when the test ends."""
    with contextlib.ExitStack() as stack:

        def start(*, extra: str = "") -> Product:
            product = Product(libvirt_host, tmp_path, share, extra=extra)
            product.start()
            stack.callback(product.stop)
            return product

        yield start


@pytest.fixture(scope="session")
def image() -> Image:
    """The guest image with the default kernel."""
    return build()


@pytest.fixture
def deploy_machine(libvirt_host: LibvirtHost, connection: libvirt.virConnect, share: Path) -> Iterator[Deploy]:
    """`deploy_machine(image, name=..., ...)`: start a VM that is removed when the test ends."""
    with contextlib.ExitStack() as stack:

        def start(image: Image, *, name: str = "guest", **options: object) -> Deployed:
            settings = {"share_directory": share, "machines": libvirt_host.machines, **options}
            deployed = deploy(connection, Deployment(name=name, image=image, **settings))  # type: ignore[arg-type]
            stack.callback(_undeploy_if_there, libvirt_host, name)
            return deployed

        yield start


def _undeploy_if_there(host: LibvirtHost, name: str) -> None:
    with contextlib.closing(host.connect()) as connection:
        if any(domain.name() == name for domain in connection.listAllDomains()):
            undeploy(connection, name)
