# SPDX-License-Identifier: Apache-2.0
"""Redirection of real connections between a client and a guest, by a host that lies between them: each mode, each
topology, each family. What the client's link carries is captured, and must be what one honest endpoint would send."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from guest_agent.handoff import kernel
from guest_agent.handoff.errors import HostError
from guest_agent.handoff.extract import extract
from guest_agent.handoff.freeze import freeze, thaw
from guest_agent.handoff.hold import Hold
from guest_agent.handoff.restore import restore_fresh, restore_in_place, send_unsent
from guest_agent.handoff.segment import ones_sum, packed
from guest_agent.handoff.snapshot import Endpoint, before_fin
from hypervisor_svc.bridge import BridgedRedirect
from hypervisor_svc.inject import Injector, fin_segment
from hypervisor_svc.redirect import SOCKET_MARK, Flow, NatRedirect, Redirect
from hypervisor_svc.transparent import TransparentRedirect
from tests.namespaces import topology
from tests.namespaces.topology import Namespace, Network

pytestmark = pytest.mark.root

_FIN, _SYN, _RST = 1, 2, 4
_TOPOLOGIES = {"routed": topology.routed, "bridged": topology.bridged}
_MODES = {"nat": NatRedirect, "transparent": TransparentRedirect}


@pytest.fixture(scope="module", params=sorted(_TOPOLOGIES))
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    with _TOPOLOGIES[request.param]() as network:
        yield network


@pytest.fixture(params=sorted(_MODES))
def redirect(request: pytest.FixtureRequest, network: Network) -> Iterator[Redirect]:
    with started(network, _MODES[request.param]) as redirect:
        yield redirect


@contextlib.contextmanager
def started(network: Network, mode: type[NatRedirect] | type[TransparentRedirect]) -> Iterator[Redirect]:
    """A redirect in the host's namespace, with all its rules there, and none left behind."""
    with network.host.entered():
        inner: Redirect = mode()
        made = BridgedRedirect(inner, {network.bridge: tuple(network.guest_address.values())}) if network.bridge else inner
        made.__enter__()
    try:
        yield made
    finally:
        with network.host.entered():
            made.__exit__(None, None, None)
        assert "streamlift" not in network.host.run("nft", "list", "ruleset")
        assert "21324" not in network.host.run("ip", "rule") + network.host.run("ip", "-6", "rule")
        assert marked_entries(network) == ""


def marked_entries(network: Network) -> str:
    """Entries of ours in the host's table."""
    return network.host.run("conntrack", "-L", "-m", "0x534c0000/0xffff0000") + network.host.run(
        "conntrack", "-L", "-f", "ipv6", "-m", "0x534c0000/0xffff0000"
    )


@dataclass
class Trip:
    """One connection and its three places: the client's socket, the guest's, and while it is out the host's."""

    network: Network
    redirect: Redirect
    keep: Hold
    client: socket.socket
    guest: socket.socket
    host: socket.socket | None = None
    endpoint: Endpoint | None = None

    @property
    def flow(self) -> Flow:
        peer, own = self.guest.getpeername(), self.guest.getsockname()
        return Flow(Endpoint(*peer[:2]), Endpoint(*own[:2]))

    def out(self) -> socket.socket:
        """Steps 1 to 5: from here the host owns the connection."""
        freeze(self.guest, self.keep)
        snapshot = extract(self.guest)
        with self.network.host.entered():
            self.endpoint = self.redirect.bind_address(self.flow)
            host = restore_fresh(
                snapshot, self.keep, bind=self.endpoint, transparent=self.redirect.transparent, mark=SOCKET_MARK
            )
        self.redirect.redirect(self.flow, self.endpoint)
        thaw(host)
        send_unsent(host, snapshot)
        host.settimeout(5)
        self.host = host
        return host

    def home(self) -> None:
        """Steps 7 and 8, in the product's order: unredirect while our frozen socket is still there."""
        assert self.host is not None and self.endpoint is not None
        freeze(self.host, self.keep)
        snapshot = replace(extract(self.host), local=self.flow.server)
        self.redirect.unredirect(self.flow, self.endpoint)
        restore_in_place(self.guest, snapshot)
        thaw(self.guest)
        send_unsent(self.guest, snapshot)
        self.exchange(self.guest)
        self.host.close()
        self.host = None

    def exchange(self, owner: socket.socket, size: int = 100_000) -> None:
        """Random bytes both ways."""
        for sender, receiver in ((owner, self.client), (self.client, owner)):
            blob = os.urandom(size)
            thread = threading.Thread(target=sender.sendall, args=(blob,))
            thread.start()
            assert receive(receiver, size) == blob
            thread.join()


