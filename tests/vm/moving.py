# SPDX-License-Identifier: Apache-2.0
"""A VM that moves between two hypervisors, with the product on both, and the audience that watches it."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import libvirt

from hypervisor_svc.deploy import NETWORK
from tests.audience import Audience, Crowd, Found, feeding, watching
from tests.demo.content import LADDERS, make
from tests.vm.console import give_shell, open_shell
from tests.vm.libvirt_host import LibvirtHost, wait_for
from tests.vm.product import Product
from tests.vm.two_hosts import TwoHosts
from vm_images.build import cache_directory

MACHINE = "guest"
PASSWORD = "hackme"
KERNEL = "6.12"
BRIDGED = ("--bridge", "br0", "--address", "192.0.2.7/24", "--address6", "fd78:b::7/64")
ADDRESSES = {"routed": ("10.78.0.2", "fd78::2"), "bridged": ("192.0.2.7", "fd78:b::7")}
MIGRATION_LIMIT = 120
"""Seconds after which a migration is given up."""


@dataclass(frozen=True)
class Move:
    """What `streamlift migrate --json` told: its exit status, the steps, and the last word."""

    status: int
    steps: list[dict[str, Any]]
    words: str

    @property
    def last(self) -> dict[str, Any]:
        """`{"step": "done", ...}` or `{"step": "failed", ...}`."""
        return self.steps[-1] if self.steps else {}


class Moving:
    """`here` is the product where the VM runs, `there` the other one. IPv4 unless a test says otherwise."""

    def __init__(self, hosts: TwoHosts, folder: Path, mode: str, *, extra: str = "") -> None:
        self.hosts, self.mode, self.share = hosts, mode, folder / "exported" / "share"
        self.address, self.address6 = ADDRESSES[mode]
        self._products = []
        for name, host in (("first", hosts.first), ("second", hosts.second)):
            (folder / name).mkdir()
            self._products.append(Product(host, folder / name, self.share, extra=extra))
        self.here, self.there = self._products
        self._commands = 0

    @property
    def products(self) -> Sequence[Product]:
        """First and second."""
        return self._products

    def start(self, stack: contextlib.ExitStack, *, shell: bool) -> None:
        """Services, then the VM on the first hypervisor, with a shell on its console if wanted; the stack undoes it."""
        for product in self._products:
            product.start()
            stack.callback(product.stop)
        options = ("--share", str(self.share), "--kernel", KERNEL, "--live-password", PASSWORD, *self._place())
        made = self.here.command("deploy", MACHINE, *options)
        self.accelerator = "kvm" if "(kvm)" in made else "tcg"
        stack.callback(self._undeploy)
        if self.mode == "routed":
            self.hosts.share_network(NETWORK)
            stack.callback(self.hosts.drop_network, NETWORK)
        if shell:
            with self.domain() as domain:
                give_shell(domain)
        self.wait_ready()

    def _place(self) -> Sequence[str]:
        return BRIDGED if self.mode == "bridged" else ()

    def _undeploy(self) -> None:
        for product in self._products:
            with contextlib.suppress(RuntimeError):
                product.command("undeploy", MACHINE)

    def wait_ready(self) -> None:
        """Until the VM serves where it is."""
        self.here.wait_ready(self.address)

    @contextlib.contextmanager
    def domain(self) -> Iterator[libvirt.virDomain]:
        """The VM, at its hypervisor's libvirt."""
        with contextlib.closing(self.here.host.connect()) as connection:
            yield connection.lookupByName(MACHINE)

    def runs_at(self, host: LibvirtHost) -> bool:
        """Whether its processors run there."""
        with contextlib.closing(host.connect()) as connection, contextlib.suppress(libvirt.libvirtError):
            return bool(connection.lookupByName(MACHINE).state()[0] == libvirt.VIR_DOMAIN_RUNNING)
        return False

    def in_guest(self, command: str, *, wait: bool = True) -> None:
        """Run a command as root in the guest, if it was started with a shell, and wait for its end."""
        self._commands += 1
        console = self.here.host.machines / MACHINE / "console.log"
        with self.domain() as domain, open_shell(domain) as shell:
            shell.write(f"{command}; printf 'done-%s-\\n' {self._commands}\n")
            if wait:
                wait_for(lambda: f"done-{self._commands}-".encode() in console.read_bytes(), seconds=30, what=command)
            else:
                time.sleep(1)  # QEMU has to read it

    # Moving.

    def migration(self, *options: str) -> list[str]:
        """The command line that moves it to the other hypervisor."""
        control = ("--destination-control", str(self.there.control))
        return ["migrate", MACHINE, self.there.host.uri, "--unsafe", "--json", *control, *options]

    def begin(self, *options: str) -> subprocess.Popen[str]:
        """Start to move; `end` waits."""
        return self.here.begin(*self.migration(*options))

    def end(self, process: subprocess.Popen[str]) -> Move:
        """What came of it; `here` is where the VM is now. It is killed if it lasts too long: nothing here goes on for ever."""
        try:
            output, words = process.communicate(timeout=MIGRATION_LIMIT)
        except subprocess.TimeoutExpired:
            self.here.host.namespaces.signal(process, signal.SIGKILL)
            raise
        steps = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        self.find()
        return Move(process.returncode, steps, words)

    def find(self) -> None:
        """Set `here` to where it is now."""
        if self.runs_at(self.there.host):
            self.here, self.there = self.there, self.here

    def move(self, *options: str) -> Move:
        """To the other hypervisor, which must work."""
        came_from = self.here
        moved = self.end(self.begin(*options))
        assert moved.status == 0 and moved.last["moved"] and self.there is came_from, moved
        return moved

    def cancel(self, process: subprocess.Popen[str]) -> None:
        """Ctrl-C."""
        self.here.host.namespaces.send(process, signal.SIGINT)

    # Watching.

    @contextlib.contextmanager
    def watched(self, crowd: Crowd, *, slow: int = 0, offloaded: bool = True) -> Iterator[Watchers]:
        """Streams that are fed and clients that watch, `slow` more viewers through the slow link; all are at the host, if they are
        to be `offloaded`."""
        fabric = self.hosts.fabric
        with contextlib.ExitStack() as stack:
            if crowd.sinks:
                wait_for(self._live_server, seconds=60, what="the live server")
                stack.enter_context(feeding(fabric.client.command, self.address, self.share, password=PASSWORD))
            begun = [stack.enter_context(watching(fabric.client.command, self.address, self.share, crowd))]
            if slow:
                behind = replace(crowd, segments=slow, lives=0, files=0)
                begun.append(stack.enter_context(watching(fabric.slow.command, self.address, self.share, behind)))
            watchers = Watchers(begun, crowd.sinks)
            if offloaded:
                watchers.wait_out(self.here)
            yield watchers

    def _live_server(self) -> bool:
        command = self.hosts.fabric.client.command("curl", "-sf", "-m", "5", f"http://{self.address}:8000/")
        return not subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


