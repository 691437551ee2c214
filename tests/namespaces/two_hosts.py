# SPDX-License-Identifier: Apache-2.0
"""Two hosts and a guest that moves between them, as network namespaces: all of a migration but the VM.

    client -- 10.77.2.0/24 -- fabric -- 10.77.10.0/24 -- host a -+
                                 |                               +- 10.77.1.0/24 -- guest
                                 +----- 10.77.11.0/24 -- host b -+      one link: its host's end moves

Each host has a service of its own; both know the guest. Its port is a Unix socket, to which a name leads where the guest is."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypervisor_svc import control
from tests.namespaces.deployment import LIVE_PASSWORD, LIVE_PORT, Process, backends, mounted, relay_engine, wait_for
from tests.namespaces.topology import Namespace, namespace

GUEST = "10.77.1.2"
SIZE = 64_000_000
"""Bytes of the file that is under way while the guest moves."""
_NETWORK = {"a": 10, "b": 11}


@dataclass
class Host:
    """One of the two."""

    name: str
    where: Namespace
    folder: Path
    service: Process

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask its service."""
        return control.call(str(self.folder / "control.sock"), command, machine="guest", **arguments)

    def machine(self) -> dict[str, Any]:
        """What its service says of the guest."""
        found: dict[str, Any] = self.call("status")["machines"][0]
        return found


