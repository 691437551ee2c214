# SPDX-License-Identifier: Apache-2.0
"""Bridged guests: their frames pass the host's bridge and would never reach its IP stack, where the redirect is. Frames of
the flows that are out are addressed to the bridge itself, and so climb up. The host needs an address on the bridge.

The answers leave with the bridge's MAC address and the guest's IP address; nobody learns a neighbour from TCP."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Self

from guest_agent.handoff.errors import HostError, Reason
from guest_agent.handoff.snapshot import Endpoint
from hypervisor_svc import flow_set
from hypervisor_svc.flow_set import FlowSet
from hypervisor_svc.redirect import Flow, Redirect, delete_table, load_rules


def rules(bridges: dict[str, str]) -> str:
    """The bridge-family table for `bridges`: name -> MAC address."""
    lines = [
        f'meta ibrname "{name}" {match} ether daddr set {mac} meta pkttype set host'
        for name, mac in bridges.items()
        for match in flow_set.matches()
    ]
    return f"""
table bridge streamlift {{
{flow_set.declaration()}
    chain prerouting {{
        type filter hook prerouting priority dstnat; policy accept;
        {chr(10).join(lines)}
    }}
}}
"""


class BridgedRedirect:
    """Wraps another redirect. `bridges` maps a bridge's name to the addresses of the VMs on it."""

    def __init__(self, inner: Redirect, bridges: dict[str, tuple[str, ...]]) -> None:
        self._inner = inner
        self.mode, self.transparent = inner.mode, inner.transparent
        self._addresses = {address: name for name, addresses in bridges.items() for address in addresses}
        self._bridges = {name: Bridge(name) for name in bridges}
        self._macs: dict[str, str] = {}
        self._flows = FlowSet(family=flow_set.BRIDGE, table="streamlift")
        self._out: set[Flow] = set()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._inner)
            self._load()
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        delete_table("bridge streamlift")
        self._flows.close()
        for bridge in self._bridges.values():
            bridge.close()
        self._inner.__exit__(kind, error, trace)

    def _load(self) -> None:
        self._macs = {name: bridge.mac() for name, bridge in self._bridges.items()}
        load_rules("bridge streamlift", rules(self._macs))
        for flow in self._out:
            self._flows.add(flow)

    def bind_address(self, flow: Flow) -> Endpoint:
        return self._inner.bind_address(flow)

    def release(self, flow: Flow, endpoint: Endpoint) -> None:
        self._inner.release(flow, endpoint)

    def redirect(self, flow: Flow, endpoint: Endpoint) -> None:
        self._inner.redirect(flow, endpoint)
        name = self._addresses.get(flow.server.address)
        if name is None:
            return
        self._out.add(flow)
        if self._bridges[name].mac() == self._macs[name]:
            self._flows.add(flow)
        else:  # a bridge without an address of its own takes the lowest of its ports'
            self._load()

    def unredirect(self, flow: Flow, endpoint: Endpoint) -> None:
        """A bridged flow leaves nothing in the IP stack: its packets do not pass there any more."""
        if flow.server.address not in self._addresses:
            self._inner.unredirect(flow, endpoint)
            return
        self._lower(flow)
        if self.transparent:
            self._inner.unredirect(flow, endpoint)
        else:
            self._inner.forget(flow, endpoint)

    def forget(self, flow: Flow, endpoint: Endpoint) -> None:
        if flow.server.address in self._addresses:
            self._lower(flow)
        self._inner.forget(flow, endpoint)

    def _lower(self, flow: Flow) -> None:
        self._flows.remove(flow)
        self._out.discard(flow)

    def flush(self) -> int:
        return self._inner.flush()


class Bridge:
    """A bridge's MAC address, read anew for each flow (2 us): it may change when a port comes or goes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def mac(self) -> str:
        """The address as text. Raises HostError if there is no such bridge."""
        try:
            with open(f"/sys/class/net/{self._name}/address", encoding="ascii") as file:
                return file.read().strip()
        except OSError as error:
            text = f"bridge {self._name}: {error.strerror}"
            raise HostError(Reason.REDIRECT_FAILED, text, errno=error.errno or 0) from None

    def close(self) -> None:
        """Nothing is held."""
