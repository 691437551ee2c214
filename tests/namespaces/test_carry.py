# SPDX-License-Identifier: Apache-2.0
"""Files that are under way when their guest moves: they travel frozen, and the next host is given them as they came home."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest

from guest_agent.carry import CARRY_LIMIT
from tests.namespaces.deployment import wait_for
from tests.namespaces.test_move import download, is_complete, is_here, out
from tests.namespaces.two_hosts import TwoHosts

pytestmark = pytest.mark.root


def agent_counters(hosts: TwoHosts) -> dict[str, int]:
    """The agent's own."""
    words = "import json; from guest_agent import offload; print(json.dumps(offload.status()['agent']['counters']))"
    environment = {**os.environ, "STREAMLIFT_AGENT": str(hosts.folder / "agent.sock")}
    with hosts.guest.popen(["python3", "-c", words], stdout=subprocess.PIPE, env=environment) as asking:
        counters: dict[str, int] = json.loads(asking.communicate(timeout=20)[0])
    return counters


def leave(hosts: TwoHosts, count: int, *, before: int = 0) -> None:
    """As before the VM is stopped: so many are carried."""
    out(hosts, count)
    hosts.host.call("leave", only="share")
    assert hosts.host.call("leave")["home"] == count
    wait_for(lambda: agent_counters(hosts).get("carried") == before + count, "they are carried")


def arrive(hosts: TwoHosts) -> None:
    hosts.move()
    wait_for(lambda: is_here(hosts), "the guest works with its host")


def test_the_application_is_not_asked(hosts: TwoHosts) -> None:
    curls = [download(hosts), download(hosts)]
    leave(hosts, 2)
    arrive(hosts)
    out(hosts, 2)
    told = agent_counters(hosts)
    assert (told["handed_out"], told["handed_back"], told["carried"]) == (4, 2, 2)
    assert not [name for name in told if name.startswith(("local", "failed"))]
    assert all(is_complete(hosts, curl) for curl in curls)


def test_the_vm_stays_after_all(hosts: TwoHosts) -> None:
    """It is handed to the same host again, however often."""
    curl = download(hosts)
    for times in range(3):
        leave(hosts, 1, before=times)
        hosts.host.call("return")
        out(hosts, 1)
    assert is_complete(hosts, curl)


def test_the_agent_is_killed_meanwhile(hosts: TwoHosts) -> None:
    """The application gives its socket to the next life of the agent, and knows how much was sent."""
    curl = download(hosts)
    leave(hosts, 1)
    hosts.agent.kill()
    hosts.agent.start()
    wait_for(lambda: is_here(hosts), "the guest works with its host")
    assert is_complete(hosts, curl)
    assert hosts.counters()["failed"] == 0


def test_the_application_is_killed_meanwhile(hosts: TwoHosts) -> None:
    """Its clients hear of it, as of any dead server."""
    curl = download(hosts)
    leave(hosts, 1)
    server = next(process for process in hosts.processes if "guest_agent.examples.media_server" in process.argv)
    assert server.popen is not None
    os.kill(server.popen.pid, signal.SIGKILL)
    assert not is_complete(hosts, curl)
    hosts.host.call("return")
    wait_for(lambda: is_here(hosts), "the guest works with its host")
    assert hosts.host.machine()["connections_out"] == 0


def test_a_vm_that_does_not_move(hosts: TwoHosts) -> None:
    """It is put down, and waits for the share with its application."""
    curl = download(hosts)
    leave(hosts, 1)
    wait_for(lambda: agent_counters(hosts).get("local_draining") == 1, "it is put down", patience=CARRY_LIMIT + 10)
    arrive(hosts)
    out(hosts, 1)
    assert is_complete(hosts, curl)


@pytest.mark.parametrize("state", ["restored", "redirected"])
def test_the_next_host_does_not_take_it(hosts: TwoHosts, state: str) -> None:
    """The application hears how far it is, and goes on by itself."""
    hosts.other.service.stop()
    hosts.other.service.start(STREAMLIFT_FAULT=f"host:{state}=raise@1")
    curl = download(hosts)
    leave(hosts, 1)
    arrive(hosts)
    assert is_complete(hosts, curl)
    assert sum(hosts.host.machine()["refused"].values()) == 1
    assert hosts.counters()["failed"] == 0
