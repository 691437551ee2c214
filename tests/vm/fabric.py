# SPDX-License-Identifier: Apache-2.0
"""The network between hypervisors and clients: VMs move across it under their clients' eyes.

                                          fabric
    client 203.0.113.2    fd78:c::2 ----- router ----- 198.51.100.6   fd78:f:1::2  uplink0, first host
    slow   203.0.113.130  fd78:d::2 -----   "    ----- 198.51.100.10  fd78:f:2::2  uplink0, second host

    client 192.0.2.2      fd78:b::2 ----- switch ----- 192.0.2.11     fd78:b::11   trunk0 in br0, first host
    slow   192.0.2.3      fd78:b::3 -----   "    ----- 192.0.2.12     fd78:b::12   trunk0 in br0, second host

Routed VMs are reached through the router, which has a route to each VM's own address; `announcer.py` says who changes it.
Bridged VMs are ports of the hosts' br0: the switch learns from QEMU's announcements behind which trunk one is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from tests.vm.namespaces import Namespaces, give_addresses, link

SLOW_LINK = "50mbit"
BRIDGE = "br0"
_VIEWERS = {"client": ("203.0.113.{}/25", "fd78:c::{}/64", 0), "slow": ("203.0.113.{}/25", "fd78:d::{}/64", 128)}


@dataclass(frozen=True)
class Uplink:
    """A hypervisor's number, from 1 on, and its addresses towards the router."""

    number: int
    address4: str
    address6: str


class Fabric:
    """A context manager. `client` and `slow` are where clients run; what reaches `slow` shares 50 Mbit/s."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._joined = 0

    def __enter__(self) -> Fabric:
        with contextlib.ExitStack() as stack:
            self.router, self.client, self.slow = (stack.enter_context(contextlib.closing(Namespaces("net"))) for _ in range(3))
            self._prepare()
            for number, (name, viewer) in enumerate((("client", self.client), ("slow", self.slow)), 2):
                self._connect(name, viewer, number)
            for card in ("slow0", "slow1"):
                limit = ("rate", SLOW_LINK, "burst", "256kb", "latency", "50ms")
                self.router.run("tc", "qdisc", "replace", "dev", card, "root", "tbf", *limit)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def join(self, host: Namespaces) -> Uplink:
        """Connect a hypervisor to the router and, by a bridge of its own, to the switch."""
        self._joined += 1
        number = self._joined
        near, far = (f"198.51.100.{4 * number + end}" for end in (1, 2))
        uplink = Uplink(number, far, f"fd78:f:{number}::2")
        link(self.router, f"uplink{number}", host, "uplink0")
        give_addresses(self.router, f"uplink{number}", f"{near}/30", f"fd78:f:{number}::1/64")
        give_addresses(host, "uplink0", f"{uplink.address4}/30", f"{uplink.address6}/64")
        for gateway in (near, f"fd78:f:{number}::1"):
            host.run("ip", "route", "add", "default", "via", gateway)
        link(self.router, f"trunk{number}", host, "trunk0")
        self.router.run("ip", "link", "set", f"trunk{number}", "master", "switch0")
        _add_bridge(host, BRIDGE)
        host.run("ip", "link", "set", "trunk0", "master", BRIDGE)
        give_addresses(host, BRIDGE, f"192.0.2.{10 + number}/24", f"fd78:b::{10 + number}/64")
        return uplink

    def announce(self, uplink: Uplink, addresses: Iterable[str]) -> None:
        """The VM with these addresses is behind that hypervisor now."""
        commands = []
        for address in addresses:
            length, gateway = (128, uplink.address6) if ":" in address else (32, uplink.address4)
            commands.append(f"ip route replace {address}/{length} via {gateway}")
        self.router.run("sh", "-ec", "\n".join(commands))

    def _prepare(self) -> None:
        self.router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        _add_bridge(self.router, "switch0")

    def _connect(self, name: str, viewer: Namespaces, number: int) -> None:
        address4, address6, base = _VIEWERS[name]
        viewer.run("ip", "link", "set", "lo", "up")
        link(self.router, f"{name}0", viewer, "eth0")
        give_addresses(self.router, f"{name}0", address4.format(base + 1), address6.format(1))
        give_addresses(viewer, "eth0", address4.format(base + 2), address6.format(2))
        for gateway in (address4.format(base + 1), address6.format(1)):
            viewer.run("ip", "route", "add", "default", "via", gateway.split("/")[0])
        link(self.router, f"{name}1", viewer, "eth1")
        self.router.run("ip", "link", "set", f"{name}1", "master", "switch0")
        give_addresses(viewer, "eth1", f"192.0.2.{number}/24", f"fd78:b::{number}/64")


def _add_bridge(where: Namespaces, name: str) -> None:
    where.run("ip", "link", "add", name, "type", "bridge", "forward_delay", "0")
    where.run("ip", "link", "set", name, "up")
