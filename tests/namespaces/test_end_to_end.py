# SPDX-License-Identifier: Apache-2.0
"""The main job over three namespaces: real requests, every answer hashed, in every mode and on every kind of network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client import make_content
from tests.namespaces import capture
from tests.namespaces.deployment import ROOT, Deployment, deployed, wait_for
from tests.namespaces.topology import Network, bridged, routed
from tests.open_files import open_files

pytestmark = pytest.mark.root

SIZES = (0, 1, 4096, 65_535, 65_536, 100_000, 288_600, 1_400_000, 10_500_000, 64_000_000)
TOPOLOGIES = {"routed": routed, "bridged": bridged}
REQUESTS = int(os.environ.get("STREAMLIFT_REQUESTS", 20_000))  # fewer where the processor is emulated
HANDOFFS = REQUESTS
CONNECTIONS = 50
OUT_AT_ONCE = min(REQUESTS, 1000)


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    make_content(str(folder), SIZES)
    return folder


def assert_offloaded(deployment: Deployment, *, least: float = 0.99) -> None:
    """Of the transfers above the threshold nearly all went through the host, and all came home."""
    counters = deployment.counters()
    local = {reason: count for reason, count in counters["local"].items() if reason != "too_small"}
    assert counters["failed"] == 0
    assert counters["offloaded"] >= least * (counters["offloaded"] + sum(local.values())), local
    wait_for(lambda: not deployment.call("connections")["connections"], "all connections home")
    machine = deployment.machine()
    assert machine["handed_out"] == machine["handed_back"]


def assert_nothing_left(deployment: Deployment) -> None:
    """No redirect outlives its connection."""
    table = deployment.network.host.run("conntrack", "-L")
    assert "mark=139" not in table.replace("mark=1397489664", "mark=139"), table


@pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("mode", ["nat", "transparent"])
@pytest.mark.parametrize("topology", sorted(TOPOLOGIES))
def test_every_byte_of_many_requests(topology: str, mode: str, family: int, share: Path, tmp_path: Path) -> None:
    with TOPOLOGIES[topology]() as network, deployed(network, tmp_path, share, mode=mode) as deployment:
        report = deployment.load(requests=REQUESTS, connections=CONNECTIONS, family=family)
        assert report["errors"] == 0, report["first_errors"]
        assert_offloaded(deployment)
        assert_nothing_left(deployment)


MANY = """
import socket, sys
from concurrent.futures import ThreadPoolExecutor
host, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
socks = [socket.create_connection((host, 80), timeout=60) for _ in range(count)]
for sock in socks:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
request = f"GET /{size}.bin HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode()
for sock in socks:
    sock.sendall(request)
