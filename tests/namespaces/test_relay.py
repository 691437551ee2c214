# SPDX-License-Identifier: Apache-2.0
"""Live streams through the whole product: an encoder connects to the live server in the guest, listeners too, and every byte
goes through the host."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client import make_content
from tests.namespaces import capture
from tests.namespaces.deployment import LIVE_PASSWORD, LIVE_PORT, ROOT, Deployment, deployed, relay_engine, wait_for
from tests.namespaces.topology import Network, routed
from tests.transport_stream import stream

pytestmark = pytest.mark.root

END_OF_STREAM = (b"[http @", f"http://10.77.1.2:{LIVE_PORT}".encode(), b"Last message repeated")
"""What ffmpeg says at the end of any stream whose length it was not told."""
ENGINE = {"auto": "user"}.get(relay_engine(), relay_engine())
"""No module is loaded where these tests run by themselves."""
BEGIN = "here the stream begins that everybody has"


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    make_content(str(folder), (1000, 288_600))
    return folder


@pytest.fixture
def live(tmp_path: Path, share: Path) -> Iterator[Deployment]:
    with routed() as network, deployed(network, tmp_path, share, live=True) as deployment:
        wait_for(lambda: mounts(deployment) is not None, "the live server")
        yield deployment


def mounts(deployment: Deployment, address: str = "10.77.1.2") -> Any:
    try:
        return json.loads(deployment.network.client.run("curl", "-sf", "-m", "5", f"http://{address}:{LIVE_PORT}/"))["mounts"]
    except (RuntimeError, ValueError):
        return None


@contextlib.contextmanager
def encoder(network: Network, path: str, *, content_type: str = "audio/mpeg", family: int = 4) -> Iterator[socket.socket]:
    """A connection of an encoder that was let in."""
    words = base64.b64encode(f"source:{LIVE_PASSWORD}".encode()).decode()
    head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {words}\r\nContent-Type: {content_type}\r\n\r\n"
    with network.client.entered():
        sock = socket.create_connection((network.guest_address[family], LIVE_PORT), timeout=20)
    with sock:
        sock.sendall(head.encode())
        assert sock.recv(1000).endswith(b"\r\n\r\n")
        yield sock


@contextlib.contextmanager
def listeners(
    deployment: Deployment, path: str, count: int, *, begin: str = "", family: int = 4
) -> Iterator[subprocess.Popen[str]]:
    """Listeners that have all been answered."""
    argv = ["ip", "netns", "exec", deployment.network.client.name, sys.executable, "-m", "tests.namespaces.listeners"]
    argv += [deployment.network.guest_address[family], str(LIVE_PORT), path, str(count)]
    argv += ["--from", begin] if begin else []
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with process:
        assert process.stdout is not None and process.stdin is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait(20)


def found(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What the listeners got, once the stream is over."""
    assert process.stdout is not None
    return [json.loads(line) for line in process.stdout]


def relay(deployment: Deployment) -> dict[str, Any]:
    """The one relay; it is by the engine that was asked for."""
    (row,) = deployment.call("relays")["relays"]
    assert row["engine"] == ENGINE or row["source"] != "connection"
    return dict(row)


def everybody_got(count: int, body: bytes) -> list[dict[str, Any]]:
    """What `found` returns if they did."""
    return [{"count": count, "size": len(body), "sha256": hashlib.sha256(body).hexdigest(), "error": ""}]


def _shown(live: Deployment, what: str) -> str:
    """What the operator sees."""
    argv = [sys.executable, "-m", "hypervisor_svc", "--config", str(live.folder / "streamlift.toml"), what]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout


