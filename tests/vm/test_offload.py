# SPDX-License-Identifier: Apache-2.0
"""The whole product with a real VM: requests through a Debian guest, every answer hashed, nothing left behind."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libvirt
import pytest

from hypervisor_svc import attach
from hypervisor_svc.deploy import undeploy
from tests.client import make_content
from tests.vm.conftest import Deploy
from tests.vm.console import give_shell, open_shell
from tests.vm.libvirt_host import LibvirtHost, wait_for
from tests.vm.namespaces import give_addresses
from tests.vm.product import Product
from vm_images.build import Image, build

pytestmark = [pytest.mark.vm, pytest.mark.root]

LARGEST = 64_000_000
SIZES = (0, 1, 4096, 65_535, 65_536, 100_000, 288_600, 1_400_000, 10_500_000, LARGEST)
ADDRESS4, ADDRESS6 = "10.78.0.2", "fd78::2"
TRANSPARENT = '[redirect]\nmode = "transparent"\n'

Serve = Callable[..., Product]


def assert_offloaded(product: Product, address: str, *, least: float = 0.99) -> None:
    """Server and service tell the same story: nearly all above the threshold went through the host, and all came home."""
    product.wait_home()
    counters, machine = product.counters(address), product.status()["machines"][0]
    local = {reason: count for reason, count in counters["local"].items() if reason != "too_small"}
    assert counters["failed"] == machine["failed"] == 0
    assert counters["offloaded"] >= least * (counters["offloaded"] + sum(local.values())), local
    assert machine["handed_out"] == machine["handed_back"] == counters["offloaded"], (machine, counters)
    assert machine["ended"] == 0 and machine["refused"] == {}, machine


def assert_nothing_left(product: Product, files: int) -> None:
    """No redirect and no file descriptor outlives its connection."""
    product.wait_home()
    assert product.redirects() == []
    assert product.open_files() == files


@pytest.mark.parametrize(
    ("kernel", "address", "requests", "extra"),
    [
        pytest.param("6.12", ADDRESS4, 2000, "", id="6.12-ipv4"),
        pytest.param("6.1", ADDRESS6, 2000, "", id="6.1-ipv6"),
        pytest.param("6.12", ADDRESS4, 500, TRANSPARENT, id="transparent-6.12-ipv4"),
    ],
)
def test_every_byte_of_many_requests(
    kernel: str, address: str, requests: int, extra: str, share: Path, serve: Serve, deploy_machine: Deploy
) -> None:
    make_content(str(share), SIZES)
    product = serve(extra=extra)
    deploy_machine(build(kernel))
    product.wait_ready(address)
    files = product.open_files()
    with ThreadPoolExecutor(2) as beside:  # the random choice is mostly of small files
        large = [(size, beside.submit(product.fetch, address, f"{size}.bin")) for size in (10_500_000, LARGEST) * 2]
        report = product.load(address, requests=requests, connections=50)
    for size, body in large:
        assert body.result() == (share / f"{size}.bin").read_bytes(), size
    assert report["errors"] == 0, report["first_errors"]
    assert report["requests"] >= requests
    assert_offloaded(product, address)
    assert_nothing_left(product, files)


@pytest.fixture
def bridge(libvirt_host: LibvirtHost) -> Iterator[str]:
    """A bridge of the host with the client as a port."""
    host, client = libvirt_host, libvirt_host.client
    client_addresses = ("192.0.2.2/24", "fd78:b::2/64")
    with contextlib.ExitStack() as undo:
        undo.callback(client.run, "ip", "neighbour", "flush", "dev", "eth0")  # the next VM has another MAC address
        host.run("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        undo.callback(host.run, "ip", "link", "delete", "br0")
        host.run("ip", "link", "set", "client0", "master", "br0")
        host.run("ip", "link", "set", "br0", "up")
        give_addresses(host.namespaces, "br0", "192.0.2.1/24", "fd78:b::1/64")
        for address in client_addresses:
            give_addresses(client, "eth0", address)
            undo.callback(client.run, "ip", "address", "delete", address, "dev", "eth0")
        yield "br0"


@pytest.mark.parametrize("extra", ["", TRANSPARENT], ids=["nat", "transparent"])
def test_bridged_vm_found_live(extra: str, bridge: str, share: Path, serve: Serve, libvirt_host: LibvirtHost) -> None:
    """The client's frames would pass the host's bridge; they come to the service all the same."""
    make_content(str(share), SIZES)
    product = serve(extra=extra)
    with contextlib.ExitStack() as undo:
        place = ("--bridge", bridge, "--address", "192.0.2.7/24", "--address6", "fd78:b::7/64")
        product.command("deploy", "guest", "--share", str(share), "--kernel", "6.12", *place)
        undo.callback(product.command, "undeploy", "guest")
        carry_bridged_traffic(product, libvirt_host)


def carry_bridged_traffic(product: Product, host: LibvirtHost) -> None:
    """Requests over both families, then a restart of the service, which finds the VM again."""
    product.wait_ready("192.0.2.7")
    files = product.open_files()
    for netfilter in ("0", "1"):  # whether the IP rules of a host with br_netfilter see bridged frames
        for version in ("", "6"):
            host.run("sysctl", "-qew", f"net.bridge.bridge-nf-call-ip{version}tables={netfilter}")
        for address in ("192.0.2.7", "fd78:b::7"):
            report = product.load(address, requests=200, connections=50)
            assert report["errors"] == 0, report["first_errors"]
            assert_offloaded(product, address)
    machine = product.machine()
    assert machine["late_packets"] < machine["handed_out"], "the guest, not the host, heard the client"
    assert "elements" not in host.run("nft", "list", "table", "bridge", "streamlift")
    assert_nothing_left(product, files)

    product.stop()  # and found again at the next start
    product.start()
    product.wait_ready("192.0.2.7")
    assert product.fetch("192.0.2.7", "1400000.bin") == (product.share / "1400000.bin").read_bytes()
    wait_for(lambda: product.machine()["handed_back"] == 1, seconds=30, what="the transfer is home")


def test_attached_vm(
    bridge: str, share: Path, tmp_path: Path, serve: Serve, deploy_machine: Deploy, connection: libvirt.virConnect
) -> None:
    """A VM without our parts: its operator attaches the channel, the share and its address; later another address."""
    make_content(str(share), (1_400_000, LARGEST))
    product = serve()
    deploy_machine(build("6.12"), mode="bridged", bridge=bridge, address4="192.0.2.7/24", address6=None)
    domain = connection.lookupByName("guest")
    domain.destroy()
    assert attach.detach(connection, "guest").parts == ("channel", "share", "addresses")
    command = ("attach", "guest", "--share", str(share), "--address", "192.0.2.7")
    assert product.command(*command).splitlines()[0] == "changed: channel, share, addresses"  # no restart: it does not run
    domain.create()
    product.wait_ready("192.0.2.7")

    download = Download(product, tmp_path, address="192.0.2.7")
    assert product.command(*command, "--address", "192.0.2.8").splitlines()[0] == "changed: addresses"
    wait_for(lambda: "192.0.2.8" in product.machine()["addresses"], seconds=30, what="the address is known")
    assert product.machine()["connections_out"] == 1
    download.assert_complete()
    assert_offloaded(product, "192.0.2.7")
    undeploy(connection, "guest")  # which still knows whose work the rest of the VM is


class Download:
    """A client that takes its time: the largest file, and then a small one on the same connection."""

    def __init__(self, product: Product, folder: Path, *, address: str = ADDRESS4, rate: str = "16M") -> None:
        self._paths = [folder / f"{number}.bin" for number in (LARGEST, 1_400_000)]
        self._share = product.share
        command = ["curl", "-sSf", "--fail-early", "--max-time", "60", "--limit-rate", rate]
        for path in self._paths:
            command += ["-o", str(path), f"http://{address}/{path.name}"]
        self.process = subprocess.Popen(product.host.client.command(*command), stderr=subprocess.DEVNULL)
        wait_for(lambda: product.machine()["connections_out"], seconds=60, what="the transfer is out")

    def assert_complete(self) -> None:
        """It got every byte."""
        assert self.process.wait() == 0
        for path in self._paths:
            assert path.read_bytes() == (self._share / path.name).read_bytes(), path.name


@pytest.fixture
def product(share: Path, image: Image, serve: Serve, deploy_machine: Deploy) -> Product:
    """The service and a VM, ready."""
    make_content(str(share), (1_400_000, LARGEST))
    product = serve()
    deploy_machine(image)
    product.wait_ready(ADDRESS4)
    return product


def assert_serves(product: Product) -> None:
    """A new transfer works and goes through the host."""
    before = product.machine()["handed_back"]
    assert product.fetch(ADDRESS4, "1400000.bin") == (product.share / "1400000.bin").read_bytes()
    wait_for(lambda: product.machine()["handed_back"] == before + 1, seconds=30, what="the transfer is home")


def test_service_killed_and_started_again(product: Product, tmp_path: Path) -> None:
    files = product.open_files()
    download = Download(product, tmp_path)
    product.kill()
    product.start()
    product.wait_ready(ADDRESS4)
    assert_serves(product)
    assert "1 redirects of an earlier service were removed" in product.log.read_text()
    assert download.process.wait() != 0  # the connection went with the process that had it
    wait_for(lambda: product.counters(ADDRESS4)["open_connections"] == 1, seconds=30, what="the server is rid of the client")
    assert_nothing_left(product, files)


def test_vm_destroyed_while_transfers_are_out(product: Product, tmp_path: Path, connection: libvirt.virConnect) -> None:
    files = product.open_files()
    downloads = [Download(product, tmp_path) for _ in range(3)]
    domain = connection.lookupByName("guest")
    domain.destroy()
    wait_for(lambda: not product.machine(), seconds=30, what="the service sees the VM go")
    assert all(download.process.wait() for download in downloads)  # nobody is left who could answer the next request
    domain.create()
    product.wait_ready(ADDRESS4)
    assert_serves(product)
    wait_for(lambda: not product.redirects(), seconds=70, what="the last packets have passed")
    assert_nothing_left(product, files)


def test_agent_killed_while_a_transfer_is_out(product: Product, tmp_path: Path, connection: libvirt.virConnect) -> None:
    give_shell(connection.lookupByName("guest"))
    product.wait_ready(ADDRESS4)
    files = product.open_files()
    hellos = product.log.read_text().count("answers")
    with open_shell(connection.lookupByName("guest")) as shell:
        download = Download(product, tmp_path, rate="6M")
        shell.write("systemctl kill --signal KILL streamlift-agent\n")
        wait_for(lambda: product.log.read_text().count("answers") > hellos, seconds=60, what="the next agent's hello")
    assert product.machine()["connections_out"] == 1
    download.assert_complete()
    product.wait_ready(ADDRESS4)
    assert_serves(product)
    assert_nothing_left(product, files)
