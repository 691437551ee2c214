# SPDX-License-Identifier: Apache-2.0
"""The product on a `Network`: the service in the host's namespace, agent and media server in the guest's, each a process
of its own. A Unix socket stands where QEMU's chardev would be."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypervisor_svc import control
from tests.namespaces.topology import Namespace, Network

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 15.0
START_PATIENCE = 60.0
"""Seconds: on an emulated processor four Python programs start at once."""
LIVE_PORT, LIVE_PASSWORD = 8000, "hackme"


def wait_for(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Poll until `condition` is true; its value. Raises TimeoutError."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise TimeoutError(f"{what}: not within {patience} s")


@dataclass
class Process:
    """One program of the deployment."""

    where: Namespace
    argv: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    popen: subprocess.Popen[bytes] | None = None

    def start(self, **faults: str) -> None:
        """Start it; `faults` become environment variables of this life only."""
        environment = {"PYTHONPATH": str(ROOT), **os.environ, **self.environment, **faults}
        with self.log.open("ab") as log:
            self.popen = self.where.popen(self.argv, env=environment, stdout=log, stderr=log, cwd=str(ROOT))

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it and wait."""
        if self.popen is None:
            return
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        try:
            self.popen.wait(10)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self.popen = None

    def kill(self) -> None:
        """SIGKILL."""
        self.stop(signal.SIGKILL)


@dataclass
class Deployment:
    """What runs, and how to ask it."""

    network: Network
    folder: Path
    share: Path
    service: Process
    agent: Process
    server: Process
    port: int = 80
    live: Process | None = None

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask the service."""
        return control.call(str(self.folder / "control.sock"), command, **arguments)

    def status(self) -> dict[str, Any]:
        """The service's status."""
        return self.call("status")

    def machine(self) -> dict[str, Any]:
        """The status of the one VM."""
        found: dict[str, Any] = self.status()["machines"][0]
        return found

    def wait_ready(self) -> None:
        """Until the agent's hello has arrived and the media server answers."""
        wait_for(self._hello, "the agent's hello", START_PATIENCE)
        wait_for(lambda: b"serving" in self.server.log.read_bytes(), "the media server begins", START_PATIENCE)  # curl costs more
        wait_for(self._answers, "the media server", START_PATIENCE)

    def _hello(self) -> bool:
        try:
            return bool(self.machine()["channel"] == "hello")
        except control.ControlError:
            return False

    def _answers(self) -> bool:
        try:
            return bool(self.counters())
        except (RuntimeError, ValueError):
            return False

    def counters(self) -> dict[str, Any]:
        """The media server's own counters."""
        address = self.network.guest_address[4]
        text = self.network.client.run("curl", "-sf", "--max-time", "5", f"http://{address}:{self.port}/.streamlift")
        counters: dict[str, Any] = json.loads(text)
        return counters

    def load(self, *, requests: int, connections: int, family: int = 4, seed: int = 1, timeout: float = 280) -> dict[str, Any]:
        """Run `tests.client` in the client's namespace; its report."""
        address = self.network.guest_address[family]
        argv = ["ip", "netns", "exec", self.network.client.name, sys.executable, "-m", "tests.client"]
        argv += ["--server", f"[{address}]:{self.port}" if family == 6 else f"{address}:{self.port}"]
        argv += ["--root", str(self.share), "--requests", str(requests), "--connections", str(connections)]
        done = subprocess.run(
            [*argv, "--seed", str(seed)], capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False
        )
        if not done.stdout:
            raise RuntimeError(done.stderr[-2000:])
        report: dict[str, Any] = json.loads(done.stdout)
        return report


def backends() -> tuple[str, str]:
    """Guest's and host's, from STREAMLIFT_BACKENDS ("GUEST/HOST"); by default each chooses for itself."""
    guest, _, host = os.environ.get("STREAMLIFT_BACKENDS", "auto/auto").partition("/")
    return guest, host


def relay_engine() -> str:
    """From STREAMLIFT_RELAY_ENGINE; by default whatever there is."""
    return os.environ.get("STREAMLIFT_RELAY_ENGINE", "auto")