@pytest.mark.parametrize("family", [4, 6])
def test_every_byte_to_every_listener(live: Deployment, tmp_path: Path, family: int) -> None:
    """The encoder and forty listeners come through the guest's server; the host alone sends."""
    network, count, blocks = live.network, 40, [os.urandom(25_000) for _ in range(30)]
    network.keep_order()
    body = BEGIN.encode() + b"".join(blocks)
    with capture.captured(network.client, tmp_path / "link.pcap"):
        with encoder(network, "/radio", family=family) as source:
            wait_for(lambda: mounts(live), "the mount")
            with listeners(live, "/radio", count, begin=BEGIN, family=family) as process:
                wait_for(lambda: relay(live)["sink_count"] == count, "all are sinks")
                source.sendall(BEGIN.encode())
                for block in blocks:
                    source.sendall(block)
                    time.sleep(0.01)
                wait_for(lambda: relay(live)["bytes_in"] >= len(body), "all has come")
                row, shown = relay(live), _shown(live, "relays") + _shown(live, "status")
                source.shutdown(socket.SHUT_WR)
                groups = found(process)
    assert groups == everybody_got(count, body)
    assert all(word in shown for word in (row["relay"][:8], f" {count} ", "entries a send", f"engine {row['engine']}", "normal"))
    assert (row["engine"], row["ended"]) == (ENGINE, "")
    assert row["out"]["turns"] < row["out"]["entries"], "the latency budget made fewer sends"
    wait_for(lambda: not live.call("connections")["connections"], "all are home")
    assert live.call("relays")["relays"] == []
    wait_for(lambda: mounts(live) == [], "the mount is gone")
    assert live.machine()["handed_out"] == live.machine()["handed_back"] + live.machine()["failed"] == count + 1
    servers = {(network.guest_address[family], LIVE_PORT)}
    assert capture.judge(capture.read(tmp_path / "link.pcap"), servers) == []


@pytest.mark.parametrize("family", [4])
def test_two_thousand_listeners(live: Deployment, family: int) -> None:
    """Every byte to each of them, and all at home in the end."""
    network, count = live.network, 2000
    body = BEGIN.encode() + os.urandom(400_000)
    with encoder(network, "/radio", family=family) as source:
        wait_for(lambda: mounts(live), "the mount")
        with listeners(live, "/radio", count, begin=BEGIN, family=family) as process:
            wait_for(lambda: relay(live)["sink_count"] == count, "all are sinks", patience=60)
            for at in range(0, len(body), 40_000):
                source.sendall(body[at : at + 40_000])
                time.sleep(0.2)
            wait_for(lambda: relay(live)["out"]["bytes"] == count * len(body), "all has gone", patience=60)
            row = relay(live)
            source.shutdown(socket.SHUT_WR)
            groups = found(process)
    assert groups == everybody_got(count, body)
    assert row["out"]["overrun"] == row["out"]["lagged"] == 0
    wait_for(lambda: not live.call("connections")["connections"], "all are home", patience=60)
    machine = live.machine()
    assert (machine["handed_out"], machine["failed"] + machine["ended"]) == (count + 1, 0)


def _others_have(live: Deployment, sent: int, slow: int) -> bool:
    """Those that do not read do not hold the source up."""
    row = relay(live)
    behind = [sink for sink in row["sinks"] if sink["state"] != "live" or sink["lag"]]
    return bool(row["bytes_in"] >= sent and len(behind) <= slow)


def test_a_listener_that_stalls_or_leaves_harms_nobody(live: Deployment) -> None:
    network = live.network
    body = BEGIN.encode() + os.urandom(30_000_000)
    with encoder(network, "/radio") as source:
        wait_for(lambda: mounts(live), "the mount")
        with network.client.entered():
            stalled, gone = (socket.create_connection((network.guest_address[4], LIVE_PORT), timeout=20) for _ in range(2))
        with listeners(live, "/radio", 20, begin=BEGIN) as process, stalled, gone:
            for sock in (stalled, gone):
                sock.sendall(b"GET /radio HTTP/1.0\r\n\r\n")
            wait_for(lambda: relay(live)["sink_count"] == 22, "all are sinks")
            for at in range(0, len(body), 1_000_000):
                source.sendall(body[at : at + 1_000_000])
                if at == 15_000_000:
                    gone.close()
                slow = 1 if gone.fileno() < 0 else 2
                wait_for(lambda: _others_have(live, min(at + 1_000_000, len(body)), slow), "the others have all")  # noqa: B023
            wait_for(lambda: relay(live)["sink_count"] == 21, "one is gone")
            source.shutdown(socket.SHUT_WR)
            stalled.close()
            groups = found(process)
    assert groups == everybody_got(20, body)
    wait_for(lambda: not live.call("connections")["connections"], "all are home or gone", patience=30)


