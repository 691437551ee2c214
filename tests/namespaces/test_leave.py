# SPDX-License-Identifier: Apache-2.0
"""A guest leaves its host and comes back, with transfers under way: what is out comes home, applications let go of the share, it is
unmounted and mounted again, and the same connections go on."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client import make_content
from tests.namespaces.deployment import Deployment, deployed, wait_for
from tests.namespaces.topology import routed

pytestmark = pytest.mark.root

SIZES = (1000, 288_600, 1_400_000, 64_000_000)


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    make_content(str(folder), SIZES)
    return folder


@pytest.fixture
def deployment(tmp_path: Path, share: Path) -> Iterator[Deployment]:
    with routed() as network, deployed(network, tmp_path, share, mount=True) as made:
        yield made


def mounted_now(deployment: Deployment) -> bool:
    """Whether the guest has the share."""
    assert deployment.agent.popen is not None
    return f" {deployment.folder}/mnt " in Path(f"/proc/{deployment.agent.popen.pid}/mounts").read_text()


@contextlib.contextmanager
def downloads(
    deployment: Deployment, count: int, *, rate: str = "8M", size: int = 64_000_000
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many clients in the middle of a file."""
    url = f"http://10.77.1.2/{size}.bin"
    curls = [
        deployment.network.client.popen(["sh", "-c", f"curl -sf --limit-rate {rate} {url} | sha256sum"], stdout=subprocess.PIPE)
        for _ in range(count)
    ]
    try:
        wait_for(lambda: deployment.machine()["connections_out"] == count, "all are out")
        yield curls
    finally:
        for curl in curls:
            curl.kill()
            curl.wait()


def all_complete(deployment: Deployment, curls: list[subprocess.Popen[bytes]], size: int = 64_000_000) -> bool:
    """Every byte came to each."""
    digest = hashlib.sha256((deployment.share / f"{size}.bin").read_bytes()).hexdigest()
    return all(curl.communicate(timeout=60)[0].decode().split()[0] == digest for curl in curls)


def test_transfers_wait_and_go_on_where_they_stopped(deployment: Deployment) -> None:
    with downloads(deployment, 5) as curls:
        left = deployment.call("leave", machine="guest")
        print(left)
        assert (left["connections"], left["home"], left["finished"], left["reset"]) == (5, 5, 0, 0)
        assert not mounted_now(deployment)
        machine = deployment.machine()
        assert (machine["presence"], machine["connections_out"]) == ("away", 0)
        came = deployment.call("return", machine="guest")
        assert came["presence"] == "here" and mounted_now(deployment)
        wait_for(lambda: deployment.machine()["connections_out"] == 5, "all are out again")
        assert all_complete(deployment, curls)
    counters = deployment.counters()
    assert (counters["offloaded"], counters["failed"], counters["local"]) == (5, 0, {})
