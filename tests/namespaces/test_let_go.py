# SPDX-License-Identifier: Apache-2.0
"""A guest whose share is unmounted while the host goes on: what is out stays out, and what is asked for meanwhile comes from the
host. Then it leaves for good."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client import make_content
from tests.namespaces.deployment import ROOT, Deployment, deployed, wait_for
from tests.namespaces.download import Download
from tests.namespaces.test_leave import all_complete, download, downloads, inside, mounted_now
from tests.namespaces.topology import routed

pytestmark = pytest.mark.root

SIZES = (1000, 1_400_000, 64_000_000)


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    make_content(str(folder), SIZES)
    (folder / "empty.bin").write_bytes(b"")
    (folder / "link.bin").symlink_to("1000.bin")
    return folder


@pytest.fixture
def deployment(tmp_path: Path, share: Path, request: pytest.FixtureRequest) -> Iterator[Deployment]:
    extra = getattr(request, "param", "")
    with routed() as network, deployed(network, tmp_path, share, mount=True, extra=extra) as made:
        yield made


def let_go(deployment: Deployment) -> None:
    """The share is unmounted, and nothing else."""
    told = deployment.call("leave", machine="guest", only="share")
    assert told["presence"] == "loose" and not mounted_now(deployment)


def fetch(deployment: Deployment, name: str) -> tuple[int, bytes]:
    """Status and body, within seconds."""
    words = ["curl", "-s", "-m", "10", "-w", "%{http_code}", f"http://10.77.1.2/{name}"]
    told = subprocess.run(["ip", "netns", "exec", deployment.network.client.name, *words], capture_output=True, check=True).stdout
    return int(told[-3:]), told[:-3]


def test_the_host_serves_what_the_guest_cannot_open(deployment: Deployment) -> None:
    """Small files too; and what is not there is not there."""
    headers = ["curl", "-sI", "http://10.77.1.2/1400000.bin"]
    before = deployment.network.client.run(*headers)
    with downloads(deployment, 3) as curls:
        let_go(deployment)
        assert deployment.machine()["connections_out"] == 3
        for name in ("1000.bin", "1400000.bin"):
            assert fetch(deployment, name) == (200, (deployment.share / name).read_bytes())
        assert fetch(deployment, "empty.bin") == (200, b"")
        assert [fetch(deployment, name)[0] for name in ("missing.bin", "../secret", "1000.bin/x", "")] == [404] * 4
        assert _same(before, deployment.network.client.run(*headers))
        assert not mounted_now(deployment)
        left = deployment.call("leave", machine="guest")
        assert (left["presence"], left["home"], left["reset"]) == ("away", 3, 0)
        deployment.call("return", machine="guest")
        assert all_complete(deployment, curls)
    counters = deployment.counters()
    assert (counters["offloaded"], counters["failed"], counters["local"]) == (5, 0, {"too_small": 1})  # of nothing there is nothing


def _same(*answers: str) -> bool:
    """Length, time and ETag of a file are the same, whoever looked at it."""
    told = [{line for line in one.splitlines() if line.startswith(("Content-Length", "Last-Modified", "ETag"))} for one in answers]
    return len(told[0]) == 3 and told[0] == told[1]


def test_what_the_host_cannot_tell_waits(deployment: Deployment) -> None:
    """A link that only the guest may follow."""
    let_go(deployment)
    curl = deployment.network.client.popen(["curl", "-sf", "http://10.77.1.2/link.bin"], stdout=subprocess.PIPE)
    time.sleep(0.3)
    assert curl.poll() is None
    deployment.call("return", machine="guest")
    assert curl.communicate(timeout=20)[0] == (deployment.share / "1000.bin").read_bytes()


@pytest.mark.parametrize("deployment", ["[policy]\nmax_connections_per_vm = 1\n"], indirect=True)
def test_a_host_that_refuses(deployment: Deployment) -> None:
    """The request waits for the share, through the drain too."""
    with downloads(deployment, 1) as curls:
        let_go(deployment)
        waiting = download(deployment, 1_400_000)
        wait_for(lambda: deployment.machine()["refused"].get("table_full"), "the host has refused")
        time.sleep(0.2)
        assert not waiting.over and deployment.machine()["refused"]["table_full"] == 1
        assert deployment.call("leave", machine="guest")["home"] == 1
        deployment.call("return", machine="guest")
        assert all_complete(deployment, [waiting], 1_400_000) and all_complete(deployment, curls)


BLOCKING = """
import os, socket, sys
from guest_agent import offload
listener = socket.create_server(("", 9000))
print("ready", flush=True)
client = listener.accept()[0]
with open(sys.argv[1], "rb") as file, client:
    transfer = offload.sendfile(client, file)
print(transfer.sent, transfer.path, flush=True)
"""


def test_a_blocking_application_gets_its_transfer_back(deployment: Deployment) -> None:
    """It cannot be asked to let go of the file while it waits for the host; when the share is back it goes on."""
    argv = [*inside(deployment), sys.executable, "-c", BLOCKING, f"{deployment.folder}/mnt/64000000.bin"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STREAMLIFT_AGENT": str(deployment.folder / "agent.sock")}
    with deployment.network.guest.popen(argv, stdout=subprocess.PIPE, env=environment, cwd=ROOT) as server:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        curl = Download(deployment.network.client, "http://10.77.1.2:9000/", "--http0.9")
        wait_for(lambda: deployment.machine()["connections_out"] == 1, "it is out")
        let_go(deployment)
        assert deployment.machine()["connections_out"] == 0
        deployment.call("return", machine="guest")
        assert all_complete(deployment, [curl])
        assert server.stdout.readline() == b"64000000 offloaded\n"


def test_whoever_asked_for_it_dies(deployment: Deployment) -> None:
    with downloads(deployment, 1) as curls, subprocess.Popen(["sleep", "60"]) as asking:
        deployment.call("leave", machine="guest", only="share", process=asking.pid)
        assert not mounted_now(deployment)
        asking.kill()
        wait_for(lambda: deployment.machine()["presence"] == "here", "it is here again")
        assert mounted_now(deployment)
        assert deployment.machine()["connections_out"] == 1
        assert all_complete(deployment, curls)


def test_the_service_dies_meanwhile(deployment: Deployment) -> None:
    """The next one knows nothing of it, and the guest comes back."""
    let_go(deployment)
    deployment.service.kill()
    deployment.service.start()
    wait_for(lambda: mounted_now(deployment), "the share is mounted")
    deployment.wait_ready()
    assert fetch(deployment, "1400000.bin")[0] == 200