def test_real_encoder_and_player(live: Deployment, tmp_path: Path) -> None:
    """ffmpeg encodes a transport stream into the guest, ffmpeg and curl watch; what each got decodes."""
    network, outputs = live.network, [tmp_path / f"curl{number}.ts" for number in range(5)]
    url = f"http://{network.guest_address[4]}:{LIVE_PORT}/film"
    source = ["-f", "lavfi", "-i", "testsrc=size=320x180:rate=25", "-f", "lavfi", "-i", "sine", "-t", "8"]
    target = f"icecast://source:{LIVE_PASSWORD}@{network.guest_address[4]}:{LIVE_PORT}/film"
    argv = [
        "ffmpeg",
        "-v",
        "error",
        "-re",
        *source,
        "-g",
        "25",
        "-c:v",
        "libx264",
        "-preset",
        "ultrafast",
        "-c:a",
        "aac",
        "-f",
        "mpegts",
    ]
    with network.client.popen([*argv, "-content_type", "video/mp2t", target]) as encoding:
        wait_for(lambda: mounts(live), "the mount")
        curls = [network.client.popen(["curl", "-s", "-o", str(path), url]) for path in outputs]
        player = network.client.popen(["ffmpeg", "-v", "error", "-i", url, "-f", "null", "-"], stderr=subprocess.PIPE)
        assert encoding.wait(40) == 0
        for process in curls:
            assert process.wait(10) == 0
        _, words = player.communicate(timeout=10)
        assert player.returncode == 0
        assert [line for line in words.splitlines() if not line.strip().startswith(END_OF_STREAM)] == []
    for path in outputs:
        done = subprocess.run(["ffmpeg", "-v", "error", "-i", str(path), "-f", "null", "-"], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b""), path
        assert path.stat().st_size > 200_000


def test_who_may_send(live: Deployment) -> None:
    def status(*arguments: str) -> str:
        url = f"http://10.77.1.2:{LIVE_PORT}/radio"
        return live.network.client.run("curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", *arguments, url).strip()

    assert status() == "404"
    assert status("-X", "PUT") == "401"
    assert status("-X", "PUT", "-u", "source:wrong") == "401"
    assert status("-X", "PUT", "-u", f"source:{LIVE_PASSWORD}", "-H", "Transfer-Encoding: chunked", "-d", "x") == "411"
    assert status("-X", "DELETE") == "405"
    with encoder(live.network, "/radio"):
        wait_for(lambda: mounts(live), "the mount")
        assert status("-X", "PUT", "-u", f"source:{LIVE_PASSWORD}") == "409"


def test_without_a_host_the_server_does_it_itself(live: Deployment) -> None:
    live.service.stop()
    body = BEGIN.encode() + os.urandom(2_000_000)
    wait_for(lambda: not live.agent.log.read_text().endswith("answers\n"), "the agent noticed")
    with encoder(live.network, "/radio") as source:
        wait_for(lambda: mounts(live), "the mount")
        assert [(mount["path"], mount["reason"]) for mount in mounts(live)] == [("local", "host_away")]
        with listeners(live, "/radio", 10, begin=BEGIN) as process:
            wait_for(lambda: mounts(live)[0]["relay"]["sink_count"] == 10, "all are sinks")
            source.sendall(body)
            source.shutdown(socket.SHUT_WR)
            groups = found(process)
    assert groups == everybody_got(10, body)


# Whoever dies.


def _nothing_left(live: Deployment) -> None:
    wait_for(lambda: not live.call("connections")["connections"], "nothing is out", patience=40)
    wait_for(lambda: not live.call("relays")["relays"], "no relay is left", patience=40)
    live.wait_ready()
    body = live.network.client.run("sh", "-c", f"curl -sf -m 10 http://10.77.1.2:{live.port}/288600.bin | sha256sum").split()[0]
    assert body == hashlib.sha256((live.share / "288600.bin").read_bytes()).hexdigest()


