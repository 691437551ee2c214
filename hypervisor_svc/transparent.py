# SPDX-License-Identifier: Apache-2.0
"""Redirection without NAT: the host's socket is bound to the guest's own address (IP_TRANSPARENT), and packets for which
such a socket exists are delivered locally (Documentation/networking/tproxy.rst). Nothing is done per flow: the socket is
the redirect, and it ends with it. For hosts that do not track connections."""

from __future__ import annotations

import subprocess
from types import TracebackType
from typing import Self

from guest_agent.handoff.errors import HostError, Reason
from guest_agent.handoff.snapshot import Endpoint
from hypervisor_svc.redirect import SOCKET_MARK, Flow, delete_table, load_rules

TABLE = 21324
"""Number of the routing table that delivers everything locally."""

_RULES = f"""
table inet streamlift {{
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;
        meta l4proto tcp socket transparent 1 socket mark {SOCKET_MARK:#x} meta mark set {SOCKET_MARK:#x}
    }}
}}
"""


class TransparentRedirect:
    """See `hypervisor_svc.redirect.Redirect`."""

    mode = "transparent"
    transparent = True

    def __enter__(self) -> Self:
        load_rules("inet streamlift", _RULES)
        for family in ("-4", "-6"):
            self._undo(family)
            _ip(family, "route", "replace", "local", "default", "dev", "lo", "table", str(TABLE))
            _ip(family, "rule", "add", "priority", "90", "fwmark", hex(SOCKET_MARK), "lookup", str(TABLE))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for family in ("-4", "-6"):
            self._undo(family)
        delete_table("inet streamlift")

    @staticmethod
    def _undo(family: str) -> None:
        while _ip(family, "rule", "del", "fwmark", hex(SOCKET_MARK), "lookup", str(TABLE), check=False):
            pass
        _ip(family, "route", "flush", "table", str(TABLE), check=False)

    def bind_address(self, flow: Flow) -> Endpoint:
        return flow.server

    def release(self, flow: Flow, endpoint: Endpoint) -> None:
        """Nothing was reserved."""

    def redirect(self, flow: Flow, endpoint: Endpoint) -> None:
        """The restored socket is the redirect."""

    def unredirect(self, flow: Flow, endpoint: Endpoint) -> None:
        """Ends with the socket."""

    def flush(self) -> int:
        return 0


def _ip(*arguments: str, check: bool = True) -> bool:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise HostError(Reason.REDIRECT_FAILED, f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.returncode == 0