def receive(sock: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        piece = sock.recv(size - len(got))
        assert piece, "the connection ended early"
        got += piece
    return got


def speak_as_guest(trip: Trip, flags: int, sequence: int, acknowledge: int) -> None:
    """One segment from the guest's network, as its kernel would send it for a socket that is not there."""
    client, server = trip.flow.client, trip.flow.server
    head = struct.pack("!HHIIBBHHH", server.port, client.port, sequence, acknowledge, 5 << 4, flags, 0, 0, 0)
    pseudo = packed(server.address) + packed(client.address) + struct.pack("!II", len(head), socket.IPPROTO_TCP)
    checksum = struct.pack("!H", ~ones_sum(pseudo + head) & 0xFFFF)
    with trip.network.guest.entered():
        raw = socket.socket(trip.guest.family, socket.SOCK_RAW, socket.IPPROTO_TCP)
    with raw:
        raw.sendto(head[:16] + checksum + head[18:], (client.address, 0))


_ports = itertools.count(7000)


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def trip(request: pytest.FixtureRequest, network: Network, redirect: Redirect) -> Iterator[Trip]:
    with connected(network, redirect, request.param) as trip:
        yield trip


@contextlib.contextmanager
def connected(network: Network, redirect: Redirect, family: int) -> Iterator[Trip]:
    port = next(_ports)
    with network.guest.entered():
        listener = socket.create_server(
            (network.guest_address[family], port), family=socket.AF_INET if family == 4 else socket.AF_INET6
        )
    with network.client.entered():
        client = socket.create_connection((network.guest_address[family], port), timeout=5)
    guest, _ = listener.accept()
    guest.settimeout(5)
    listener.close()
    with Hold() as keep, client, guest:
        trip = Trip(network, redirect, keep, client, guest)
        trip.exchange(guest)
        yield trip
        if trip.host is not None:
            trip.host.setsockopt(socket.IPPROTO_TCP, kernel.TCP_REPAIR, kernel.REPAIR_ON)
            trip.host.close()
        if trip.endpoint is not None:
            redirect.forget(trip.flow, trip.endpoint)


@contextlib.contextmanager
def captured(where: Namespace, port: int) -> Iterator[list[tuple[bool, int]]]:
    """(comes from the server, TCP flags) of every packet with `port` that passes the namespace's eth0."""
    with where.entered():
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    with raw:
        raw.bind(("eth0", 3))
        raw.setsockopt(socket.SOL_SOCKET, kernel.SO_RCVBUFFORCE, 32 << 20)
        raw.setblocking(False)
        found: list[tuple[bool, int]] = []
        yield found
        time.sleep(0.05)
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = raw.recv(256)
                six = packet[0] >> 4 == 6
                if packet[6 if six else 9] != socket.IPPROTO_TCP:
                    continue
                tcp = packet[40:] if six else packet[20:]
                ports = struct.unpack("!HH", tcp[:4])
                if port in ports or any(61000 <= number <= 61063 for number in ports):
                    found.append((ports[1] != port, tcp[13]))


def test_out_and_home_five_times(trip: Trip) -> None:
    port = trip.flow.server.port
    with captured(trip.network.client, port) as packets:
        for _ in range(5):
            trip.exchange(trip.out())
            trip.home()
            trip.exchange(trip.guest)
    assert packets
    assert not [flags for _, flags in packets if flags & (_RST | _FIN | _SYN)]


def test_the_guest_sees_nothing_while_the_host_serves(trip: Trip) -> None:
    host = trip.out()
    with captured(trip.network.guest, trip.flow.server.port) as packets:
        trip.exchange(host)
    assert packets == []


def test_the_host_may_speak_first(trip: Trip) -> None:
    host = trip.out()
    host.sendall(b"first")
    assert receive(trip.client, 5) == b"first"


def test_a_socket_that_goes_before_its_redirect_says_nothing(trip: Trip) -> None:
    host = trip.out()
    assert trip.endpoint is not None
    with captured(trip.network.client, trip.flow.server.port) as packets:
        freeze(host, trip.keep)
        host.close()
        trip.host = None
        trip.client.sendall(b"is anybody there?")
        time.sleep(0.1)
    assert not [flags for from_server, flags in packets if from_server]


@pytest.mark.parametrize("redirect", ["nat"], indirect=True)
def test_a_socket_without_a_redirect_cannot_speak(trip: Trip) -> None:
    host = trip.out()
    assert trip.endpoint is not None
    with captured(trip.network.client, trip.flow.server.port) as packets:
        trip.redirect.forget(trip.flow, trip.endpoint)
        host.send(b"with whose voice?")
        time.sleep(0.3)
    assert packets == []


@pytest.mark.parametrize("network", ["routed"], indirect=True)
@pytest.mark.parametrize("redirect", ["nat"], indirect=True)
@pytest.mark.parametrize("flags", [_RST, _RST | 16], ids=["rst", "rst-ack"])
def test_a_guest_cannot_reset_what_the_host_owns(trip: Trip, flags: int) -> None:
    """Neither in malice, nor because its socket is being rebuilt when a last packet of the client arrives."""
    host = trip.out()
    trip.exchange(host)
    freeze(host, trip.keep)
    snapshot = extract(host)
    thaw(host)
    with captured(trip.network.guest, trip.flow.server.port) as sent, captured(trip.network.client, trip.flow.server.port) as came:
        speak_as_guest(trip, flags, snapshot.send_next, snapshot.receive_next)
    assert sent and not came
    trip.exchange(host)
    trip.home()


@pytest.mark.parametrize("network", ["routed"], indirect=True)
@pytest.mark.parametrize("redirect", ["nat"], indirect=True)
def test_what_the_guest_sent_before_comes_late(trip: Trip) -> None:
    """Its tuple is taken: it must not get another source port, to which the client answers with a RST that ends the connection."""
    with trip.network.host.entered():
        trip.redirect.place_routed(trip.network.guest_address.values())
    host = trip.out()
    freeze(host, trip.keep)
    snapshot = extract(host)
    thaw(host)
    with captured(trip.network.client, trip.flow.client.port) as came:
        speak_as_guest(trip, 16, snapshot.send_next, snapshot.receive_next)
    assert came == []
    trip.exchange(host)
    trip.home()


def test_a_close_of_the_host_ends_the_connection_in_order(trip: Trip) -> None:
    host = trip.out()
    host.sendall(b"last")
    host.close()
    trip.host = None
    assert receive(trip.client, 4) == b"last"
    assert trip.client.recv(1) == b""
    with captured(trip.network.client, trip.flow.server.port) as packets:
        trip.client.close()
        time.sleep(0.5)
    assert not [flags for _, flags in packets if flags & _RST]
    assert [flags for from_server, flags in packets if from_server], "TIME_WAIT acknowledges the client's FIN"


def test_an_old_connection_does_not_touch_its_successor(trip: Trip) -> None:
    """The same four numbers are out again when the first time is forgotten late."""
    trip.out()
    first = trip.endpoint
    assert first is not None
    trip.home()
    host = trip.out()
    trip.redirect.unredirect(trip.flow, first)
    trip.redirect.forget(trip.flow, first)
    trip.exchange(host)
    trip.home()


def test_flush_finds_what_a_killed_service_left(network: Network) -> None:
    with started(network, NatRedirect) as redirect, connected(network, redirect, 4) as four, connected(
        network, redirect, 6
    ) as six:
        four.out()
        six.out()
        assert redirect.flush() == 2
        assert redirect.flush() == 0


@pytest.mark.parametrize("where", ["host", "guest"])
@pytest.mark.parametrize("size", [10, 50_000])
def test_kept_packets_go_back_on_the_road(trip: Trip, where: str, size: int) -> None:
    """Held by the frozen socket of one side, given to the owner: before any retransmission timeout could have helped."""
    blob = os.urandom(size)
    trip.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if where == "guest":
        trip.exchange(trip.out())
    with trip.network.host.entered():
        injector = Injector()
        injector.__enter__()
    try:
        frozen = trip.guest if where == "host" else trip.host
        assert frozen is not None
        freeze(frozen, trip.keep)
        trip.client.sendall(blob)
        thaw(frozen)
        owner = trip.out() if where == "host" else go_home(trip)
        held = list(trip.keep.drain())
        assert held
        begin = time.monotonic()
        for _, segment in held:
            injector.inject(trip.flow, segment)
        assert receive(owner, size) == blob
        assert time.monotonic() - begin < 0.15
        assert injector.injected == len(held) and not injector.lost
        trip.exchange(owner)
    finally:
        injector.__exit__(None, None, None)


def go_home(trip: Trip) -> socket.socket:
    """Home, without an exchange: the client has spoken already."""
    assert trip.host is not None and trip.endpoint is not None
    freeze(trip.host, trip.keep)
    snapshot = replace(extract(trip.host), local=trip.flow.server)
    trip.redirect.unredirect(trip.flow, trip.endpoint)
    restore_in_place(trip.guest, snapshot)
    thaw(trip.guest)
    trip.host.close()
    trip.host = None
    return trip.guest


def test_a_fin_comes_again(trip: Trip) -> None:
    """The client closes towards the host; the guest sees it close."""
    host = trip.out()
    trip.client.shutdown(socket.SHUT_WR)
    assert host.recv(1) == b""
    freeze(host, trip.keep)
    snapshot = replace(before_fin(extract(host)), local=trip.flow.server)
    assert trip.endpoint is not None
    trip.redirect.unredirect(trip.flow, trip.endpoint)
    restore_in_place(trip.guest, snapshot)
    thaw(trip.guest)
    fin = fin_segment(
        trip.flow, sequence=snapshot.receive_next, acknowledge=snapshot.send_sequence, window=snapshot.window.snd_wnd >> 7
    )
    with trip.network.host.entered():
        injector = Injector()
        injector.__enter__()
    injector.inject(trip.flow, fin)
    assert trip.guest.recv(1) == b""
    trip.guest.sendall(b"goodbye")
    assert receive(trip.client, 7) == b"goodbye"
    injector.__exit__(None, None, None)


@pytest.mark.parametrize("network", ["routed"], indirect=True)
def test_a_strict_firewall_lets_the_flow_pass(network: Network) -> None:
    """nf_conntrack_tcp_loose=0, and what is INVALID is dropped, on the host's forwarding path."""
    network.host.sysctl("net.netfilter.nf_conntrack_tcp_loose", "0")
    network.host.run("nft", "add table inet strict; add chain inet strict f { type filter hook forward priority 0; }")
    network.host.run("nft", "add rule inet strict f ct state invalid drop")
    try:
        for family in (4, 6):
            with started_with(network) as redirect, connected(network, redirect, family) as trip:
                trip.exchange(trip.out())
                trip.home()
                trip.exchange(trip.guest)
    finally:
        network.host.run("nft", "delete table inet strict")
        network.host.sysctl("net.netfilter.nf_conntrack_tcp_loose", "1")


@contextlib.contextmanager
def started_with(network: Network) -> Iterator[Redirect]:
    """As `started`, beside rules of somebody else."""
    with network.host.entered():
        made = NatRedirect()
        made.__enter__()
    try:
        yield made
    finally:
        with network.host.entered():
            made.__exit__(None, None, None)


@pytest.mark.parametrize("network", ["routed"], indirect=True)
def test_local_ports_are_shared_and_run_out_with_a_reason(network: Network) -> None:
    with network.host.entered(), NatRedirect(ports=(61000, 61001)) as redirect:
        client = Endpoint(network.client_address[4], 5000)
        flows = [Flow(client, Endpoint(network.guest_address[4], port)) for port in (80, 81, 82)]
        first, second = (redirect.bind_address(flow) for flow in flows[:2])
        assert {first.port, second.port} == {61000, 61001}
        with pytest.raises(HostError, match="in use"):
            redirect.bind_address(flows[2])
        other = Flow(Endpoint(network.client_address[4], 5001), flows[0].server)
        assert redirect.bind_address(other).port in (61000, 61001)
        redirect.release(flows[0], first)
        assert redirect.bind_address(flows[2]) == first


def test_sockets_of_other_programs_are_left_alone(network: Network) -> None:
    """A transparent proxy of somebody else's keeps its socket, and we do not route to it."""
    with started(network, TransparentRedirect) as redirect, connected(network, redirect, 4) as trip:
        with network.host.entered(), socket.socket() as other:
            other.setsockopt(socket.IPPROTO_IP, kernel.IP_TRANSPARENT, 1)
            other.bind(tuple(trip.flow.server))
            other.listen()
            trip.exchange(trip.guest)
