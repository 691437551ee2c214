# SPDX-License-Identifier: Apache-2.0
"""Step 5: redirect. From one moment to the next a client's packets end at the host instead of at the guest.

The way of the mission is NAT: one conntrack entry with a DNAT mapping per flow and no rule per flow (`NatRedirect`). The
static rules below only guard the edges: a redirected packet without a socket is dropped and not answered with a RST, and a
socket of ours never speaks with the host's own address. `transparent.py` and `bridge.py` are the other modes."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from guest_agent.handoff.errors import HostError, Reason
from guest_agent.handoff.snapshot import Endpoint
from hypervisor_svc.conntrack import MARK, MARK_MASK, Conntrack, family_of

SOCKET_MARK = MARK | 1
"""SO_MARK of every socket that the service restores."""
SILENT_MARK = MARK | 4
"""Of a socket that must not speak: TCP_REPAIR stops no timer, and what a frozen copy says is later than its snapshot: what the next
owner says would be taken for an old packet (RFC 7323 section 5)."""

_RULES = f"""
table inet streamlift {{
    set guests4 {{
        type ipv4_addr
    }}
    set guests6 {{
        type ipv6_addr
    }}
    chain nat {{
        type nat hook postrouting priority srcnat; policy accept; comment "its presence makes the kernel apply mappings"
    }}
    chain stray {{
        type filter hook postrouting priority srcnat + 10; policy accept;
        ip saddr @guests4 ct status snat drop comment "sent before its flow was redirected: another source port was made for it"
        ip6 saddr @guests6 ct status snat drop
    }}
    chain input {{
        type filter hook input priority filter - 10; policy accept;
        ct mark & {MARK_MASK:#x} == {MARK:#x} jump redirected
    }}
    chain redirected {{
        socket transparent 0 accept
        drop comment "a redirected flow whose socket is gone: silence, no RST"
    }}
    chain forward {{
        type filter hook forward priority filter - 10; policy accept;
        ct state invalid tcp flags & rst == rst drop comment "a guest cannot reset what the host owns"
    }}
    chain output {{
        type filter hook output priority filter - 10; policy accept;
        meta mark {SILENT_MARK:#x} drop comment "it was frozen: the next owner speaks"
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
    """One way of bringing a flow's packets to the host. Calls take microseconds; OSError carries the kernel's errno.

    The endpoint that `bind_address` returned *is* the reservation: pass the same object on, not an equal one."""

    mode: str
    transparent: bool

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def place_routed(self, addresses: Iterable[str]) -> None:
        """These are a routed VM's own."""
        ...

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
        """From now on they go to the guest again. Does nothing if the flow's packets go elsewhere by now, so it may be
        called again at any time."""
        ...

    def forget(self, flow: Flow, endpoint: Endpoint) -> None:
        """As `unredirect`, for a connection that is over: no trace of it stays."""
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
    pool is there for clients that use one port towards several VMs, and for sockets that are not quite gone yet."""

    mode = "nat"
    transparent = False

    def __init__(
        self, *, ports: tuple[int, int] = (61000, 61063), address4: str | None = None, address6: str | None = None
    ) -> None:
        self._ports = range(ports[0], ports[1] + 1)
        self._next = 0
        self._fixed = {socket.AF_INET: address4, socket.AF_INET6: address6}
        self._addresses: dict[str, str] = {}
        self._reserved: dict[tuple[Endpoint, Endpoint], Flow] = {}
        self._redirected: dict[Flow, Endpoint] = {}
        self._conntrack = Conntrack()
        self._placed: set[str] = set()

    def __enter__(self) -> Self:
        try:
            load_rules("inet streamlift", _RULES)
        except HostError:
            self._conntrack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Entries of connections that were closed here and neither sent home nor forgotten stay: the kernel still delivers
        what is in their queues, with the guest's address. They expire with the connection."""
        self._conntrack.close()
        delete_table("inet streamlift")

    def place_routed(self, addresses: Iterable[str]) -> None:
        """What a guest sent last may pass after its flow was redirected, because it waited in a queue. Its tuple is taken then: the
        kernel would give it another source port (nf_nat_core.c, get_unique_tuple), and the client would answer with a RST. It is
        dropped, and the host sends it again."""
        for address in set(addresses) - self._placed:
            name = "guests6" if ":" in address else "guests4"
            run_nft(f"add element inet streamlift {name} {{ {address} }}\n")
            self._placed.add(address)

    def bind_address(self, flow: Flow) -> Endpoint:
        """The ports are taken in turn, so that a socket that is still being closed is rarely in the way of the next."""
        address = self._address(flow.server.address)
        for _ in self._ports:
            self._next = (self._next + 1) % len(self._ports)
            endpoint = Endpoint(address, self._ports[self._next])
            if (endpoint, flow.client) not in self._reserved:
                self._reserved[(endpoint, flow.client)] = flow
                return endpoint
        raise HostError(Reason.TABLE_FULL, f"all {len(self._ports)} ports towards {flow.client} are in use")

    def _address(self, server: str) -> str:
        address = self._addresses.get(server)
        if address is None:
            address = self._addresses[server] = self._fixed[family_of(server)] or address_towards(server)
        return address

    def release(self, flow: Flow, endpoint: Endpoint) -> None:
        """Called when a restore failed: perhaps the host's address has changed, so it is looked up anew."""
        self._addresses.pop(flow.server.address, None)
        self._free(flow, endpoint)

    def _free(self, flow: Flow, endpoint: Endpoint) -> None:
        if self._reserved.get((endpoint, flow.client)) == flow:
            del self._reserved[(endpoint, flow.client)]

    def redirect(self, flow: Flow, endpoint: Endpoint) -> None:
        if self._reserved.setdefault((endpoint, flow.client), flow) != flow:
            raise HostError(Reason.REDIRECT_FAILED, f"{endpoint} serves another flow of {flow.client} by now")
        self._conntrack.replace(flow.client, flow.server, endpoint)
        self._redirected[flow] = endpoint

    def unredirect(self, flow: Flow, endpoint: Endpoint) -> None:
        """The flow gets a plain, liberal entry at once, so that a stateful firewall does not find it invalid."""
        self._free(flow, endpoint)
        if self._redirected.get(flow) is endpoint:
            self._conntrack.replace(flow.client, flow.server, None)
            del self._redirected[flow]

    def forget(self, flow: Flow, endpoint: Endpoint) -> None:
        self._free(flow, endpoint)
        if self._redirected.get(flow) is endpoint:
            self._conntrack.delete(flow.client, flow.server)
            del self._redirected[flow]

    def flush(self) -> int:
        return self._conntrack.flush_marked()