def _config(network: Network, folder: Path, share: Path, extra: str, mode: str, channel: str) -> str:
    addresses = json.dumps(list(network.guest_address.values()))
    bridge = f'bridge = "{network.bridge}"' if network.bridge else ""
    return f"""
[service]
runtime_dir = "{folder}"
backend = "{backends()[1]}"
[redirect]
mode = "{mode}"
[relay]
engine = "{relay_engine()}"
[libvirt]
enabled = false
[[vm]]
name = "guest"
channel = "{folder}/{channel}"
share = "{share}"
addresses = {addresses}
{bridge}
{extra}
"""


@contextlib.contextmanager
def mounted(share: Path, at: Path) -> Iterator[list[str]]:
    """The share as a mount of its own, read-only, where a guest would have it; in a mount namespace that only those see who are
    started with the words that are yielded."""
    at.mkdir()
    empty = at.parent / "empty"
    empty.mkdir()
    script = f"mount -t overlay share -o lowerdir={share}:{empty} {at} && echo mounted && exec sleep infinity"
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as keeper:
        try:
            assert keeper.stdout is not None and keeper.stdout.readline() == "mounted\n"
            yield ["nsenter", f"--mount=/proc/{keeper.pid}/ns/mnt", "--"]
        finally:
            keeper.kill()


@contextlib.contextmanager
def deployed(
    network: Network,
    folder: Path,
    share: Path,
    *,
    mode: str = "nat",
    extra: str = "",
    offload: bool = True,
    channel: str = "port.sock",
    live: bool = False,
    mount: bool = False,
) -> Iterator[Deployment]:
    """Everything up and ready; torn down in the end. With another `channel` the service looks for it there in the folder; with
    `live` a live server listens at LIVE_PORT beside the media server; with `mount` the share is a mount of its own in the guest."""
    with contextlib.ExitStack() as stack:
        seen, inside = share, []
        if mount:
            seen = folder / "mnt"
            inside = stack.enter_context(mounted(share, seen))
        yield stack.enter_context(_deployed(network, folder, share, seen, inside, mode, extra, offload, channel, live))


@contextlib.contextmanager
def _deployed(
    network: Network,
    folder: Path,
    share: Path,
    seen: Path,
    inside: list[str],
    mode: str,
    extra: str,
    offload: bool,
    channel: str,
    live: bool,
) -> Iterator[Deployment]:
    config = folder / "streamlift.toml"
    config.write_text(_config(network, folder, share, extra, mode, channel))
    python, socket_path = sys.executable, str(folder / "agent.sock")
    service = Process(network.host, [python, "-m", "hypervisor_svc", "--config", str(config), "serve"], folder / "service.log")
    agent_argv = [*inside, python, "-m", "guest_agent", "--port", f"unix:{folder}/port.sock", "--socket", socket_path]
    agent_argv += ["--share", str(seen), "--allow", "*", "--backend", backends()[0]]
    agent = Process(network.guest, agent_argv, folder / "agent.log")
    server_argv = [*inside, python, "-m", "guest_agent.examples.media_server", "--root", str(seen), "--port", "80"]
    server_argv += [] if offload else ["--no-offload"]
    server = Process(network.guest, server_argv, folder / "server.log", {"STREAMLIFT_AGENT": socket_path})
    deployment = Deployment(network, folder, share, service, agent, server)
    if live:
        live_argv = [python, "-m", "guest_agent.examples.live_server", "--port", str(LIVE_PORT), "--password", LIVE_PASSWORD]
        live_argv += ["--folder", str(share / "live")]
        environment = {"STREAMLIFT_AGENT": socket_path}
        deployment.live = Process(network.guest, live_argv, folder / "live.log", environment)
    processes = [agent, service, server, *([deployment.live] if deployment.live else [])]
    try:
        for process in processes:
            process.start()
        deployment.wait_ready()
        yield deployment
    finally:
        for process in reversed(processes):
            process.stop()
