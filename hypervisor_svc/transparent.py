# SPDX-License-Identifier: Apache-2.0
"""Redirection without NAT: the host's socket is bound to the guest's own address (IP_TRANSPARENT), and packets for which
such a socket exists are delivered locally (Documentation/networking/tproxy.rst). The socket is the redirect.

A connection that goes home leaves a frozen socket here until the guest has it; its flow is then in a set of flows that are
not ours, so that its packets pass. Sockets of other programs are left alone: ours are known by their mark."""

from __future__ import annotations

import subprocess
from types import TracebackType
from typing import Self

from guest_agent.handoff.errors import HostError, Reason
from guest_agent.handoff.snapshot import Endpoint
from hypervisor_svc import flow_set
from hypervisor_svc.conntrack import MARK
from hypervisor_svc.flow_set import FlowSet
from hypervisor_svc.redirect import SOCKET_MARK, Flow, delete_table, load_rules

TABLE = 21324
"""Number of the routing table that delivers everything locally."""
PACKET_MARK = MARK | 2
"""The mark of packets that are delivered locally. Not the sockets' own mark: that would route their answers here too."""
PRIORITY = 90
"""Of the policy rule: after `local`, before anything that an administrator is likely to add."""

_HOME_SECONDS = 60

_RULES = f"""
table inet streamlift {{
{flow_set.declaration(f"flags timeout; timeout {_HOME_SECONDS}s;")}
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;
        meta l4proto tcp socket transparent 1 socket mark {SOCKET_MARK:#x} jump ours
    }}
    chain ours {{
        {flow_set.matches()[0]} return
        {flow_set.matches()[1]} return
        meta mark set {PACKET_MARK:#x}
    }}
    chain input {{
        type filter hook input priority filter - 10; policy accept;
        meta mark != {PACKET_MARK:#x} accept
        socket transparent 1 accept
        drop comment "the socket went while the packet was on its way: silence, no RST"
    }}
}}
"""


class TransparentRedirect:
    """See `hypervisor_svc.redirect.Redirect`."""

    mode = "transparent"
    transparent = True

    def __init__(self) -> None:
        self._home = FlowSet(family=flow_set.INET, table="streamlift")

    def __enter__(self) -> Self:
        load_rules("inet streamlift", _RULES)
        for family in ("-4", "-6"):
            _unroute(family)
            _ip(family, "route", "replace", "local", "default", "dev", "lo", "table", str(TABLE))
            _ip(family, "rule", "add", "priority", str(PRIORITY), "fwmark", hex(PACKET_MARK), "lookup", str(TABLE))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for family in ("-4", "-6"):
            _unroute(family)
        delete_table("inet streamlift")
        self._home.close()

    def bind_address(self, flow: Flow) -> Endpoint:
        return flow.server

    def release(self, flow: Flow, endpoint: Endpoint) -> None:
        """Nothing was reserved."""

    def redirect(self, flow: Flow, endpoint: Endpoint) -> None:
        """The restored socket is the redirect, unless its flow has just gone home."""
        self._home.remove(flow)

    def unredirect(self, flow: Flow, endpoint: Endpoint) -> None:
        """Pass the packets on, although the frozen socket is still here. The element goes away by itself."""
        self._home.add(flow)

    def forget(self, flow: Flow, endpoint: Endpoint) -> None:
        """The redirect went with the socket."""

    def flush(self) -> int:
        """The rules were replaced at the start; nothing else can be left."""
        return 0


def _unroute(family: str) -> None:
    while _ip(family, "rule", "del", "fwmark", hex(PACKET_MARK), "lookup", str(TABLE), check=False):
        pass
    _ip(family, "route", "flush", "table", str(TABLE), check=False)


def _ip(*arguments: str, check: bool = True) -> bool:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise HostError(Reason.REDIRECT_FAILED, f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.returncode == 0
