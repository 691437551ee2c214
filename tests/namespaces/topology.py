# SPDX-License-Identifier: Apache-2.0
"""Guest, host and client as network namespaces: the whole product but the VM, in milliseconds.

    routed:   client -- 10.77.2.0/24 -- host -- 10.77.1.0/24 -- guest          (and fd77:2::/64, fd77:1::/64)
    bridged:  client --+
                       bridge in the host's namespace, 10.77.1.1 and fd77:1::1
              guest  --+
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000


def run(*argv: str) -> str:
    """Run a command; its output. Raises CalledProcessError with what it said."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def _set_namespace(fd: int) -> None:
    """setns(2), which Python knows from 3.12 on."""
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


@dataclass(frozen=True)
class Namespace:
    """A network namespace made by this test run."""

    name: str

    def run(self, *argv: str) -> str:
        """Run a command inside; its output."""
        return run("ip", "netns", "exec", self.name, *argv)

    def popen(self, argv: list[str], **options: object) -> subprocess.Popen[bytes]:
        """Start a command inside."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *argv], **options)  # type: ignore[call-overload,no-any-return]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread, and no other, is inside; sockets that it makes stay there."""
        with open("/proc/thread-self/ns/net", "rb") as before, open(f"/run/netns/{self.name}", "rb") as inside:
            _set_namespace(inside.fileno())
            try:
                yield
            finally:
                _set_namespace(before.fileno())

    def sysctl(self, key: str, value: str) -> None:
        """Set a sysctl of this namespace."""
        self.run("sysctl", "-qw", f"{key}={value}")


@dataclass(frozen=True)
class Network:
    """The three namespaces and their addresses by family (4 or 6)."""

    guest: Namespace
    host: Namespace
    client: Namespace
    guest_address: dict[int, str]
    client_address: dict[int, str]
    bridge: str | None

    def shape(self, rate: str) -> None:
        """Limit what reaches the client (tc-tbf), e.g. "1gbit"."""
        device = "hc"
        self.host.run("tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")

    def unshape(self) -> None:
        """Undo `shape`."""
        self.host.run("tc", "qdisc", "del", "dev", "hc", "root")

    def keep_order(self) -> None:
        """One CPU receives every packet (Documentation/networking/scaling.rst, RPS), so that none overtakes another: a veth
        gives a packet to whichever CPU its sender happens to run on."""
        for where in (self.guest, self.host, self.client):
            where.run("sh", "-c", "for queue in /sys/class/net/*/queues/rx-*; do echo 1 > $queue/rps_cpus; done")


@contextlib.contextmanager
def namespace(kind: str) -> Iterator[Namespace]:
    """A namespace that is deleted in the end."""
    made = Namespace(f"sl-{os.getpid()}-{next(_numbers)}-{kind}")
    run("ip", "netns", "add", made.name)
    try:
        made.run("ip", "link", "set", "lo", "up")
        for key in ("all", "default"):  # else link-local addresses are tentative for the first second or two
            made.sysctl(f"net.ipv6.conf.{key}.accept_dad", "0")
        yield made
    finally:
        run("ip", "netns", "del", made.name)


@contextlib.contextmanager
def _three() -> Iterator[tuple[Namespace, Namespace, Namespace]]:
    with namespace("guest") as guest, namespace("host") as host, namespace("client") as client:
        for outer, device in ((guest, "hg"), (client, "hc")):
            host.run("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", outer.name)
            host.run("ip", "link", "set", device, "up")
            outer.run("ip", "link", "set", "eth0", "up")
        host.sysctl("net.ipv4.ip_forward", "1")
        host.sysctl("net.ipv6.conf.all.forwarding", "1")
        yield guest, host, client


def _address(where: Namespace, device: str, *addresses: str) -> None:
    for address in addresses:
        options = ("nodad",) if ":" in address else ()
        where.run("ip", "address", "add", address, "dev", device, *options)


@contextlib.contextmanager
def routed() -> Iterator[Network]:
    """The guest's network lies behind the host."""
    with _three() as (guest, host, client):
        _address(guest, "eth0", "10.77.1.2/24", "fd77:1::2/64")
        _address(client, "eth0", "10.77.2.2/24", "fd77:2::2/64")
        _address(host, "hg", "10.77.1.1/24", "fd77:1::1/64")
        _address(host, "hc", "10.77.2.1/24", "fd77:2::1/64")
        for where, net in ((guest, 1), (client, 2)):
            where.run("ip", "route", "add", "default", "via", f"10.77.{net}.1")
            where.run("ip", "-6", "route", "add", "default", "via", f"fd77:{net}::1")
        yield Network(
            guest, host, client, {4: "10.77.1.2", 6: "fd77:1::2"}, {4: "10.77.2.2", 6: "fd77:2::2"}, bridge=None
        )


@contextlib.contextmanager
def bridged() -> Iterator[Network]:
    """Guest and client are ports of the host's bridge."""
    with _three() as (guest, host, client):
        host.run("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        for device in ("hg", "hc"):
            host.run("ip", "link", "set", device, "master", "br0")
        host.run("ip", "link", "set", "br0", "up")
        _address(host, "br0", "10.77.1.1/24", "fd77:1::1/64")
        _address(guest, "eth0", "10.77.1.2/24", "fd77:1::2/64")
        _address(client, "eth0", "10.77.1.3/24", "fd77:1::3/64")
        yield Network(
            guest, host, client, {4: "10.77.1.2", 6: "fd77:1::2"}, {4: "10.77.1.3", 6: "fd77:1::3"}, bridge="br0"
        )
