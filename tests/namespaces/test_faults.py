# SPDX-License-Identifier: Apache-2.0
"""Every fault at every step of a handoff, while other clients are served: they notice nothing, bytes are never wrong, nothing is
left behind, the next transfer works, and the client's link shows one honest endpoint."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.client import make_content
from tests.namespaces import capture
from tests.namespaces.deployment import Deployment, deployed, wait_for
from tests.namespaces.relay import Relay
from tests.namespaces.topology import Network, routed, run

pytestmark = pytest.mark.root

SIZES = (1000, 70_000, 288_600, 1_400_000)
REQUESTS, CONNECTIONS = 600, 8
CLOSED = ("ConnectionResetError", "ConnectionError", "BrokenPipeError")
"""What a client may see of a connection that ended; anything else is a wrong answer."""
GUEST_STATES = ("frozen", "offered", "out", "returning", "home")
HOST_STATES = ("restored", "redirected", "serving", "frozen", "returning", "gone")


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    make_content(str(folder), SIZES)
    return folder


@dataclass
class Trial:
    """A deployment under load and under observation. `broken` connections may end in an error, and be reset."""

    deployment: Deployment
    network: Network
    folder: Path
    broken: int = 0
    report: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        """Other clients, meanwhile; every answer is hashed."""
        found: dict[str, Any] = {}

        def run() -> None:
            found.update(self.deployment.load(requests=REQUESTS, connections=CONNECTIONS))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            thread.join()
        self.report = found

    def judge(self) -> None:
        """What must hold after any fault."""
        errors = self.report["first_errors"]
        assert self.report["errors"] <= self.broken, "\n".join(errors)
        assert all(any(word in error for word in CLOSED) for error in errors), errors
        servers = {(address, self.deployment.port) for address in self.network.guest_address.values()}
        assert capture.judge(capture.read(self.folder / "link.pcap"), servers, resets=self.broken) == []


@contextlib.contextmanager
def trial(folder: Path, share: Path, *, broken: int = 0, home: float = 15, **options: Any) -> Iterator[Trial]:
    """The fault goes into the block. Afterwards everything is judged; `home`: seconds until nothing may be out any more."""
    with routed() as network, deployed(network, folder, share, **options) as deployment:
        network.keep_order()
        _assert_works(deployment)  # the server keeps its connection to the agent
        before = _left(deployment)
        with capture.captured(network.client, folder / "link.pcap"):
            found = Trial(deployment, network, folder, broken)
            yield found
            wait_for(lambda: deployment.counters()["open_connections"] == 1, "the load's connections have ended", patience=home)
            _assert_works(deployment)
        wait_for(lambda: not deployment.call("connections")["connections"], "nothing is out", patience=home)
        wait_for(lambda: _left(deployment) <= before, f"what was before: {before}, now {_left(deployment)}")
        found.judge()


@dataclass(frozen=True)
class Left:
    """What a fault could leave behind."""

    files: tuple[int, ...]
    redirects: int
    sockets: tuple[int, ...]
    rules: int

    def __le__(self, other: Left) -> bool:
        ours, theirs = ((*left.files, left.redirects, *left.sockets, left.rules) for left in (self, other))
        return all(a <= b for a, b in zip(ours, theirs, strict=True))


def _left(deployment: Deployment) -> Left:
    network = deployment.network
    assert deployment.agent.popen is not None
    pids = deployment.status()["pid"], deployment.agent.popen.pid
    entries = network.host.run("conntrack", "-L", "-m", "0x534c0000/0xffff0000")
    return Left(
        files=tuple(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids),
        redirects=len(entries.splitlines()),
        sockets=tuple(
            len([line for line in where.run("ss", "-Htan").splitlines() if not line.startswith(("LISTEN", "TIME-WAIT"))])
            for where in (network.host, network.guest)
        ),
        rules=len(network.host.run("nft", "list", "ruleset").splitlines()) + len(network.guest.run("ip", "rule").splitlines()),
    )


def _assert_works(deployment: Deployment) -> None:
    """A new transfer goes through the host."""
    deployment.wait_ready()
    before = deployment.counters()["offloaded"]
    body = deployment.network.client.popen(
        ["curl", "-sf", "--max-time", "10", f"http://10.77.1.2:{deployment.port}/1400000.bin"], stdout=-1
    ).communicate()[0]
    assert body == (deployment.share / "1400000.bin").read_bytes()
    wait_for(lambda: deployment.counters()["offloaded"] > before, "the server counts it when it is home")
    assert deployment.counters()["offloaded"] == before + 1


# The agent.


@pytest.mark.parametrize("state", GUEST_STATES)
def test_agent_killed(state: str, share: Path, tmp_path: Path) -> None:
    """Its next life takes every socket over: no client notices."""
    with trial(tmp_path, share, home=40) as found:
        agent = found.deployment.agent
        agent.stop()
        agent.start(STREAMLIFT_FAULT=f"guest:{state}=kill@5")
        found.deployment.wait_ready()
        with found.load():
            _restart_when_dead(found.deployment)


def _restart_when_dead(deployment: Deployment) -> None:
    """As systemd does."""
    agent = deployment.agent
    assert agent.popen is not None
    wait_for(lambda: agent.popen is not None and agent.popen.poll() is not None, "the agent dies")
    agent.start()


@pytest.mark.parametrize(("state", "broken"), [("frozen", 0), ("returning", 1)])
def test_guest_step_refused(state: str, broken: int, share: Path, tmp_path: Path) -> None:
    """What cannot be handed out is sent locally; what cannot come home is ended by the host, which has the only copy."""
    with trial(tmp_path, share, broken=broken, home=70) as found:
        found.deployment.agent.stop()
        found.deployment.agent.start(STREAMLIFT_FAULT=f"guest:{state}=raise@5")
        found.deployment.wait_ready()
        with found.load():
            pass


# The service.


@pytest.mark.parametrize("state", HOST_STATES)
def test_service_killed(state: str, share: Path, tmp_path: Path) -> None:
    """What it had is lost, and only that; its supervisor starts it again."""
    with trial(tmp_path, share, broken=CONNECTIONS) as found:
        _start_service(found.deployment, tmp_path, f"host:{state}=kill@5")
        before = found.deployment.status()["pid"]
        with found.load():
            wait_for(lambda: _pid(found.deployment) not in (0, before), "the service is started again")


def _start_service(deployment: Deployment, folder: Path, rule: str) -> None:
    deployment.service.stop()
    (folder / "fault").write_text(rule)
    deployment.service.start(STREAMLIFT_FAULT=f"@{folder / 'fault'}")
    deployment.wait_ready()


def _pid(deployment: Deployment) -> int:
    with contextlib.suppress(Exception):
        return int(deployment.status()["pid"])
    return 0


@pytest.mark.parametrize(
    ("state", "broken"),
    [("restored", 0), ("redirected", 0), ("serving", 1), ("frozen", 1), ("returning", 1)],
    ids=["restore", "redirect", "commit", "freeze", "return"],
)
def test_host_step_refused(state: str, broken: int, share: Path, tmp_path: Path) -> None:
    """Before the commit all is undone and the guest sends the file; afterwards the one connection ends."""
    with trial(tmp_path, share, broken=broken) as found:
        _start_service(found.deployment, tmp_path, f"host:{state}=raise@5")
        with found.load():
            pass
        local = found.deployment.counters()["local"]
        assert sum(count for reason, count in local.items() if reason != "too_small") == (0 if broken else 1), local


# The channel.


@pytest.mark.parametrize("delivered", [False, True], ids=["lost", "delivered"])
@pytest.mark.parametrize("message", ["hand_out", "taken", "standing_by", "hand_back", "restored"])
def test_channel_cut(message: str, delivered: bool, share: Path, tmp_path: Path) -> None:
    """Both sides find each other again and agree on every transfer: no client notices."""
    with Relay(tmp_path / "cut.sock", tmp_path / "port.sock", cut_at=message, delivered=delivered) as relay:
        with trial(tmp_path, share, channel="cut.sock", home=40) as found:
            relay.arm()
            with found.load():
                assert relay.has_cut.wait(20)


# Clients and files: one connection of its own, beside the load.


@dataclass
class Slow:
    """A client that has read a part of a large file."""

    process: Any

    def go_on(self, word: str) -> str:
        """What it found."""
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return str(self.process.stdout.readline().strip())


SLOW = """
import hashlib, socket, struct, sys
host, path, part = sys.argv[1], sys.argv[2], int(sys.argv[3])
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
sock.connect((host, 80))
sock.settimeout(60)
sock.sendall(f"GET /{path} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
data = b""
while b"\\r\\n\\r\\n" not in data:
    data += sock.recv(1000)
head, data = data.split(b"\\r\\n\\r\\n", 1)
length = next(int(line.split(b":")[1]) for line in head.split(b"\\r\\n") if line.lower().startswith(b"content-length"))
digest, got = hashlib.sha256(data), len(data)
def read(limit):
    global got
    while got < limit:
        try:
            piece = sock.recv(min(1 << 16, limit - got))
        except OSError as error:
            return type(error).__name__
        if not piece:
            return "closed"
        digest.update(piece)
        got += len(piece)
    return digest.hexdigest()
read(part)
print("part", flush=True)
word = sys.stdin.readline().strip()
if word == "reset":
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    print("reset", flush=True)
else:
    print(read(length), flush=True)
"""
GONE = """
table ip gone {
    chain in { type filter hook input priority 0; ip saddr 10.77.1.2 tcp sport 80 drop; }
    chain out { type filter hook output priority 0; ip daddr 10.77.1.2 tcp dport 80 drop; }
}
"""
LARGE = 32_000_000
PART = 1_000_000


@contextlib.contextmanager
def slow_client(found: Trial, path: str) -> Iterator[Slow]:
    """It is out at the host when the block begins."""
    before = found.deployment.machine()["handed_out"]
    argv = ["ip", "netns", "exec", found.network.client.name, sys.executable, "-c", SLOW, "10.77.1.2", path, str(PART)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "part\n"
        wait_for(lambda: found.deployment.machine()["handed_out"] > before, "the transfer is out")
        try:
            yield Slow(process)
        finally:
            process.kill()


@pytest.fixture
def own_share(tmp_path: Path) -> Path:
    folder = tmp_path / "share"
    make_content(str(folder), (*SIZES, LARGE))
    return folder


def test_client_resets(own_share: Path, tmp_path: Path) -> None:
    with trial(tmp_path, own_share) as found, found.load():
        with slow_client(found, f"{LARGE}.bin") as client:
            assert client.go_on("reset") == "reset"
            wait_for(lambda: found.deployment.counters()["failed"] == 1, "the server is told")


HASTY = """
import socket, struct, sys, time
sock = socket.create_connection((sys.argv[1], 80), 10)
sock.sendall(b"GET /70000.bin HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
time.sleep(0.15)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
sock.close()
"""


@pytest.mark.parametrize("point", [*(f"guest:{state}" for state in GUEST_STATES), *(f"host:{state}" for state in HOST_STATES)])
def test_client_resets_at_every_step(point: str, share: Path, tmp_path: Path) -> None:
    """The step takes 0.3 s, and the reset comes in the middle of it."""
    with trial(tmp_path, share) as found:
        for process in (found.deployment.agent, found.deployment.service):
            process.stop()
        for process in (found.deployment.agent, found.deployment.service):
            process.start(STREAMLIFT_FAULT=f"{point}=stall@1")
        found.deployment.wait_ready()
        client = found.network.client.popen([sys.executable, "-c", HASTY, "10.77.1.2"])
        assert client.wait(20) == 0
        with found.load():
            pass


def test_client_vanishes(own_share: Path, tmp_path: Path) -> None:
    """The kernel gives up after tcp_retries2, and so do we, with its error."""
    with trial(tmp_path, own_share) as found:
        found.network.host.sysctl("net.ipv4.tcp_retries2", "3")
        with slow_client(found, f"{LARGE}.bin"):
            found.network.client.run("nft", GONE)
            wait_for(lambda: found.deployment.machine()["failed"] == 1, "the host gives up", patience=60)
        found.network.client.run("nft", "delete table ip gone")
        with found.load():
            pass


def test_client_stops_reading_for_30_seconds(own_share: Path, tmp_path: Path) -> None:
    with trial(tmp_path, own_share) as found, slow_client(found, f"{LARGE}.bin") as client:
        with found.load():
            time.sleep(30)
        truth = hashlib.sha256((own_share / f"{LARGE}.bin").read_bytes()).hexdigest()
        assert client.go_on("read") == truth


def _delete(file: Path) -> None:
    file.unlink()


def _truncate(file: Path) -> None:
    with file.open("r+b") as open_file:
        open_file.truncate(2 * PART)


@pytest.mark.parametrize(("change", "complete"), [(_delete, True), (_truncate, False)], ids=["deleted", "truncated"])
def test_file_changes(change: Callable[[Path], None], complete: bool, own_share: Path, tmp_path: Path) -> None:
    """A deleted file is served to its end; a shortened one ends the connection, as the server does without us."""
    file = own_share / "stream.mp4"  # nobody else asks for it
    file.write_bytes((own_share / f"{LARGE}.bin").read_bytes())
    truth = hashlib.sha256(file.read_bytes()).hexdigest()
    with trial(tmp_path, own_share) as found, found.load(), slow_client(found, file.name) as client:
        change(file)
        assert client.go_on("read") == (truth if complete else "closed")


@contextlib.contextmanager
def damaged_disk(folder: Path) -> Iterator[Path]:
    """A share on a disk on which one block of the large file is damaged: the file system's checksum tells, and reading it is
    EIO (btrfs(5))."""
    content, image, mounted = folder / "content", folder / "disk", folder / "mounted"
    make_content(str(content), SIZES)
    make_content(str(content / "damaged"), (LARGE,))
    run("truncate", "-s", "256M", str(image))
    run("mkfs.btrfs", "-q", "-d", "single", "-m", "single", "-r", str(content), str(image))
    block = (content / "damaged" / f"{LARGE}.bin").read_bytes()[LARGE // 2 : LARGE // 2 + 4096]
    with image.open("r+b") as disk:
        disk.seek(disk.read().index(block))
        disk.write(bytes(4096))
    mounted.mkdir()
    run("mount", "-o", "loop,ro", str(image), str(mounted))
    try:
        yield mounted
    finally:
        run("umount", str(mounted))


def test_disk_error(tmp_path: Path) -> None:
    """The client gets what could be read, and then the end, as from the server without us."""
    with damaged_disk(tmp_path) as share:
        with trial(tmp_path, share) as found, found.load(), slow_client(found, f"damaged/{LARGE}.bin") as client:
            assert client.go_on("read") == "closed"
            wait_for(lambda: found.deployment.counters()["failed"] == 1, "the server is told")
