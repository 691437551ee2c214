# SPDX-License-Identifier: Apache-2.0
"""Files that are under way when their guest moves go from host to host: the guest's sockets stay where they are."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from hypervisor_svc.control import ControlError
from tests.namespaces.deployment import wait_for
from tests.namespaces.download import Download
from tests.namespaces.test_carry import agent_counters
from tests.namespaces.test_move import download, encoder, is_complete, is_here, listeners, out
from tests.namespaces.two_hosts import GUEST, SIZE, TwoHosts

pytestmark = pytest.mark.root


def leave(hosts: TwoHosts, count: int) -> list[dict[str, Any]]:
    """Until the VM would be stopped; so many are passed on."""
    out(hosts, count)
    if hosts.host.machine()["presence"] != "loose":
        hosts.host.call("leave", only="share")
    left = hosts.host.call("leave", pass_on=True)
    assert (left["connections"], left["passed"], left["home"]) == (count, count, 0)
    rows: list[dict[str, Any]] = left["rows"]
    assert len(rows) == count
    return rows


def arrive(hosts: TwoHosts, rows: list[dict[str, Any]], *, meet: bool = True) -> None:
    assert hosts.other.call("bring", rows=[], first=True)["kept"] == 0
    for number, row in enumerate(rows):  # as many requests as it takes
        assert hosts.other.call("bring", rows=[row])["kept"] == number + 1
    hosts.move()
    if meet:
        hosts.host.call("meet", seconds=15)


def restart_agent(hosts: TwoHosts) -> None:
    """Its next life has met the host."""
    log = hosts.host.service.log
    hellos = log.read_text().count("answers")
    hosts.agent.kill()
    hosts.agent.start()
    wait_for(lambda: log.read_text().count("answers") > hellos, "its next life has met the host")


def test_the_guest_is_not_asked(hosts: TwoHosts) -> None:
    """There and back: they go out once and come home once."""
    curls = [download(hosts), download(hosts)]
    for _ in range(3):
        arrive(hosts, leave(hosts, 2))
    out(hosts, 2)
    assert all(is_complete(hosts, curl) for curl in curls)
    wait_for(lambda: hosts.host.machine()["connections_out"] == 0, "they are home")
    told = agent_counters(hosts)
    assert (told["handed_out"], told["handed_back"], told.get("carried", 0)) == (2, 2, 0)
    assert not [name for name in told if name.startswith(("local", "failed"))]
    assert hosts.counters()["offloaded"] == 2


def test_it_comes_back_with_nothing_under_way(hosts: TwoHosts) -> None:
    """What it once passed on from here is over, and nothing that it offers is parked any more."""
    curl = download(hosts)
    arrive(hosts, leave(hosts, 1))
    assert is_complete(hosts, curl)
    wait_for(lambda: hosts.host.machine()["connections_out"] == 0, "it is home")
    arrive(hosts, leave(hosts, 0))
    curl = download(hosts)
    out(hosts, 1)
    assert is_complete(hosts, curl)
    assert hosts.counters()["offloaded"] == 2


def test_the_vm_stays_after_all(hosts: TwoHosts) -> None:
    curl = download(hosts)
    for _ in range(3):
        rows = leave(hosts, 1)
        hosts.other.call("bring", rows=rows, first=True)
        hosts.other.call("bring", rows=[], first=True)
        hosts.host.call("return")
        out(hosts, 1)
    assert is_complete(hosts, curl)
    assert agent_counters(hosts)["handed_out"] == 1


def test_a_live_stream_that_begins_meanwhile(hosts: TwoHosts) -> None:
    """It is no file: the host that is left refuses it, and the guest relays it itself until it works with the next. Only an agent
    that was restarted asks, and does not know that its VM leaves."""
    curl = download(hosts)
    rows = leave(hosts, 1)
    restart_agent(hosts)
    with encoder(hosts, "/radio", "audio/mpeg") as source:
        wait_for(lambda: hosts.host.machine()["refused"].get("draining"), "it is refused")
        readers = listeners(hosts, "/radio", 2)
        body = os.urandom(100_000)
        source.sendall(body[:50_000])
        wait_for(lambda: all(bytes(reader.data) == body[:50_000] for reader in readers), "its listeners hear it")
        arrive(hosts, rows)
        source.sendall(body[50_000:])
        source.shutdown(socket.SHUT_WR)
        for reader in readers:
            reader.join(20)
    assert all(bytes(reader.data) == body for reader in readers)
    assert is_complete(hosts, curl)
    assert "Traceback" not in hosts.hosts["a"].service.log.read_text()


def test_the_next_host_cannot_be_told(hosts: TwoHosts) -> None:
    """They come home after all, and are carried."""
    curl = download(hosts)
    leave(hosts, 1)
    assert hosts.host.call("leave")["home"] == 1
    hosts.move()
    hosts.host.call("meet", seconds=15)
    out(hosts, 1)
    assert agent_counters(hosts)["carried"] == 1
    assert is_complete(hosts, curl)


def test_the_next_host_cannot_take_it(hosts: TwoHosts) -> None:
    """The guest has it back, and goes on."""
    curl = download(hosts)
    rows = leave(hosts, 1)
    rows[0]["request"]["path"] = "another.bin"
    arrive(hosts, rows)
    assert is_complete(hosts, curl)
    assert hosts.counters()["failed"] == 0


def test_the_next_host_does_not_believe_everything(hosts: TwoHosts) -> None:
    curl = download(hosts)
    rows = leave(hosts, 1)
    for wrong in ({**rows[0], "sent_before": -1}, {**rows[0], "body": "?"}, {"ready": True}, 5):
        with pytest.raises(ControlError, match="what guest brings"):
            hosts.other.call("bring", rows=[wrong], first=True)
    arrive(hosts, rows)
    assert is_complete(hosts, curl)


def test_the_agent_is_killed_meanwhile(hosts: TwoHosts) -> None:
    """The application asks the next one, which asks the next host."""
    curl = download(hosts)
    rows = leave(hosts, 1)
    restart_agent(hosts)
    arrive(hosts, rows)
    assert is_complete(hosts, curl)


def test_the_agent_is_killed_while_it_leaves(hosts: TwoHosts) -> None:
    """The VM stays; its next life has all of them."""
    curls = [download(hosts), download(hosts)]
    out(hosts, 2)
    hosts.host.call("leave", only="share")
    assert hosts.agent.popen is not None
    os.kill(hosts.agent.popen.pid, signal.SIGSTOP)
    leave(hosts, 2)
    os.kill(hosts.agent.popen.pid, signal.SIGKILL)
    hosts.agent.popen.wait()
    hosts.agent.start()
    wait_for(lambda: hosts.host.machine()["channel"] == "hello", "its next life has met the host")
    hosts.host.call("return")
    assert all(is_complete(hosts, curl) for curl in curls)


def test_the_channel_is_cut_meanwhile(hosts: TwoHosts) -> None:
    """The agent asks for what it knows to be passed on; the VM stays."""
    curl = download(hosts)
    leave(hosts, 1)
    hosts.cut_for_a_moment()
    hosts.host.call("return")
    wait_for(lambda: is_here(hosts), "the guest works with its host")
    assert is_complete(hosts, curl)


def parked(hosts: TwoHosts) -> Download:
    """Somebody asks for a file between the last word to the next host and the VM's stop."""
    curl = download(hosts)
    wait_for(lambda: "offered" in [one["state"] for one in hosts.host.call("connections")["connections"]], "it is parked")
    return curl


