# SPDX-License-Identifier: Apache-2.0
"""A client that goes through its segments is answered by the host; whatever else it asks, or does, comes home."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor_svc.control import ControlError
from tests.namespaces.deployment import Deployment, deployed, wait_for
from tests.namespaces.player import SEGMENTS, SIZE, Player, make_film, player
from tests.namespaces.test_carry import agent_counters
from tests.namespaces.test_pass_on import arrive, leave
from tests.namespaces.topology import routed
from tests.namespaces.two_hosts import GUEST, TwoHosts

pytestmark = pytest.mark.root

LARGE = 8_000_000
"""Bytes of a segment in whose middle something happens."""


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    make_film(folder / "film")
    make_film(folder / "large", segments=6, size=LARGE)
    return folder


@pytest.fixture
def deployment(tmp_path: Path, share: Path, request: pytest.FixtureRequest) -> Iterator[Deployment]:
    with routed() as network, deployed(network, tmp_path, share, extra=getattr(request, "param", "")) as made:
        yield made


@pytest.fixture
def watching(deployment: Deployment, share: Path) -> Iterator[Player]:
    with player(deployment.network.client, GUEST, share / "film") as found:
        yield found


@pytest.fixture
def large(deployment: Deployment, share: Path) -> Iterator[Player]:
    with player(deployment.network.client, GUEST, share / "large") as found:
        yield found


def is_out(deployment: Deployment) -> None:
    """One connection is at the host, and its client may ask."""
    wait_for(lambda: deployment.machine()["connections_out"] == 1, "it is out")


def is_home(deployment: Deployment) -> None:
    wait_for(lambda: not deployment.machine()["connections_out"], "it is home")
    machine = deployment.machine()
    assert (machine["handed_back"], machine["failed"] + machine["ended"]) == (machine["handed_out"], 0)


def test_the_guest_is_asked_for_one_segment_in_33(deployment: Deployment, watching: Player) -> None:
    """The first, and the one after those that were anticipated."""
    watching.fetch(*range(1, SEGMENTS + 1))
    is_home(deployment)
    machine, counters = deployment.machine(), deployment.counters()
    assert (machine["handed_out"], machine["answered"]) == (2, SEGMENTS - 2)
    assert (counters["offloaded"], counters["bytes"]) == (SEGMENTS, SEGMENTS * SIZE)
    assert (counters["failed"], counters["local"]) == (0, {})


def test_whatever_else_it_asks_is_answered_by_the_guest(deployment: Deployment, watching: Player) -> None:
    watching.fetch(1, 2, 3, 5)  # one may be left out
    is_out(deployment)
    watching.fetch(4, 20, 21, 22, 22)  # after two in a row it is believed again
    watching.sock.sendall(b"HEAD /film/7.m4s HTTP/1.1\r\nHost: x\r\n\r\n")
    assert watching.begin() == SIZE
    watching.sock.sendall(b"GET /film/99.m4s HTTP/1.1\r\nHost: x\r\n\r\n")
    with pytest.raises(AssertionError, match="404"):
        watching.begin()
    is_home(deployment)
    assert deployment.machine()["answered"] == 4


def test_requests_that_the_guest_has_read_already(deployment: Deployment, watching: Player) -> None:
    """They are its own, and come before anything that the client says later."""
    watching.ask(1, 2, 3, 4)
    for number in (1, 2, 3):
        watching.check(number)
    watching.ask(5, 1)
    for number in (4, 5, 1):
        watching.check(number)
    is_home(deployment)


def test_a_client_that_does_not_wait(deployment: Deployment, large: Player) -> None:
    """Its next requests are at the host before the answer is sent."""
    large.fetch(1)
    large.ask(2)
    assert large.begin() == LARGE
    begun = large.take(1 << 20)
    is_out(deployment)
    large.ask(3, 4, 6, 2)
    large.take(LARGE - len(begun))
    for number in (3, 4, 6, 2):
        large.check(number)
    is_home(deployment)
    assert deployment.machine()["answered"] == 4


def test_a_request_that_comes_in_pieces(deployment: Deployment, watching: Player) -> None:
    watching.fetch(1, 2)
    for number in (3, 4):
        words = watching.request(number)
        for at in range(0, len(words), 20):
            watching.sock.sendall(words[at : at + 20])
            time.sleep(0.01)
        watching.check(number)
    watching.sock.sendall(watching.request(5)[:-4] + b"\r\nX-Other: 1\r\n\r\n")  # until its last header it may be the one
    watching.check(5)
    assert deployment.machine()["answered"] == 3


def test_a_file_that_was_changed(deployment: Deployment, share: Path, tmp_path: Path) -> None:
    """It is what it is now, and not what it was."""
    film = share / tmp_path.name
    make_film(film, segments=5)
    with player(deployment.network.client, GUEST, film) as watching:
        watching.fetch(1, 2, 3)
        (film / "4.m4s").write_bytes(b"another" * 20_000)
        (film / "5.m4s").unlink()
        watching.fetch(4)
        watching.ask(5)
        with pytest.raises(AssertionError, match="404"):
            watching.begin()
    assert deployment.machine()["answered"] == 2


def test_the_client_closes(deployment: Deployment, watching: Player) -> None:
    watching.fetch(1, 2, 3)
    is_out(deployment)
    watching.sock.close()
    wait_for(lambda: not deployment.machine()["connections_out"], "it is over")
    wait_for(lambda: deployment.counters()["open_connections"] == 1, "the server knows")
    assert deployment.counters()["offloaded"] == 3


@pytest.mark.parametrize("deployment", ["[serve]\nnext_request_seconds = 0.2"], indirect=True)
def test_a_client_that_pauses(deployment: Deployment, watching: Player) -> None:
    """Its connection is home when it goes on."""
    watching.fetch(1, 2, 3)
    is_home(deployment)
    watching.fetch(4, 5)
    assert deployment.machine()["answered"] == 3


@pytest.mark.parametrize("deployment", ["[serve]\nnext_request_seconds = 0"], indirect=True)
def test_a_host_that_does_not_wait(deployment: Deployment, watching: Player) -> None:
    watching.fetch(1, 2, 3)
    is_home(deployment)
    machine = deployment.machine()
    assert (machine["handed_out"], machine["answered"]) == (3, 0)


@pytest.mark.parametrize("deployment", ["[policy]\nmax_connections_per_vm = 1"], indirect=True)
def test_those_that_wait_keep_nobody_from_going_out(deployment: Deployment, watching: Player) -> None:
    watching.fetch(1, 2, 3)
    is_home(deployment)
    assert deployment.machine()["answered"] == 0


def test_the_server_stops(deployment: Deployment, watching: Player) -> None:
    """It need not wait for clients that only might ask."""
    watching.fetch(1, 2, 3)
    is_out(deployment)
    server = deployment.server.popen
    assert server is not None
    server.terminate()
    assert server.wait(10) == 0
    assert watching.closed()


def test_the_server_dies(deployment: Deployment, watching: Player) -> None:
    """Whatever it had said: its connections end with it."""
    watching.fetch(1, 2, 3)
    is_out(deployment)
    deployment.server.kill()
    assert watching.closed()
    wait_for(lambda: not deployment.machine()["connections_out"], "it is over")


def test_the_agent_is_killed(deployment: Deployment, watching: Player) -> None:
    """The host goes on, and its next life takes the connection back."""
    watching.fetch(1, 2, 3)
    is_out(deployment)
    deployment.agent.kill()
    watching.fetch(4, 5)
    deployment.agent.start()
    wait_for(lambda: deployment.machine()["channel"] == "hello", "its next life")
    watching.fetch(6, 7, 1)
    is_home(deployment)
    assert deployment.machine()["answered"] == 6
    assert deployment.counters()["offloaded"] == 8


def test_the_service_is_killed(deployment: Deployment, watching: Player) -> None:
    watching.fetch(1, 2, 3)
    is_out(deployment)
    os.kill(deployment.status()["pid"], signal.SIGKILL)
    with pytest.raises(ConnectionResetError):
        watching.fetch(4)


def test_called_home_in_the_middle_of_an_answer(deployment: Deployment, large: Player) -> None:
    """The guest sends the rest of what the host has begun."""
    large.fetch(1, 2, 3)
    large.ask(4)
    assert large.begin() == LARGE
    begun = large.take(1 << 20)
    assert deployment.call("hand_back", machine="guest")["handed_back"] == 1
    assert begun + large.take(LARGE - len(begun)) == (deployment.share / "large" / "4.m4s").read_bytes()
    large.fetch(5, 6)
    is_home(deployment)
    counters = deployment.counters()
    assert (counters["offloaded"], counters["bytes"], counters["failed"]) == (6, 6 * LARGE, 0)


def test_called_home_while_it_waits(deployment: Deployment, watching: Player) -> None:
    watching.fetch(1, 2, 3)
    is_out(deployment)
    assert deployment.call("hand_back", machine="guest")["handed_back"] == 1
    is_home(deployment)
    watching.fetch(4, 5)
    assert (deployment.machine()["answered"], deployment.counters()["failed"]) == (3, 0)


# The guest moves.


def watches(hosts: TwoHosts, film: Path) -> contextlib.AbstractContextManager[Player]:
    return player(hosts.client, GUEST, film)


def test_a_client_whose_guest_moves_need_not_ask_it(hosts: TwoHosts, share: Path) -> None:
    """One in the middle of an answer, one between two: both go on at the next host, which has what was anticipated."""
    with watches(hosts, share / "film") as waiting, watches(hosts, share / "large") as busy:
        for one in (waiting, busy):
            one.fetch(1, 2, 3)
        busy.ask(4)
        begun = busy.take(busy.begin() // 4)
        before = agent_counters(hosts)["handed_out"]
        for number in (4, 6):
            arrive(hosts, leave(hosts, 2))
            waiting.fetch(number, number + 1)
        busy.take(LARGE - len(begun))
        busy.fetch(5)
        assert hosts.host.machine()["connections_out"] == 2
        assert agent_counters(hosts)["handed_out"] == before
        waiting.fetch(1)
        busy.fetch(1)
    wait_for(lambda: not hosts.host.machine()["connections_out"], "they are home")
    counters = hosts.counters()
    assert (counters["offloaded"], counters["failed"], counters["local"]) == (8 + 6, 0, {})


def test_the_guest_stays_after_all(hosts: TwoHosts, share: Path) -> None:
    with watches(hosts, share / "film") as waiting:
        waiting.fetch(1, 2, 3)
        for number in (4, 6):
            leave(hosts, 1)
            waiting.ask(number)
            hosts.host.call("return")
            waiting.check(number)
            waiting.fetch(number + 1)
        assert hosts.host.machine()["answered"] == 6


def test_everything_comes_home_before_the_guest_moves(hosts: TwoHosts, share: Path) -> None:
    """The rest of an answer is sent by the next host, as if the guest had begun it."""
    with watches(hosts, share / "large") as busy:
        busy.fetch(1, 2, 3)
        busy.ask(4)
        begun = busy.take(busy.begin() // 4)
        assert hosts.migrate()["home"] == 1
        assert begun + busy.take(LARGE - len(begun)) == (share / "large" / "4.m4s").read_bytes()
        busy.fetch(5, 6)
    counters = hosts.counters()
    assert (counters["offloaded"], counters["bytes"], counters["failed"]) == (6, 6 * LARGE, 0)


def test_the_next_host_does_not_believe_everything(hosts: TwoHosts, share: Path) -> None:
    with watches(hosts, share / "film") as waiting:
        waiting.fetch(1, 2, 3)
        rows = leave(hosts, 1)
        told = rows[0]["anticipation"]
        for wrong in (5, {}, {**told, "answered": [99]}, {**told, "answered": [1, 0]}, {**told, "told": [{}]}, None):
            with pytest.raises(ControlError, match="what guest brings"):
                hosts.other.call("bring", rows=[{**rows[0], "anticipation": wrong}], first=True)
        arrive(hosts, rows)
        waiting.fetch(4, 5)