print("asked", flush=True)
sys.stdin.readline()
def drain(sock):
    data = b""
    while b"\\r\\n\\r\\n" not in data:
        data += sock.recv(1 << 16)
    got = len(data) - data.index(b"\\r\\n\\r\\n") - 4
    while got < size:
        piece = sock.recv(1 << 18)
        if not piece:
            return 0
        got += len(piece)
    sock.sendall(b"HEAD /1.bin HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    return got if sock.recv(12).startswith(b"HTTP/1.1 200") else 0
with ThreadPoolExecutor(16) as pool:
    print(sum(n == size for n in pool.map(drain, socks)), flush=True)
"""


def test_a_thousand_out_at_once_and_all_home_again(share: Path, tmp_path: Path) -> None:
    count, size = OUT_AT_ONCE, 1_400_000
    with routed() as network, deployed(network, tmp_path, share) as deployment:
        idle = deployment.status()["memory_bytes"]
        argv = ["ip", "netns", "exec", network.client.name, sys.executable, "-c", MANY, "10.77.1.2", str(count), str(size)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as client:
            assert client.stdin is not None and client.stdout is not None
            assert client.stdout.readline() == "asked\n"
            wait_for(lambda: deployment.machine()["connections_out"] == count, f"{count} out", patience=60)
            each = (deployment.status()["memory_bytes"] - idle) / count
            client.stdin.write("go\n")
            client.stdin.flush()
            assert int(client.stdout.readline()) == count
        print(f"{each / 1024:.1f} KiB of the service's memory for each connection")
        assert each < 32768
        assert_offloaded(deployment)


def _resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def _footprint(deployment: Deployment) -> list[tuple[int, int]]:
    """(open files, KiB in memory) of service and agent, with nothing out."""
    wait_for(lambda: not deployment.call("connections")["connections"], "all home")
    assert deployment.agent.popen is not None
    pids = deployment.status()["pid"], deployment.agent.popen.pid
    return [(open_files(pid), _resident_kib(pid)) for pid in pids]


def _hand_out(deployment: Deployment, handoffs: int) -> None:
    goal = deployment.machine()["handed_out"] + handoffs
    for seed in range(100):
        deployment.load(requests=10_000, connections=20, seed=seed)
        if deployment.machine()["handed_out"] >= goal:
            return
    raise AssertionError(f"{goal} handoffs were not reached")


def test_handoffs_leave_memory_and_descriptors_where_they_were(network_small: tuple[Network, Deployment]) -> None:
    _, deployment = network_small
    _hand_out(deployment, HANDOFFS // 2)  # what is remembered, and bounded, is full then
    before = _footprint(deployment)
    _hand_out(deployment, HANDOFFS)
    for (files, memory), (files_before, memory_before) in zip(_footprint(deployment), before, strict=True):
        assert files <= files_before + 1, "one may be the connection that asked"
        assert memory <= memory_before * 1.05 + 1024


@pytest.fixture
def network_small(tmp_path: Path) -> Iterator[tuple[Network, Deployment]]:
    folder = tmp_path / "small"
    make_content(str(folder), (66_000, 70_000))
    with routed() as network, deployed(network, tmp_path, folder) as deployment:
        yield network, deployment


def test_hand_back_by_the_operator(share: Path, tmp_path: Path) -> None:
    """The operator takes a transfer home in the middle of a file; the client sees the rest come from the guest."""
    with routed() as network, deployed(network, tmp_path, share) as deployment:
        url = "http://10.77.1.2/64000000.bin"
        argv = ["ip", "netns", "exec", network.client.name, "curl", "-sf", "--limit-rate", "20M", "-o", "-", url]
        with subprocess.Popen([*argv], stdout=subprocess.PIPE) as curl:
            wait_for(lambda: deployment.call("connections")["connections"], "the transfer")
            assert deployment.call("hand_back", machine="guest")["handed_back"] == 1
            assert curl.stdout is not None
            assert curl.stdout.read() == (share / "64000000.bin").read_bytes()
        counters = json.loads(json.dumps(deployment.counters()))
        assert counters["local"].get("handed_back_by_operator") == 1, counters


HALF_CLOSING = """
import socket, sys
size, connections = 1_400_000, int(sys.argv[1])
for _ in range(connections):
    with socket.create_connection(("10.77.1.2", 80), timeout=20) as sock:
        sock.sendall(f"GET /{size}.bin HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode() * 2)
        data = sock.recv(1 << 16)
        sock.shutdown(socket.SHUT_WR)
        while piece := sock.recv(1 << 18):
            data += piece
    heads = data.count(b"HTTP/1.1 200 OK\\r\\n")
    print(heads, sum(len(one.split(b"\\r\\n\\r\\n", 1)[1]) for one in data.split(b"HTTP/1.1 200 OK\\r\\n")[1:]))
"""


def test_client_that_closes_its_side(share: Path, tmp_path: Path) -> None:
    """It asks twice and says that it will say no more. The host acknowledges that; whoever answers the second request must
    know it, or the client sees an acknowledgement go back."""
    count = 40
    with routed() as network, deployed(network, tmp_path, share) as deployment:
        network.keep_order()
        network.shape("1gbit")  # so that the FIN comes in the middle of the first answer
        file = tmp_path / "link.pcap"
        with capture.captured(network.client, file):
            answers = network.client.run(sys.executable, "-c", HALF_CLOSING, str(count))
        assert answers.splitlines() == ["2 2800000"] * count
        first_only = "tcp_repair" in (deployment.status()["backend"]["name"], deployment.machine()["backend"])
        counters = deployment.counters()
        assert counters["offloaded"] >= count * (0.9 if first_only else 1.9), counters
        assert (counters["local"].get("half_closed", 0) >= count * 0.9) is first_only, counters
        assert capture.judge(capture.read(file), {("10.77.1.2", 80)}) == []
