# SPDX-License-Identifier: Apache-2.0
"""Bridged guests: their frames pass the host's bridge and would never reach its IP stack, where the redirect is. For the
4-tuples that are out, the frame is addressed to the bridge itself, and so climbs up. The host needs an address on the
bridge. Elements come and go through libnftables, in this process."""

from __future__ import annotations

import ctypes
import ctypes.util
from types import TracebackType
from typing import Self

from guest_agent.handoff.errors import HostError, Reason
from guest_agent.handoff.snapshot import Endpoint
from hypervisor_svc.redirect import Flow, Redirect, delete_table, load_rules


def rules(bridges: dict[str, str]) -> str:
    """The bridge-family table for `bridges`: name -> MAC address."""
    lines = [
        f'meta ibrname "{name}" {match} ether daddr set {mac} meta pkttype set host'
        for name, mac in bridges.items()
        for match in ("ip saddr . tcp sport . ip daddr . tcp dport @flows4", "ip6 saddr . tcp sport . ip6 daddr . tcp dport @flows6")
    ]
    return f"""
table bridge streamlift {{
    set flows4 {{ type ipv4_addr . inet_service . ipv4_addr . inet_service; }}
    set flows6 {{ type ipv6_addr . inet_service . ipv6_addr . inet_service; }}
    chain prerouting {{
        type filter hook prerouting priority dstnat; policy accept;
        {chr(10).join(lines)}
    }}
}}
"""


class BridgedRedirect:
    """Wraps another redirect. `bridges` maps a bridge's name to the addresses of the VMs on it."""

    def __init__(self, inner: Redirect, bridges: dict[str, tuple[str, ...]]) -> None:
        self._inner, self._bridges = inner, bridges
        self.mode, self.transparent = inner.mode, inner.transparent
        self._addresses = frozenset(address for addresses in bridges.values() for address in addresses)
        self._nft = _Libnftables()

    def __enter__(self) -> Self:
        self._inner.__enter__()
        load_rules("bridge streamlift", rules({name: _mac(name) for name in self._bridges}))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        delete_table("bridge streamlift")
        self._nft.close()
        self._inner.__exit__(kind, error, trace)

    def bind_address(self, flow: Flow) -> Endpoint:
        return self._inner.bind_address(flow)

    def release(self, flow: Flow, endpoint: Endpoint) -> None:
        self._inner.release(flow, endpoint)

    def redirect(self, flow: Flow, endpoint: Endpoint) -> None:
        self._inner.redirect(flow, endpoint)
        if flow.server.address in self._addresses:
            self._nft.run(f"add element bridge streamlift {_element(flow)}")

    def unredirect(self, flow: Flow, endpoint: Endpoint) -> None:
        if flow.server.address in self._addresses:
            self._nft.run(f"add element bridge streamlift {_element(flow)}; delete element bridge streamlift {_element(flow)}")
        self._inner.unredirect(flow, endpoint)

    def flush(self) -> int:
        return self._inner.flush()


def _element(flow: Flow) -> str:
    name = "flows6" if ":" in flow.client.address else "flows4"
    client, server = flow.client, flow.server
    return f"{name} {{ {client.address} . {client.port} . {server.address} . {server.port} }}"


def _mac(bridge: str) -> str:
    try:
        with open(f"/sys/class/net/{bridge}/address", encoding="ascii") as file:
            return file.read().strip()
    except OSError as error:
        raise HostError(Reason.REDIRECT_FAILED, f"bridge {bridge}: {error.strerror}", errno=error.errno or 0) from None


class _Libnftables:
    """libnftables(3): the parser and netlink code of nft(8) in this process."""

    def __init__(self) -> None:
        name = ctypes.util.find_library("nftables")
        if name is None:
            raise HostError(Reason.REDIRECT_FAILED, "libnftables is not installed (apt install libnftables1)")
        self._library = ctypes.CDLL(name)
        self._library.nft_ctx_new.restype = ctypes.c_void_p
        self._library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._context = ctypes.c_void_p(self._library.nft_ctx_new(0))
        self._library.nft_ctx_buffer_error(self._context)
        self._library.nft_ctx_buffer_output(self._context)

    def run(self, command: str) -> None:
        """Raises OSError with what the library says."""
        if self._library.nft_run_cmd_from_buffer(self._context, command.encode()):
            text = self._library.nft_ctx_get_error_buffer(self._context) or b""
            raise OSError(5, f"nftables: {text.decode(errors='replace').strip()}")

    def close(self) -> None:
        """Free the context."""
        self._library.nft_ctx_free(self._context)