@pytest.mark.parametrize("told", [True, False])
def test_what_is_asked_for_in_the_last_moment(hosts: TwoHosts, told: bool) -> None:
    """The next host has it from the last, or from the guest that asks it, too."""
    curls = [download(hosts)]
    rows = leave(hosts, 1)
    curls.append(parked(hosts))
    more = hosts.host.call("more")["rows"]
    assert len(more) == 1 and hosts.host.call("more")["rows"] == []
    arrive(hosts, rows + more if told else rows)
    assert all(is_complete(hosts, curl) for curl in curls)
    counters = hosts.counters()
    assert (counters["offloaded"], counters["failed"], counters["local"]) == (2, 0, {})
    assert not [name for name in agent_counters(hosts) if name.startswith(("local", "failed"))]


def test_the_next_host_hears_of_it_from_the_guest_first(hosts: TwoHosts) -> None:
    """It has one owner, whatever comes later."""
    rows = leave(hosts, 0)
    curl = parked(hosts)
    more = hosts.host.call("more")["rows"]
    arrive(hosts, rows)
    out(hosts, 1)
    assert hosts.host.call("bring", rows=more, first=False)["kept"] == 1
    hosts.host.call("meet", seconds=15)
    assert is_complete(hosts, curl)
    assert hosts.host.machine()["refused"] == {}


