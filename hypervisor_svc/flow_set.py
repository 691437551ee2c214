# SPDX-License-Identifier: Apache-2.0
"""A pair of nftables sets (IPv4, IPv6) of flows, client -> server, whose elements come and go over plain netlink.

One element costs some 20 us; libnftables reads the whole ruleset first and takes 15 times as long. The rules that use the
sets are loaded with nft(8). Layout: include/uapi/linux/netfilter/nf_tables.h; the key is a concatenation, each part of it
padded to four bytes (nft(8), CONCATENATIONS)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest_agent.handoff.segment import packed
from hypervisor_svc import netlink
from hypervisor_svc.netlink import Netlink, attribute, nest

if TYPE_CHECKING:
    from hypervisor_svc.redirect import Flow

INET, BRIDGE = 1, 7
"""Families of tables (NFPROTO_*)."""

_NEW_ELEMENT, _DELETE_ELEMENT = 0xA0C, 0xA0E
_BATCH_BEGIN, _BATCH_END, _NFTABLES = 0x10, 0x11, 10
_TABLE, _SET, _ELEMENTS, _ELEMENT, _KEY, _VALUE = 1, 2, 3, 1, 1, 1


def declaration(name: str, flags: str = "") -> str:
    """The two sets, for a table's text: `name` and the version of IP."""
    return "\n".join(
        f"    set {name}{version} {{ type {kind} . inet_service . {kind} . inet_service; {flags} }}"
        for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr"))
    )


def matches(name: str) -> tuple[str, str]:
    """The matches of a rule against the two sets."""
    return (
        f"ip saddr . tcp sport . ip daddr . tcp dport @{name}4",
        f"ip6 saddr . tcp sport . ip6 daddr . tcp dport @{name}6",
    )


def encode(flow: Flow, name: str, *, remove: bool, family: int, sequence: int) -> bytes:
    """A batch that adds an element, or adds and removes it: to remove one that is not there would abort the batch, and that
    makes the kernel wait for an RCU grace period (8 ms). All messages carry the same sequence number: whichever fails is
    the answer."""
    first, second = packed(flow.client.address), packed(flow.server.address)
    ports = [endpoint.port.to_bytes(2, "big") + bytes(2) for endpoint in (flow.client, flow.server)]
    body = (
        attribute(_TABLE, b"streamlift\0")
        + attribute(_SET, f"{name}{4 if len(first) == 4 else 6}\0".encode())
        + nest(_ELEMENTS, nest(_ELEMENT, nest(_KEY, attribute(_VALUE, first + ports[0] + second + ports[1]))))
    )
    adding = netlink.CREATE if remove else netlink.CREATE | netlink.ACK
    messages = [
        netlink.message(_BATCH_BEGIN, 0, sequence, family=0, body=b"", resource=_NFTABLES),
        netlink.message(_NEW_ELEMENT, adding, sequence, family=family, body=body),
        netlink.message(_DELETE_ELEMENT, netlink.ACK, sequence, family=family, body=body) if remove else b"",
        netlink.message(_BATCH_END, 0, sequence, family=0, body=b"", resource=_NFTABLES),
    ]
    return b"".join(messages)


class FlowSet:
    """The sets `name` of our table of a family. Methods raise OSError; both are idempotent."""

    def __init__(self, name: str, *, family: int) -> None:
        self.name, self._family = name, family
        self._netlink = Netlink()

    def close(self) -> None:
        """Close the socket; the sets stay."""
        self._netlink.close()

    def add(self, flow: Flow) -> None:
        """Put a flow in."""
        self._send(flow, remove=False)

    def remove(self, flow: Flow) -> None:
        """Take a flow out."""
        self._send(flow, remove=True)

    def _send(self, flow: Flow, *, remove: bool) -> None:
        sequence = self._netlink.next()
        batch = encode(flow, self.name, remove=remove, family=self._family, sequence=sequence)
        netlink.check(self._netlink.transact(batch, sequence)[0], "nftables element", fine=())
