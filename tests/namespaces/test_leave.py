# SPDX-License-Identifier: Apache-2.0
"""A guest leaves its host and comes back, with transfers under way: what is out comes home, applications let go of the share, it is
unmounted and mounted again, and the same connections go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor_svc.control import ControlError
from tests.client import make_content
from tests.namespaces.deployment import ROOT, Deployment, deployed, wait_for
from tests.namespaces.download import Download
from tests.namespaces.topology import routed
from tests.transport_stream import stream

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


def inside(deployment: Deployment) -> list[str]:
    """What starts a program where the guest's share is mounted."""
    return deployment.agent.argv[: deployment.agent.argv.index("--") + 1]


def relay_sinks(deployment: Deployment) -> int:
    """Of all relays together."""
    return sum(row.get("sink_count", 0) for row in deployment.call("relays")["relays"])


def connected(address: str, port: int) -> socket.socket:
    """To somebody who is about to listen; to be called in the client's namespace."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection((address, port), timeout=20)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


class Reader(threading.Thread):
    """Keeps what comes on a socket, to its end."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.data, self._sock = bytearray(), sock
        self.start()

    def run(self) -> None:
        with self._sock, contextlib.suppress(OSError):
            while piece := self._sock.recv(1 << 16):
                self.data += piece


def download(deployment: Deployment, size: int = 64_000_000) -> Download:
    """A client that has asked for the file of that size."""
    return Download(deployment.network.client, f"http://10.77.1.2/{size}.bin")


@contextlib.contextmanager
def downloads(deployment: Deployment, count: int) -> Iterator[list[Download]]:
    """So many clients in the middle of a file."""
    curls = [download(deployment) for _ in range(count)]
    try:
        wait_for(lambda: deployment.machine()["connections_out"] == count, "all are out")
        yield curls
    finally:
        for curl in curls:
            curl.kill()


def all_complete(deployment: Deployment, curls: list[Download], size: int = 64_000_000) -> bool:
    """Every byte came to each."""
    digest = hashlib.sha256((deployment.share / f"{size}.bin").read_bytes()).hexdigest()
    return all(curl.digest() == digest for curl in curls)


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


def test_requests_meanwhile_wait(deployment: Deployment) -> None:
    """The server opens nothing while the share is away; small files and large ones come afterwards."""
    deployment.call("leave", machine="guest")
    curls = [download(deployment, size) for size in (1000, 1_400_000)]
    time.sleep(0.3)
    assert not any(curl.over for curl in curls)
    deployment.call("return", machine="guest")
    for curl, size in zip(curls, (1000, 1_400_000), strict=True):
        assert all_complete(deployment, [curl], size)


def test_somebody_keeps_the_share_busy(deployment: Deployment) -> None:
    """The operator is told who; the guest works with its host all the time after, and leaves when nobody does."""
    words = f"import time; file = open('{deployment.folder}/mnt/1000.bin'); print('open', flush=True); time.sleep(60)"
    holder = deployment.network.guest.popen([*inside(deployment), sys.executable, "-c", words], stdout=subprocess.PIPE)
    with holder, downloads(deployment, 2) as curls:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"open\n"
            with pytest.raises(ControlError, match=f"python.*{holder.pid}.*1000.bin") as raised:
                deployment.call("leave", machine="guest")
            assert "offload.attend" in raised.value.hint
            wait_for(lambda: deployment.machine()["presence"] == "here", "it is here again")
            assert mounted_now(deployment)
            wait_for(lambda: deployment.machine()["connections_out"] == 2, "both are out again")
        finally:
            holder.kill()
        holder.wait()
        assert deployment.call("leave", machine="guest")["presence"] == "away"
        deployment.call("return", machine="guest")
        assert all_complete(deployment, curls)


def test_called_back_while_it_leaves(deployment: Deployment) -> None:
    """`return` cancels a leave, and whoever asked for that is told."""
    words = f"import time; file = open('{deployment.folder}/mnt/1000.bin'); print('open', flush=True); time.sleep(60)"
    holder = deployment.network.guest.popen([*inside(deployment), sys.executable, "-c", words], stdout=subprocess.PIPE)
    with holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"open\n"
            refusals: list[str] = []
            leaving = threading.Thread(target=lambda: refusals.append(_refusal(deployment)))
            leaving.start()
            wait_for(lambda: deployment.machine()["presence"] == "leaving", "it is leaving")
            assert deployment.call("return", machine="guest")["presence"] == "here"
            leaving.join()
            assert "called back" in refusals[0]
        finally:
            holder.kill()
    with downloads(deployment, 1) as curls:
        assert all_complete(deployment, curls)