def test_the_vm_stays_with_what_was_asked_for_in_the_last_moment(hosts: TwoHosts) -> None:
    leave(hosts, 0)
    curl = parked(hosts)
    hosts.host.call("return")
    out(hosts, 1)
    assert is_complete(hosts, curl)
    assert hosts.counters()["local"] == {}


def test_the_next_host_cannot_take_what_was_asked_for_in_the_last_moment(hosts: TwoHosts) -> None:
    """The guest asks it again itself."""
    rows = leave(hosts, 0)
    curl = parked(hosts)
    (more,) = hosts.host.call("more")["rows"]
    more["request"]["path"] = "another.bin"
    arrive(hosts, [*rows, more])
    assert is_complete(hosts, curl)
    assert hosts.counters()["failed"] == 0


def test_who_asks_when_no_host_answers_waits_for_the_next(hosts: TwoHosts) -> None:
    """And not for the share."""
    rows = leave(hosts, 0)
    hosts.detach()
    wait_for(lambda: hosts.host.machine()["channel"] != "hello", "nobody answers")
    curl = download(hosts)
    time.sleep(0.5)
    arrive(hosts, rows, meet=False)
    out(hosts, 1)
    assert hosts.host.machine()["presence"] == "returning"
    assert is_complete(hosts, curl)
    assert (hosts.counters()["offloaded"], hosts.counters()["local"]) == (1, {})


def test_the_application_ends_meanwhile(hosts: TwoHosts) -> None:
    """What nobody wants is ended by whoever has it."""
    curl = download(hosts)
    rows = leave(hosts, 1)
    media = hosts.processes[3]
    assert media.popen is not None
    os.kill(media.popen.pid, signal.SIGKILL)
    media.popen.wait()
    arrive(hosts, rows)
    wait_for(lambda: hosts.host.machine()["connections_out"] == 0, "it is ended")
    assert not is_complete(hosts, curl)


def test_what_a_client_says_meanwhile_is_not_lost(hosts: TwoHosts) -> None:
    """Its window opens while nobody serves; no question would be answered so soon again (tcp_invalid_ratelimit)."""
    reader = hosts.client.popen([sys.executable, "-c", _FITFUL], stdout=subprocess.PIPE)
    out(hosts, 1)
    hosts.host.call("leave", only="share")
    left = hosts.host.call("leave", pass_on=True)
    hosts.other.call("bring", rows=left["rows"], first=True)
    late: list[Any] = []

    def opened() -> bool:
        late.extend(hosts.host.call("more")["late"])
        return bool(late)

    wait_for(opened, "the client's window has opened")
    assert hosts.host.call("more")["late"] == []
    hosts.other.call("bring", late=late)
    hosts.move()
    hosts.host.call("meet", seconds=15)
    told, _ = reader.communicate(timeout=60)
    assert told.decode().strip() == hashlib.sha256((hosts.share / f"{SIZE}.bin").read_bytes()).hexdigest()


_FITFUL = f"""
import hashlib, socket, time
client, digest, left = socket.socket(), hashlib.sha256(), {SIZE}
client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
client.connect(("{GUEST}", 80))
client.sendall(b"GET /{SIZE}.bin HTTP/1.1\\r\\nHost: guest\\r\\n\\r\\n")
file = client.makefile("rb", buffering=4096)
while file.readline().strip():
    pass
for pieces in range(40):  # in fits, then all at once
    data = file.read(16384)
    digest.update(data)
    left -= len(data)
    time.sleep(0.1)
client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
while left:
    data = file.read(min(left, 65536))
    digest.update(data)
    left -= len(data)
print(digest.hexdigest())
"""
