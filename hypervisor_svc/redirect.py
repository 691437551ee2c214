# SPDX-License-Identifier: Apache-2.0
"""Step 5: redirect. From one moment to the next a client's packets end at the host instead of at the guest.

The way of the mission is NAT: one conntrack entry with a DNAT mapping per flow and no rule per flow (`NatRedirect`). The
static rules below only guard the edges: a redirected packet without a socket is dropped and not answered with a RST, and a
socket of ours never speaks with the host's own address. `transparent.py` and `bridge.py` are the other modes."""

from __future__ import annotations

import socket
import subprocess
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from guest_agent.handoff.errors import HostError, Reason
from guest_agent.handoff.snapshot import Endpoint
from hypervisor_svc.conntrack import MARK, MARK_MASK, Conntrack, family_of

SOCKET_MARK = MARK | 1
"""SO_MARK of every socket that the service restores."""

_RULES = f"""
table inet streamlift {{
    chain input {{
        type filter hook input priority filter - 10; policy accept;
        ct mark & {MARK_MASK:#x} == {MARK:#x} jump redirected
    }}
    chain redirected {{
        socket transparent 0 accept
        drop comment "a redirected flow whose socket is gone: silence, no RST"
    }}
    chain output {{
        type filter hook output priority filter - 10; policy accept;
        meta mark {SOCKET_MARK:#x} ct status & dnat == 0 drop comment "an orphan must not speak as the host"
    }}
}}
"""


@dataclass(frozen=True)
class Flow:
    """A connection as its packets show it: the client, and the guest's end."""

    client: Endpoint
    server: Endpoint


class Redirect(Protocol):
    """One way of bringing a flow's packets to the host. Calls take microseconds; OSError carries the kernel's errno."""

    mode: str
    transparent: bool

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def bind_address(self, flow: Flow) -> Endpoint:
        """Where the host's socket for this flow binds; reserved until `unredirect` or `release`."""
        ...

    def release(self, flow: Flow, endpoint: Endpoint) -> None:
        """Give a reservation back that was never redirected."""
        ...

    def redirect(self, flow: Flow, endpoint: Endpoint) -> None:
        """From now on the flow's packets go to `endpoint`."""
        ...

    def unredirect(self, flow: Flow, endpoint: Endpoint) -> None:
        """From now on they go to the guest again. Idempotent."""
        ...

    def flush(self) -> int:
        """Remove what an earlier service left behind; how many flows that were."""
        ...


def load_rules(table: str, rules: str) -> None:
    """Replace an nftables table (`inet streamlift`) in one transaction. Raises HostError with what nft(8) said."""
    run_nft(f"table {table}\ndelete table {table}\n{rules}")


def run_nft(script: str) -> None:
    """Run `nft -f -`. Raises HostError(REDIRECT_FAILED)."""
    done = subprocess.run(["nft", "-f", "-"], input=script, text=True, capture_output=True, check=False)
    if done.returncode:
        raise HostError(Reason.REDIRECT_FAILED, f"nft: {done.stderr.strip() or 'failed'}")


def delete_table(table: str) -> None:
    """Remove a table if it is there."""
    run_nft(f"table {table}\ndelete table {table}\n")


def address_towards(address: str) -> str:
    """The host's own address on the way to `address` (no packet is sent). Raises HostError if there is no route."""
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise HostError(Reason.REDIRECT_FAILED, f"no route to the VM's address {address}", errno=error.errno or 0) from None
        return str(probe.getsockname()[0])


class NatRedirect:
    """One conntrack entry a flow. Many restored sockets share a local port, since only the 4-tuple must be unique; the
    pool is there for clients that use one port towards several VMs."""

    mode = "nat"
    transparent = False

    def __init__(
        self, *, ports: tuple[int, int] = (61000, 61063), address4: str | None = None, address6: str | None = None
    ) -> None:
        self._ports = ports
        self._fixed = {socket.AF_INET: address4, socket.AF_INET6: address6}
        self._addresses: dict[str, str] = {}
        self._used: dict[tuple[Endpoint, Endpoint], Flow] = {}
        self._conntrack = Conntrack()

    def __enter__(self) -> Self:
        load_rules("inet streamlift", _RULES)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        delete_table("inet streamlift")
        self._conntrack.close()

    def bind_address(self, flow: Flow) -> Endpoint:
        address = self._address(flow.server.address)
        for port in range(self._ports[0], self._ports[1] + 1):
            endpoint = Endpoint(address, port)
            if self._used.setdefault((endpoint, flow.client), flow) is flow:
                return endpoint
        raise HostError(Reason.TABLE_FULL, f"all {self._ports[1] - self._ports[0] + 1} ports towards {flow.client} are used")

    def _address(self, server: str) -> str:
        address = self._addresses.get(server)
        if address is None:
            address = self._addresses[server] = self._fixed[family_of(server)] or address_towards(server)
        return address

    def release(self, flow: Flow, endpoint: Endpoint) -> None:
        if self._used.get((endpoint, flow.client)) is flow:
            del self._used[(endpoint, flow.client)]

    def redirect(self, flow: Flow, endpoint: Endpoint) -> None:
        self._conntrack.replace(flow.client, flow.server, endpoint)
        self._used[(endpoint, flow.client)] = flow

    def unredirect(self, flow: Flow, endpoint: Endpoint) -> None:
        """The flow gets a plain, liberal entry at once, so that a stateful firewall does not find it invalid."""
        if self._used.get((endpoint, flow.client)) is flow:
            self._conntrack.replace(flow.client, flow.server, None)
            self.release(flow, endpoint)

    def flush(self) -> int:
        return self._conntrack.flush_marked()