def test_the_server_is_killed(live: Deployment) -> None:
    """Encoder and listeners see their connections end, as if it had been the server's own."""
    assert live.live is not None
    with encoder(live.network, "/radio") as source:
        wait_for(lambda: mounts(live), "the mount")
        with listeners(live, "/radio", 20) as process:
            wait_for(lambda: relay(live)["sink_count"] == 20, "all are sinks")
            source.sendall(bytes(100_000))
            wait_for(lambda: relay(live)["bytes_in"] == 100_000, "it has come")
            live.live.kill()
            assert sum(group["count"] for group in found(process)) == 20
            source.settimeout(20)
            assert _ends(source)
    live.live.start()
    _nothing_left(live)


def _ends(sock: socket.socket) -> bool:
    try:
        return sock.recv(100) == b""
    except ConnectionError:
        return True


def test_the_agent_is_killed(live: Deployment) -> None:
    """Its next life takes the sockets over: the stream stops, because nobody knows whose it was; the server says so, and the
    connections are usable to the end."""
    with encoder(live.network, "/radio") as source:
        wait_for(lambda: mounts(live), "the mount")
        with listeners(live, "/radio", 20, begin=BEGIN) as process:
            wait_for(lambda: relay(live)["sink_count"] == 20, "all are sinks")
            body = BEGIN.encode() + os.urandom(50_000)
            source.sendall(body)
            wait_for(lambda: relay(live)["out"]["bytes"] == 20 * len(body), "all have it")
            live.agent.kill()
            live.agent.start()
            groups = found(process)
    assert groups == everybody_got(20, body)
    _nothing_left(live)


def test_the_service_is_killed(live: Deployment) -> None:
    """What it had is lost, and everybody is told; the next stream goes through its next life."""
    with encoder(live.network, "/radio") as source:
        wait_for(lambda: mounts(live), "the mount")
        with listeners(live, "/radio", 20) as process:
            wait_for(lambda: relay(live)["sink_count"] == 20, "all are sinks")
            source.sendall(bytes(100_000))
            wait_for(lambda: relay(live)["bytes_in"] == 100_000, "it has come")
            os.kill(live.status()["pid"], signal.SIGKILL)
            assert sum(group["count"] for group in found(process)) == 20
    wait_for(lambda: mounts(live) == [], "the mount is gone", patience=30)
    _nothing_left(live)
    with encoder(live.network, "/radio") as source:
        wait_for(lambda: mounts(live), "the mount again")
        assert mounts(live)[0]["path"] == "offloaded"


def test_the_operator_calls_everything_home(live: Deployment) -> None:
    """`streamlift hand-back --all`: the sockets are the server's again, at the end of an entry."""
    with encoder(live.network, "/radio") as source:
        wait_for(lambda: mounts(live), "the mount")
        with listeners(live, "/radio", 20, begin=BEGIN) as process:
            wait_for(lambda: relay(live)["sink_count"] == 20, "all are sinks")
            body = BEGIN.encode() + os.urandom(50_000)
            source.sendall(body)
            wait_for(lambda: relay(live)["out"]["bytes"] == 20 * len(body), "all have it")
            assert live.call("hand_back", machine="guest")["handed_back"] == 21
            groups = found(process)
    assert groups == everybody_got(20, body)
    _nothing_left(live)


# The API, beyond what the live server does with it.


