# SPDX-License-Identifier: Apache-2.0
"""Redirection without NAT: the host's socket is bound to the guest's own address (IP_TRANSPARENT), and packets for which
such a socket exists are delivered locally (Documentation/networking/tproxy.rst). The socket is the redirect.

A connection that goes home leaves a frozen socket here until the guest has it; its flow is then in a set of flows that are
not ours, so that its packets pass. Sockets of other programs are left alone: ours are known by their mark."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from guest_agent.handoff.errors import HostError, Reason
from guest_agent.handoff.snapshot import Endpoint
from hypervisor_svc import flow_set
from hypervisor_svc.conntrack import MARK
from hypervisor_svc.flow_set import FlowSet
from hypervisor_svc.redirect import SILENT_MARK, SOCKET_MARK, Flow, delete_table, load_rules

TABLE = 21324
"""Number of the routing table that delivers everything locally."""
PACKET_MARK = MARK | 2
"""The mark of packets that are delivered locally. Not the sockets' own mark: that would route their answers here too."""
PRIORITY = 90
"""Of the policy rule: after `local`, before anything that an administrator is likely to add."""

_HOME_SECONDS = 60
_EARLY_DEMUX = "/proc/sys/net/ipv4/tcp_early_demux"

_RULES = f"""
table inet streamlift {{
{flow_set.declaration("home", f"flags timeout; timeout {_HOME_SECONDS}s;")}
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;
        meta l4proto {{ tcp, icmp, ipv6-icmp }} socket transparent 1 socket mark {{ {SOCKET_MARK:#x}, {SILENT_MARK:#x} }} jump ours
    }}
    chain ours {{
        {flow_set.matches("home")[0]} return
        {flow_set.matches("home")[1]} return
        meta mark set {PACKET_MARK:#x}
    }}
    chain input {{
        type filter hook input priority filter - 10; policy accept;
        meta mark != {PACKET_MARK:#x} accept
        socket transparent 1 accept
        drop comment "the socket went while the packet was on its way: silence, no RST"
    }}
    chain output {{
        type filter hook output priority filter - 10; policy accept;
        meta mark {SILENT_MARK:#x} drop comment "it was frozen: the next owner speaks"
    }}
}}
"""


class TransparentRedirect:
    """See `hypervisor_svc.redirect.Redirect`."""

    mode = "transparent"
    transparent = True

    def __init__(self) -> None:
        self._home = FlowSet("home", family=flow_set.INET)
        self._here: dict[Flow, Endpoint] = {}
        self._left: dict[Flow, float] = {}
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self._home.close)
            load_rules("inet streamlift", _RULES)
            undo.callback(delete_table, "inet streamlift")
            for family in ("-4", "-6"):
                undo.callback(_unroute, family)
                _route(family)
            undo.enter_context(_no_early_demux())
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def place_routed(self, addresses: Iterable[str]) -> None:
        """Nothing is translated here: what a guest sent before passes as it is."""

    def bind_address(self, flow: Flow) -> Endpoint:
        """The guest's own, as a new object: it tells this reservation from an earlier one of the same flow."""
        return Endpoint(*flow.server)

    def release(self, flow: Flow, endpoint: Endpoint) -> None:
        """Nothing was reserved."""

    def redirect(self, flow: Flow, endpoint: Endpoint) -> None:
        """The restored socket is the redirect, unless its flow has just gone home."""
        if self._left.pop(flow, None) is not None:
            self._home.remove(flow)
        self._here[flow] = endpoint

    def unredirect(self, flow: Flow, endpoint: Endpoint) -> None:
        """Pass the packets on, although the frozen socket is still here. The element goes away by itself."""
        if self._here.get(flow) is endpoint:
            self._home.add(flow)
            del self._here[flow]
            self._remember(flow)

    def _remember(self, flow: Flow) -> None:
        """Which flows may still have an element, oldest first."""
        now = time.monotonic()
        self._left.pop(flow, None)
        self._left[flow] = now
        while now - self._left[oldest := next(iter(self._left))] > 2 * _HOME_SECONDS:
            del self._left[oldest]

    def forget(self, flow: Flow, endpoint: Endpoint) -> None:
        """The redirect went with the socket."""
        if self._here.get(flow) is endpoint:
            del self._here[flow]

    def flush(self) -> int:
        """The rules were replaced at the start; nothing else can be left."""
        return 0


@contextlib.contextmanager
def _no_early_demux() -> Iterator[None]:
    """The kernel looks for a packet's socket before it looks for its route (tcp_v4_early_demux), and would find our frozen
    one even though the packet's way leads home. The setting is for IPv6 too."""
    with open(_EARLY_DEMUX, "r+", encoding="ascii") as file:
        before = file.read()
        file.seek(0)
        file.write("0")
    try:
        yield
    finally:
        with open(_EARLY_DEMUX, "w", encoding="ascii") as file:
            file.write(before)


def _route(family: str) -> None:
    _unroute(family)
    _ip(family, "route", "replace", "local", "default", "dev", "lo", "table", str(TABLE))
    _ip(family, "rule", "add", "priority", str(PRIORITY), "fwmark", hex(PACKET_MARK), "lookup", str(TABLE))


def _unroute(family: str) -> None:
    while _ip(family, "rule", "del", "fwmark", hex(PACKET_MARK), "lookup", str(TABLE), check=False):
        pass
    _ip(family, "route", "flush", "table", str(TABLE), check=False)


def _ip(*arguments: str, check: bool = True) -> bool:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise HostError(Reason.REDIRECT_FAILED, f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.returncode == 0