def _refusal(deployment: Deployment) -> str:
    with pytest.raises(ControlError) as raised:
        deployment.call("leave", machine="guest")
    return str(raised.value)


def test_whoever_asked_for_it_dies(deployment: Deployment) -> None:
    """`streamlift migrate` is killed: the guest comes back by itself."""
    with subprocess.Popen(["sleep", "60"]) as asking:
        deployment.call("leave", machine="guest", process=asking.pid)
        assert not mounted_now(deployment)
        asking.kill()
    wait_for(lambda: deployment.machine()["presence"] == "here", "it is here again")
    assert mounted_now(deployment)
    deployment.call("leave", machine="guest", process=asking.pid)  # it has ended already
    wait_for(lambda: deployment.machine()["presence"] == "here", "it is here again")


def test_without_a_mounted_share_nobody_is_asked(tmp_path: Path, share: Path) -> None:
    """Connections come home, and that is all."""
    with routed() as network, deployed(network, tmp_path, share) as deployment, downloads(deployment, 3) as curls:
        left = deployment.call("leave", machine="guest")
        assert (left["home"], left["presence"]) == (3, "away")
        deployment.call("return", machine="guest")
        wait_for(lambda: deployment.machine()["connections_out"] == 3, "all are out again")
        assert all_complete(deployment, curls)


# Relays.


def _grow(path: Path, stop: threading.Event, body: bytes, written: list[int]) -> None:
    """A file that grows by a packet or three, a hundred times a second."""
    with path.open("ab", buffering=0) as file:
        at = 0
        while not stop.wait(0.01) and at < len(body):
            piece = body[at : at + random.Random(at).randrange(100, 4000)]
            file.write(piece)
            at += len(piece)
        file.write(body[at : at - at % 188 + 188 * 50])
        written.append(file.tell())


def test_a_relay_of_a_file_goes_on_without_gap_or_repeat(deployment: Deployment, tmp_path: Path) -> None:
    count, path = 10, deployment.share / "growing.ts"
    path.write_bytes(b"")
    body, stop = b"".join(stream(12_000)), threading.Event()
    written: list[int] = []
    argv = [*inside(deployment), sys.executable, "-m", "tests.namespaces.moving_app", f"{deployment.folder}/mnt/growing.ts", "9000"]
    app = deployment.network.guest.popen(
        [*argv, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "STREAMLIFT_AGENT": str(deployment.folder / "agent.sock")},
    )
    writer = threading.Thread(target=_grow, args=(path, stop, body, written))
    with app:
        assert app.stdin is not None and app.stdout is not None
        assert json.loads(app.stdout.readline()) == {"path": "offloaded", "reason": None}
        with deployment.network.client.entered():
            clients = [connected("10.77.1.2", 9000) for _ in range(count)]
        readers = [Reader(client) for client in clients]
        assert json.loads(app.stdout.readline()) == {"sinks": count}
        writer.start()
        for _ in range(3):
            time.sleep(0.5)
            left = deployment.call("leave", machine="guest")
            assert left["home"] == count
            time.sleep(0.2)
            deployment.call("return", machine="guest")
            wait_for(lambda: relay_sinks(deployment) == count, "all are sinks again")
        stop.set()
        writer.join()
        size = written[0]
        wait_for(lambda: all(len(reader.data) >= size // 188 * 188 for reader in readers), "all has come")
        app.stdin.write(b"\n")
        app.stdin.flush()
        facts = json.loads(app.stdout.readline())
    for reader in readers:
        reader.join()
    assert facts["still"] == count
    expected = path.read_bytes()
    for reader, ending in zip(readers, facts["endings"], strict=True):
        assert bytes(reader.data) == expected[: len(reader.data)]
        assert (ending["sent"], ending["cursor"], ending["alive"]) == (len(reader.data), len(reader.data), True)