@contextlib.contextmanager
def application(deployment: Deployment, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`relay_app.py` in the guest."""
    argv = ["ip", "netns", "exec", deployment.network.guest.name, sys.executable, "-m", "tests.namespaces.relay_app", *arguments]
    environment = {**os.environ, "STREAMLIFT_AGENT": str(deployment.folder / "agent.sock")}
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    with process:
        try:
            yield process
        finally:
            process.terminate()


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the application ended"
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.parametrize("family", [4, 6])
def test_two_thousand_udp_sinks_of_a_growing_file(live: Deployment, share: Path, family: int) -> None:
    """With the VM's own address; every datagram, whole packets of the transport stream."""
    network, count, first = live.network, 2000, 20_000
    address, path = network.client_address[family], share / f"live{family}.ts"
    data = b"".join(stream(40))
    path.write_bytes(data[:20_000])
    argv = ["ip", "netns", "exec", network.client.name, sys.executable, "-m", "tests.namespaces.udp_receivers"]
    receivers = subprocess.Popen(
        [*argv, address, str(first), str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with receivers, application(live, "udp", str(path), address, str(first), str(count)) as process:
        assert receivers.stdout is not None and receivers.stdin is not None and process.stdin is not None
        assert receivers.stdout.readline() == "ready\n"
        assert told(process) == {"path": "offloaded", "reason": None, "sinks": count}
        with path.open("ab") as writer:
            for at in range(20_000, len(data), 20_000):
                writer.write(data[at : at + 20_000])
                writer.flush()
                time.sleep(0.1)
        wait_for(lambda: relay(live)["out"]["bytes"] == count * len(data), "all has gone", patience=60)
        process.stdin.write("now\n")
        process.stdin.flush()
        seen = told(process)
        assert seen["status"]["sink_count"] == count and seen["status"]["out"]["turns"] < seen["status"]["out"]["entries"] / 2
        assert seen["ending"]["alive"] and seen["ending"]["reason"] is None
        assert told(process) == {"left": count}
        receivers.stdin.close()
        groups = [json.loads(line) for line in receivers.stdout]
    digest = hashlib.sha256(data).hexdigest()
    whole = {"count": count, "sha256": digest, "bytes": len(data), "from": [network.guest_address[family]]}
    assert [{key: group[key] for key in whole} for group in groups] == [whole]
    assert live.call("relays")["relays"] == []


def test_a_client_that_comes_and_goes_has_no_gap(live: Deployment, share: Path) -> None:
    """Called home at the end of an entry, spoken to by the application, sent out again: ten times on one socket."""
    path, data = share / "film.ts", b"".join(stream(4000))
    path.write_bytes(data)
    with application(live, "back_and_forth", str(path), "9000") as process:
        assert told(process) == {"path": "offloaded", "reason": None}
        with live.network.client.entered():
            sock = socket.create_connection((live.network.guest_address[4], 9000), timeout=20)
        with sock:
            sock.sendall(b"hello, while it is out")
            got = bytearray()
            while not got.endswith(b"<end>"):
                got += sock.recv(1 << 18)
            seen = told(process)
    parts = bytes(got).split(b"<pause>")
    assert len(parts) == 11 and parts[-1] == b"<end>"
    assert b"".join(parts[:-1]) == data[: sum(map(len, parts[:-1]))]
    assert all(len(part) % 188 == 0 for part in parts[:-1]) and sum(bool(part) for part in parts) > 2
    assert [ending["sent"] for ending in seen["endings"]] == [len(part) for part in parts[:-1]]
    assert seen["heard"] == "hello, while it is out"


def test_a_ring_through_relay_after_relay(live: Deployment, share: Path) -> None:
    """Each relay cuts the ring's bytes anew; who is called home from one goes on in the next, and misses nothing."""
    path, size = share / "radio.ring", 20_000 * 20 * 5
    data = b"".join(stream(600))[:size]
    assert len(data) == size
    got = [bytearray(), bytearray()]
    with application(live, "ring", str(path), "9000") as process:
        assert told(process) == {"ready": True} and process.stdin is not None
        with live.network.client.entered():
            clients = [socket.create_connection((live.network.guest_address[4], 9000), timeout=30) for _ in got]
        threads = [threading.Thread(target=_receive, args=both) for both in zip(clients, got, strict=True)]
        for thread in threads:
            thread.start()
        assert os.write(process.stdin.fileno(), data) == size
        stays = [told(process) for _ in range(5)]
        end = told(process)
        for thread in threads:
            thread.join(30)
    assert [(stay["path"], stay["reason"]) for stay in stays] == [("offloaded", None)] * 5
    assert all(0 < max(stay["cursors"]) <= stay["written"] for stay in stays)
    assert end["ended"] == "the source's ring was ended"
    assert [ending["cursor"] for ending in end["endings"]] == [size, size]
    assert got == [data, data]
    assert live.call("relays")["relays"] == []


def _receive(sock: socket.socket, got: bytearray) -> None:
    with sock:
        while more := sock.recv(1 << 16):
            got += more


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """And its key."""
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=test -keyout"
    subprocess.run(["openssl", *words.split(), str(path), "-out", str(path.with_suffix(".crt"))], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


@pytest.mark.parametrize("kind", ["file", "ring"])
def test_clients_that_cannot_move(live: Deployment, share: Path, certificate: Path, kind: str) -> None:
    """The relay is at the host; who speaks TLS or Multipath TCP gets the same bytes, from the guest."""
    data = os.urandom(1_000_000)
    got = [bytearray() for _ in range(3)]
    ciphers = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ciphers.check_hostname, ciphers.verify_mode = False, ssl.CERT_NONE
    with application(live, "unmovable", kind, str(share / kind), "9000", str(certificate)) as process:
        assert told(process) == {"path": "offloaded", "reason": None} and process.stdin is not None
        with live.network.client.entered():
            clients = [socket.create_connection((live.network.guest_address[4], 9000 + at), timeout=30) for at in range(3)]
        clients[0] = ciphers.wrap_socket(clients[0])
        threads = [threading.Thread(target=_receive, args=both) for both in zip(clients, got, strict=True)]
        for thread in threads:
            thread.start()
        assert os.write(process.stdin.fileno(), data) == len(data)
        seen = told(process)
        assert seen["paths"] == ["local", "local", "offloaded"]
        assert (seen["status"]["sink_count"], seen["status"]["sinks_here"]) == (1, 2)
        process.stdin.close()
        endings = told(process)["endings"]
        for thread in threads:
            thread.join(30)
    assert [(one["cursor"], one["sent"], one["alive"]) for one in endings] == [(len(data), len(data), True)] * 3
    assert got == [data] * 3


RING = {"framing": "raw", "ring_entries": 64, "entry_bytes": 4096, "budget_ms": 0, "max_sinks": 10, "first": 0, "rest": ""}
SINK = {"priority": "normal", "join": "latest", "on_lag": "head_drop", "lag_soft": 0, "lag_hard_ms": 0, "begin": None}
TOKEN = "0123456789abcdef" * 2
NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"op": "publish"}, "bad_request"),
    ({"op": "publish", "token": TOKEN, "source": "file", "offset": 0, **RING}, "bad_request"),
    ({"op": "publish", "token": TOKEN, "source": [], **RING}, "bad_request"),
    ({"op": "publish", "token": TOKEN, "source": "ring", "offset": 0, **RING}, "bad_request"),
    ({"op": "publish", "token": TOKEN, "source": "connection", **RING}, "bad_request"),
    ({"op": "publish", "token": TOKEN, "source": "udp", "port": 7000, **RING}, "foreign_address"),
    ({"op": "publish", "token": TOKEN[1:], "source": "udp", "port": 9, **RING}, "bad_request"),
    ({"op": "publish", "token": "f" * 32, "source": "udp", "port": 9, **RING, "framing": {}}, "bad_request"),
    ({"op": "add_sink", "token": TOKEN, "relay": TOKEN, **SINK}, "bad_request"),
    ({"op": "add_udp", "token": TOKEN, "relay": TOKEN, **SINK}, "bad_request"),
    ({"op": "remove_sink", "token": TOKEN}, "bad_request"),
    ({"op": "relay_status", "relay": 7}, "bad_request"),
    ({"op": "close_relay"}, "bad_request"),
]


def test_an_application_that_speaks_nonsense(live: Deployment) -> None:
    """Each is answered, and harms nobody else's relay."""
    with encoder(live.network, "/radio") as source, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        wait_for(lambda: mounts(live), "the mount")
        door.settimeout(10)
        door.connect(str(live.folder / "agent.sock"))
        door.recv(1 << 16)
        for number, (request, reason) in enumerate(NONSENSE):
            door.send(json.dumps({"v": 1, "id": number, **request}).encode())
            answer = json.loads(door.recv(1 << 16))
            assert (answer["id"], answer["outcome"], answer["reason"]) == (number, "local", reason), request
        door.send(json.dumps({"v": 1, "id": 99, "op": "relay_status", "relay": TOKEN}).encode())
        assert json.loads(door.recv(1 << 16)) == {"v": 1, "id": 99, "relay_status": None}
        with listeners(live, "/radio", 3, begin=BEGIN) as process:
            wait_for(lambda: relay(live)["sink_count"] == 3, "all are sinks")
            body = BEGIN.encode() + os.urandom(10_000)
            source.sendall(body)
            source.shutdown(socket.SHUT_WR)
            groups = found(process)
    assert groups == everybody_got(3, body)