@dataclass
class TwoHosts:
    """What runs, and where the guest is."""

    folder: Path
    share: Path
    inside: list[str]
    guest: Namespace
    client: Namespace
    fabric: Namespace
    hosts: dict[str, Host]
    agent: Process
    here: str = "a"
    processes: list[Process] = field(default_factory=list)

    @property
    def host(self) -> Host:
        """Where the guest is."""
        return self.hosts[self.here]

    @property
    def other(self) -> Host:
        """Where it is not."""
        return self.hosts["b" if self.here == "a" else "a"]

    def attach(self) -> None:
        """The guest's port appears at its host."""
        (self.host.folder / "port.sock").symlink_to(self.folder / "port.sock")

    def cut(self) -> None:
        """Close the port at the host; it may open it again."""
        with socket.socket(socket.AF_UNIX) as another:
            another.connect(str(self.folder / "port.sock"))

    def cut_for_a_moment(self) -> None:
        """Until the agent has said hello again; the state of before may still be told after `cut`."""
        log = self.host.service.log
        hellos = log.read_text().count("answers")
        self.cut()
        wait_for(lambda: log.read_text().count("answers") > hellos, "the channel is back")

    def detach(self) -> None:
        """The port is closed at the host that is left; nobody answers the guest. Idempotent."""
        port = self.host.folder / "port.sock"
        if port.is_symlink():
            port.unlink()
            self.cut()

    def move(self) -> None:
        """The guest's end of a migration: its port and its address are at the other host afterwards."""
        self.detach()
        self.host.where.run("ip", "link", "set", "hg", "netns", self.other.where.name)
        self.here = self.other.name
        _connect_guest(self.host.where)
        self.fabric.run("ip", "route", "replace", f"{GUEST}/32", "via", f"10.77.{_NETWORK[self.here]}.2")
        self.attach()

    def migrate(self, meanwhile: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Let go, leave, move, meet: `hypervisor_svc/migrate.py` without libvirt; `meanwhile` memory would be copied. How it
        left."""
        self.host.call("leave", only="share")
        meanwhile()
        left = self.host.call("leave")
        self.move()
        self.host.call("meet", seconds=15)
        return left

    def counters(self) -> dict[str, Any]:
        """The media server's own."""
        text = self.client.run("curl", "-sf", "--max-time", "5", f"http://{GUEST}/.streamlift")
        counters: dict[str, Any] = json.loads(text)
        return counters


def _connect_guest(host: Namespace) -> None:
    host.run("ip", "address", "replace", "10.77.1.1/24", "dev", "hg")
    host.run("ip", "link", "set", "hg", "up")


@contextlib.contextmanager
def _network() -> Iterator[tuple[Namespace, Namespace, Namespace, dict[str, Namespace]]]:
    with namespace("guest") as guest, namespace("client") as client, namespace("fabric") as fabric, contextlib.ExitStack() as stack:
        hosts = {name: stack.enter_context(namespace(f"host-{name}")) for name in "ab"}
        fabric.run("ip", "link", "add", "fc", "type", "veth", "peer", "name", "eth0", "netns", client.name)
        _up(fabric, "fc", "10.77.2.1/24")
        _up(client, "eth0", "10.77.2.2/24", gateway="10.77.2.1")
        fabric.sysctl("net.ipv4.ip_forward", "1")
        for name, host in hosts.items():
            fabric.run("ip", "link", "add", f"f{name}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _up(fabric, f"f{name}", f"10.77.{_NETWORK[name]}.1/24")
            _up(host, "eth0", f"10.77.{_NETWORK[name]}.2/24", gateway=f"10.77.{_NETWORK[name]}.1")
            host.sysctl("net.ipv4.ip_forward", "1")
        hosts["a"].run("ip", "link", "add", "hg", "type", "veth", "peer", "name", "eth0", "netns", guest.name)
        _connect_guest(hosts["a"])
        _up(guest, "eth0", f"{GUEST}/24", gateway="10.77.1.1")
        fabric.run("ip", "route", "add", f"{GUEST}/32", "via", f"10.77.{_NETWORK['a']}.2")
        yield guest, client, fabric, hosts


def _up(where: Namespace, device: str, address: str, *, gateway: str = "") -> None:
    where.run("ip", "address", "add", address, "dev", device)
    where.run("ip", "link", "set", device, "up")
    if gateway:
        where.run("ip", "route", "add", "default", "via", gateway)


def _host(name: str, where: Namespace, folder: Path, share: Path) -> Host:
    own = folder / name
    own.mkdir()
    config = own / "streamlift.toml"
    config.write_text(
        f'[service]\nruntime_dir = "{own}"\nbackend = "{backends()[1]}"\n[relay]\nengine = "{relay_engine()}"\n'
        f'[libvirt]\nenabled = false\n[[vm]]\nname = "guest"\nchannel = "{own}/port.sock"\n'
        f'share = "{share}"\naddresses = ["{GUEST}"]\n'
    )
    argv = [sys.executable, "-m", "hypervisor_svc", "--config", str(config), "serve"]
    return Host(name, where, own, Process(where, argv, own / "service.log"))


@contextlib.contextmanager
def two_hosts(folder: Path, share: Path) -> Iterator[TwoHosts]:
    """Both services, the agent, the media server and the live server are up; the guest is at host a."""
    with _network() as (guest, client, fabric, places), mounted(share, folder / "mnt") as inside:
        hosts = {name: _host(name, where, folder, share) for name, where in places.items()}
        python, door = [*inside, sys.executable, "-m"], str(folder / "agent.sock")
        argv = [*python, "guest_agent", "--port", f"unix:{folder}/port.sock", "--socket", door, "--share", str(folder / "mnt")]
        agent = Process(guest, [*argv, "--allow", "*", "--backend", backends()[0]], folder / "agent.log")
        media = [*python, "guest_agent.examples.media_server", "--root", str(folder / "mnt"), "--port", "80"]
        live = [*python, "guest_agent.examples.live_server", "--port", str(LIVE_PORT), "--password", LIVE_PASSWORD]
        live += ["--folder", str(folder / "mnt" / "live")]
        servers = [
            Process(guest, words, folder / f"server{number}.log", {"STREAMLIFT_AGENT": door})
            for number, words in enumerate((media, live))
        ]
        made = TwoHosts(folder, share, inside, guest, client, fabric, hosts, agent)
        made.processes = [agent, *(host.service for host in hosts.values()), *servers]
        try:
            for process in made.processes:
                process.start()
            made.attach()
            wait_for(lambda: _answers(made), "everything")
            yield made
        finally:
            for process in reversed(made.processes):
                process.stop()


def _answers(made: TwoHosts) -> bool:
    try:
        made.other.call("status")
        return made.host.machine()["channel"] == "hello" and bool(made.counters())
    except (control.ControlError, RuntimeError, ValueError):
        return False
