# SPDX-License-Identifier: Apache-2.0
"""Bridged guests: their frames pass the host's bridge and would never reach its IP stack, where the redirect is. Frames of
the flows that are out are addressed to the bridge itself, and so climb up. The host needs an address on the bridge.

The answers leave with the bridge's MAC address and the guest's IP address; nobody learns a neighbour from TCP."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from types import TracebackType
from typing import Self

from guest_agent.handoff.errors import HostError, Reason
from guest_agent.handoff.snapshot import Endpoint
from hypervisor_svc import flow_set
from hypervisor_svc.flow_set import FlowSet
from hypervisor_svc.redirect import Flow, Redirect, delete_table, load_rules

_SIOCGIFHWADDR = 0x8927


def rules(macs: list[str]) -> str:
    """The bridge-family table for bridges with these MAC addresses. Each has sets of its own, since not every kernel can
    match the bridge's name (nft_meta_bridge)."""
    sets = "".join(flow_set.declaration(f"flows_{number}_") + "\n" for number in range(len(macs)))
    lines = [
        f"{match} ether daddr set {mac} meta pkttype set host"
        for number, mac in enumerate(macs)
        for match in flow_set.matches(f"flows_{number}_")
    ]
    return f"""
table bridge streamlift {{
{sets}
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
        self._macs: dict[str, str] = {}
        self._control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._flows = {
            name: FlowSet(f"flows_{number}_", family=flow_set.BRIDGE) for number, name in enumerate(bridges)
        }
        self._out: dict[Flow, Endpoint] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self._close)
            undo.enter_context(self._inner)
            self._load()
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            delete_table("bridge streamlift")
        finally:
            self._close()
            self._inner.__exit__(kind, error, trace)

    def _close(self) -> None:
        for flows in self._flows.values():
            flows.close()
        self._control.close()

    def _load(self) -> None:
        self._macs = {name: self._mac(name) for name in self._flows}
        load_rules("bridge streamlift", rules(list(self._macs.values())))
        for flow in self._out:
            self._flows[self._addresses[flow.server.address]].add(flow)

    def bind_address(self, flow: Flow) -> Endpoint:
        return self._inner.bind_address(flow)

    def release(self, flow: Flow, endpoint: Endpoint) -> None:
        self._inner.release(flow, endpoint)

    def redirect(self, flow: Flow, endpoint: Endpoint) -> None:
        self._inner.redirect(flow, endpoint)
        bridge = self._addresses.get(flow.server.address)
        if bridge is None:
            return
        self._out[flow] = endpoint
        if self._mac(bridge) == self._macs[bridge]:
            self._flows[bridge].add(flow)
        else:  # a bridge without an address of its own takes the lowest of its ports'
            self._load()

    def unredirect(self, flow: Flow, endpoint: Endpoint) -> None:
        """A bridged flow leaves no NAT entry behind: its packets do not pass the IP stack any more."""
        if self._lower(flow, endpoint) and not self.transparent:
            self._inner.forget(flow, endpoint)
        else:
            self._inner.unredirect(flow, endpoint)

    def forget(self, flow: Flow, endpoint: Endpoint) -> None:
        self._lower(flow, endpoint)
        self._inner.forget(flow, endpoint)

    def _lower(self, flow: Flow, endpoint: Endpoint) -> bool:
        """Let the frames pass again, if they climb for this endpoint; whether they did."""
        if self._out.get(flow) is not endpoint:
            return False
        self._flows[self._addresses[flow.server.address]].remove(flow)
        del self._out[flow]
        return True

    def flush(self) -> int:
        return self._inner.flush()

    def _mac(self, bridge: str) -> str:
        """The bridge's MAC address. It is asked for each flow (2 us), since it may change when a port comes or goes."""
        request = struct.pack("16s24x", bridge.encode())
        try:
            return fcntl.ioctl(self._control, _SIOCGIFHWADDR, request)[18:24].hex(":")
        except OSError as error:
            text = f"bridge {bridge}: {error.strerror}"
            raise HostError(Reason.REDIRECT_FAILED, text, errno=error.errno or 0) from None
