# SPDX-License-Identifier: Apache-2.0
"""Bridged guests: their frames pass the host's bridge and would never reach its IP stack, where the redirect is. Frames of
the flows that are out are addressed to the bridge itself, and so climb up. The host needs an address on the bridge.

The answers leave with the bridge's MAC address and the guest's IP address; nobody learns a neighbour from TCP."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from collections.abc import Iterable, Mapping
from types import MappingProxyType, TracebackType
from typing import Self

from guest_agent.handoff.errors import HostError, Reason
from guest_agent.handoff.snapshot import Endpoint
from hypervisor_svc import flow_set
from hypervisor_svc.flow_set import FlowSet
from hypervisor_svc.redirect import Flow, Redirect, delete_table, load_rules

_SIOCGIFHWADDR = 0x8927
_TABLE = "bridge streamlift"


def rules(macs: dict[str, str]) -> str:
    """The bridge-family table: per bridge the name of its sets and its MAC address. Each has sets of its own, since not
    every kernel can match the bridge's name (nft_meta_bridge)."""
    sets = "".join(flow_set.declaration(name) + "\n" for name in macs)
    lines = [
        f"{match} ether daddr set {mac} meta pkttype set host"
        for name, mac in macs.items()
        for match in flow_set.matches(name)
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
    """Wraps another redirect. `bridges` maps a bridge's name to the addresses of VMs on it; `place` tells of others."""

    def __init__(self, inner: Redirect, bridges: Mapping[str, Iterable[str]] = MappingProxyType({})) -> None:
        self._inner = inner
        self.mode, self.transparent = inner.mode, inner.transparent
        self._addresses: dict[str, str | None] = {}
        self._macs: dict[str, str] = {}
        self._control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._flows: dict[str, FlowSet] = {}
        self._out: dict[Flow, tuple[Endpoint, str]] = {}
        self._bridges = bridges

    def place(self, addresses: Iterable[str], bridge: str | None) -> None:
        """These addresses belong to a VM that is a port of `bridge`, or with None to one that is routed. What is out already
        is not touched. If there is no such bridge, the VM's flows will be refused."""
        for address in addresses:
            self._addresses[address] = bridge
        if bridge is None:
            self._inner.place_routed(addresses)
        if bridge is not None and bridge not in self._flows:
            self._flows[bridge] = FlowSet(f"flows_{len(self._flows)}_", family=flow_set.BRIDGE)
            with contextlib.suppress(HostError):  # `redirect` tries again, and says what is wrong
                self._load()

    def place_routed(self, addresses: Iterable[str]) -> None:
        """See `Redirect`."""
        self.place(addresses, None)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self._close)
            undo.enter_context(self._inner)
            _delete_table()  # of an earlier service; ours comes with the first bridge
            for bridge, addresses in self._bridges.items():
                self.place(addresses, bridge)
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _delete_table()
        finally:
            self._close()
            self._inner.__exit__(kind, error, trace)

    def _close(self) -> None:
        for flows in self._flows.values():
            flows.close()
        self._control.close()

    def _load(self) -> None:
        """The table anew, with the MAC addresses that the bridges have now."""
        macs = {}
        for bridge in self._flows:
            with contextlib.suppress(HostError):  # it is gone, and its frames with it
                macs[bridge] = self._mac(bridge)
        load_rules(_TABLE, rules({self._flows[bridge].name: mac for bridge, mac in macs.items()}))
        self._macs = macs
        for flow, (_, bridge) in self._out.items():
            if bridge in macs:
                self._flows[bridge].add(flow)

    def bind_address(self, flow: Flow) -> Endpoint:
        return self._inner.bind_address(flow)

    def release(self, flow: Flow, endpoint: Endpoint) -> None:
        self._inner.release(flow, endpoint)

    def redirect(self, flow: Flow, endpoint: Endpoint) -> None:
        bridge = self._addresses.get(flow.server.address)
        if bridge is None:
            self._inner.redirect(flow, endpoint)
            return
        if self._mac(bridge) != self._macs.get(bridge):  # without an address of its own it takes the lowest of its ports'
            self._load()
        self._inner.redirect(flow, endpoint)
        self._out[flow] = endpoint, bridge
        self._flows[bridge].add(flow)

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
        raised, bridge = self._out.get(flow, (None, ""))
        if raised is not endpoint:
            return False
        if bridge in self._macs:
            self._flows[bridge].remove(flow)
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


def _delete_table() -> None:
    with contextlib.suppress(HostError):  # a kernel without tables for bridges has none of ours
        delete_table(_TABLE)
