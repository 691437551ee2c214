# SPDX-License-Identifier: Apache-2.0
"""The audience of the migration tests: the streams of an encoder and of a file that grows, and segments; where nothing moves, and
where the guest does."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pytest

from tests.audience import GROWING, Crowd, feeding, watching
from tests.namespaces.deployment import LIVE_PASSWORD, deployed, wait_for
from tests.namespaces.topology import routed
from tests.namespaces.two_hosts import GUEST, two_hosts

pytestmark = pytest.mark.root


def inside(namespace: str, *argv: str) -> list[str]:
    return ["ip", "netns", "exec", namespace, *argv]


def make_ladders(folder: Path) -> Path:
    """A share with segments."""
    share = folder / "share"
    for ladder in ("phone", "tv"):
        (share / ladder).mkdir(parents=True)
        for number in range(3):
            (share / ladder / f"{number}.m4s").write_bytes(bytes([number]) * 300_000)
    return share


def test_everybody_gets_everything(tmp_path: Path) -> None:
    share = make_ladders(tmp_path)
    with routed() as network, deployed(network, tmp_path, share, live=True) as deployment:
        there = functools.partial(inside, network.client.name), network.guest_address[4]
        with feeding(*there, share, password=LIVE_PASSWORD):
            with watching(*there, share, Crowd(segments=4, lives=3, files=3, pause=0.01)) as audience:
                wait_for(lambda: sum(row["sink_count"] for row in deployment.call("relays")["relays"]) == 6, "all are sinks")
                time.sleep(1)
                found = audience.stop()
            wait_for(lambda: len(deployment.call("relays")["relays"]) == 1, "nobody listens to the file, and it is let go")
    assert found.faults == []
    assert found.gaps("live") == found.gaps("file") == []
    assert all(one["packets"] > 100 for one in found.seen if one["kind"] != "viewer")
    assert all(one["requests"] > 3 for one in found.seen if one["kind"] == "viewer")
    assert (share / "live" / GROWING).stat().st_size > 100_000


def test_a_path_of_no_file(tmp_path: Path) -> None:
    (tmp_path / "share" / "live").mkdir(parents=True)
    (tmp_path / "share" / "secret.ts").write_bytes(b"secret")
    with routed() as network, deployed(network, tmp_path, tmp_path / "share", live=True) as deployment:
        wait_for(lambda: deployment.live is not None and "live at" in deployment.live.log.read_text(), "the live server")
        for path in ("none.ts", "..%2fsecret.ts", "../secret.ts", "%2e%2e/secret.ts"):
            url = f"http://{network.guest_address[4]}:8000/{path}"
            shown = network.client.run("curl", "-s", "--path-as-is", "-w", "%{http_code}", "-m", "5", url)
            assert shown.endswith("404"), (path, shown)


def test_everybody_comes_along(tmp_path: Path) -> None:
    """To another host and back, twice."""
    share = make_ladders(tmp_path)
    (share / "live").mkdir()
    with two_hosts(tmp_path, share) as hosts:
        there = functools.partial(inside, hosts.client.name), GUEST
        with feeding(*there, share, password=LIVE_PASSWORD):
            with watching(*there, share, Crowd(segments=4, lives=3, files=3, rate=500_000)) as audience:
                for _ in range(4):
                    wait_for(lambda: sum(row["sink_count"] for row in hosts.host.call("relays")["relays"]) == 6, "all are sinks")
                    time.sleep(0.5)
                    hosts.migrate()
                wait_for(lambda: sum(row["sink_count"] for row in hosts.host.call("relays")["relays"]) == 6, "all are sinks")
                time.sleep(0.5)
                found = audience.stop()
    assert found.faults == []
    assert found.gaps("file") == []