@dataclass(frozen=True)
class Watchers:
    """Audiences, and how many sinks they are together."""

    audiences: list[Audience]
    sinks: int

    def wait_out(self, product: Product) -> None:
        """Until each of them was handed to this host: viewers in their turn, sinks all at once."""
        missing = set().union(*(audience.viewers for audience in self.audiences))

        def all_out() -> bool:
            missing.difference_update(row["client"] for row in product.ask("connections")["connections"])
            relays = product.ask("relays")["relays"]
            return not missing and sum(row["sink_count"] for row in relays) >= self.sinks

        try:
            wait_for(all_out, seconds=60, what="all are offloaded")
        except TimeoutError:
            raise AssertionError(f"not offloaded: {missing}; {product.ask('relays')}; {self.stop().faults}") from None

    def stop(self) -> Found:
        """What all of them saw."""
        found = [audience.stop() for audience in self.audiences]
        bins = sum((Counter(one.bins) for one in found), Counter[int]())
        return Found([seen for one in found for seen in one.seen], dict(bins))


@contextlib.contextmanager
def moving(hosts: TwoHosts, folder: Path, mode: str, *, extra: str = "", shell: bool = False) -> Iterator[Moving]:
    """The VM, "routed" or "bridged", serves on the first hypervisor; the segments of all ladders are in its share."""
    content = make(cache_directory().parent / "content", progress=lambda line: None)
    scene = Moving(hosts, folder, mode, extra=extra)
    scene.share.mkdir(parents=True)
    for ladder in LADDERS:
        shutil.copytree(content / ladder.name, scene.share / ladder.name)
    with contextlib.ExitStack() as stack:
        scene.start(stack, shell=shell)
        yield scene


def assert_unharmed(found: Found) -> None:
    """Every byte came, in its order; only the live stream may have gaps, and each ends where a player can go on."""
    assert found.faults == []
    assert found.gaps("file") == []
    assert all(one["bytes"] for one in found.seen)
