# SPDX-License-Identifier: Apache-2.0
"""The example media server over loopback, as clients see it; once with an agent that takes the bodies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent import offload
from guest_agent.examples import media_server
from guest_agent.examples.http_request import HttpError, Request, parse_head, parse_ranges
from guest_agent.examples.media_files import Root
from guest_agent.examples.media_server import Service
from tests.guest_agent.protocol_agent import ProtocolAgent

BLOB = os.urandom(2_000_000)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    inner = root / "served"
    (inner / "live").mkdir(parents=True)
    (inner / "blob.m4s").write_bytes(BLOB)
    (inner / "live" / "a b.m3u8").write_bytes(b"#EXTM3U\n")
    (inner / "empty.ts").write_bytes(b"")
    (inner / "inside").symlink_to("blob.m4s")
    (inner / "outside").symlink_to(root / "secret")
    (root / "secret").write_bytes(b"secret")
    os.mkfifo(inner / "fifo")
    return inner


class Running:
    """A server in a thread."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.service = Service(Root(str(root)), media_server.send_offloaded, **options)
        self._listener = media_server.listen("", 0)
        self.port: int = self._listener.getsockname()[1]
        self._ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._main(),))
        self._thread.start()
        self._ready.wait(5)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._loop.call_soon(self._ready.set)
        await media_server.run(self._listener, self.service, self._stop)
        offload.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    def say(self, data: bytes) -> bytes:
        """Send bytes as they are; everything until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            sock.sendall(data)
            return b"".join(iter(lambda: sock.recv(1 << 16), b""))


@pytest.fixture(autouse=True)
def no_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMLIFT_AGENT", str(tmp_path / "agent.sock"))


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Running]:
    running = Running(root)
    yield running
    running.stop()


@pytest.fixture
def client(server: Running) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(server.connect()) as connection:
        yield connection


Answered = tuple[int, dict[str, str], bytes]


def ask(client: http.client.HTTPConnection, path: str, *, method: str = "GET", **options: Any) -> Answered:
    client.request(method, path, **options)
    response = client.getresponse()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def test_whole_files_on_one_connection(client: http.client.HTTPConnection) -> None:
    for _ in range(3):
        status, headers, body = ask(client, "/blob.m4s?token=1")
        assert (status, headers["content-type"], body) == (200, "video/iso.segment", BLOB)
        assert headers["connection"] == "keep-alive"
    status, headers, body = ask(client, "/live/a%20b.m3u8")
    assert (headers["content-type"], body) == ("application/vnd.apple.mpegurl", b"#EXTM3U\n")
    assert ask(client, "/empty.ts")[::2] == (200, b"")
    assert ask(client, "/inside")[2] == BLOB


def test_ipv6(server: Running) -> None:
    with contextlib.closing(http.client.HTTPConnection("::1", server.port, timeout=10)) as client:
        assert ask(client, "/blob.m4s")[2] == BLOB


def test_head(client: http.client.HTTPConnection) -> None:
    status, headers, body = ask(client, "/blob.m4s", method="HEAD", headers={"Range": "bytes=0-1"})
    assert (status, headers["content-length"], body) == (200, str(len(BLOB)), b"")
    assert ask(client, "/nothing", method="HEAD")[0] == 404
    assert ask(client, "/blob.m4s")[2] == BLOB


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("0-0", 0, 0),
        ("5-99", 5, 99),
        ("1999990-", 1999990, 1999999),
        ("-7", 1999993, 1999999),
        ("9-9999999", 9, 1999999),
    ],
)
def test_one_range(client: http.client.HTTPConnection, asked: str, first: int, last: int) -> None:
    status, headers, body = ask(client, "/blob.m4s", headers={"Range": f"bytes={asked}"})
    assert (status, headers["content-range"]) == (206, f"bytes {first}-{last}/{len(BLOB)}")
    assert body == BLOB[first : last + 1]


@pytest.mark.parametrize("asked", ["bytes=2000000-", "bytes=-0", "bytes=3000000-4000000"])
def test_ranges_beyond(client: http.client.HTTPConnection, asked: str) -> None:
    status, headers, body = ask(client, "/blob.m4s", headers={"Range": asked})
    assert (status, headers["content-range"], body) == (416, f"bytes */{len(BLOB)}", b"")


@pytest.mark.parametrize("asked", ["lines=1-2", "bytes=5-4", "bytes=a-b", "bytes=-", "bytes=" + ",".join(["1-2"] * 17)])
def test_ranges_that_are_ignored(client: http.client.HTTPConnection, asked: str) -> None:
    assert ask(client, "/blob.m4s", headers={"Range": asked})[::2] == (200, BLOB)


def test_many_ranges(client: http.client.HTTPConnection) -> None:
    status, headers, body = ask(client, "/blob.m4s", headers={"Range": "bytes=0-9, 100-200000, -5"})
    assert status == 206 and len(body) == int(headers["content-length"])
    boundary = headers["content-type"].removeprefix("multipart/byteranges; boundary=").encode()
    parts = body.split(b"\r\n--" + boundary)
    assert parts[0] == b"" and parts[-1] == b"--\r\n"
    bodies = [part.partition(b"\r\n\r\n")[2] for part in parts[1:-1]]
    assert bodies == [BLOB[:10], BLOB[100:200001], BLOB[-5:]]
    assert b"Content-Range: bytes 100-200000/2000000" in parts[2]


def test_conditions(client: http.client.HTTPConnection) -> None:
    _, headers, _ = ask(client, "/blob.m4s")
    etag, modified = headers["etag"], headers["last-modified"]
    early = "Sun, 06 Nov 1994 08:49:37 GMT"

    def status(**conditions: str) -> int:
        named = {name.replace("_", "-"): value for name, value in conditions.items()}
        return ask(client, "/blob.m4s", headers=named)[0]

    assert status(If_None_Match=etag) == status(If_None_Match=f'"x", W/{etag}') == status(If_None_Match="*") == 304
    assert status(If_None_Match='"x"', If_Modified_Since=modified) == 200
    assert status(If_Modified_Since=modified) == 304
    assert status(If_Modified_Since=early) == status(If_Modified_Since="nonsense") == 200
    assert status(Range="bytes=0-1", If_Range=etag) == status(Range="bytes=0-1", If_Range=modified) == 206
    assert status(Range="bytes=0-1", If_Range='"x"') == status(Range="bytes=0-1", If_Range=early) == 200


def test_a_condition_that_holds_has_no_body(server: Running) -> None:
    said = server.say(b"GET /blob.m4s HTTP/1.1\r\nHost: x\r\nIf-None-Match: *\r\nConnection: close\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 304 Not Modified\r\n") and said.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("size", [0, 1, 700_000])
def test_uploads(client: http.client.HTTPConnection, method: str, size: int) -> None:
    status, _, body = ask(client, "/upload", method=method, body=BLOB[:size])
    assert status == 200
    assert json.loads(body) == {"bytes": size, "sha256": hashlib.sha256(BLOB[:size]).hexdigest()}
    assert ask(client, "/blob.m4s")[2] == BLOB


def test_chunked_uploads(client: http.client.HTTPConnection) -> None:
    pieces = iter([BLOB[:1], BLOB[1:100_000], BLOB[100_000:400_000]])
    client.request("POST", "/upload", body=pieces, encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    told = json.loads(client.getresponse().read())
    assert told == {"bytes": 400_000, "sha256": hashlib.sha256(BLOB[:400_000]).hexdigest()}
    assert ask(client, "/blob.m4s")[2] == BLOB


def test_expect_100_continue(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(b"PUT /u HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"abc")
        assert hashlib.sha256(b"abc").hexdigest().encode() in sock.recv(10000)


def test_pipelining(server: Running) -> None:
    """Requests of every kind in one segment: the answers come in order, and nothing of one leaks into another."""
    get = b"GET /blob.m4s HTTP/1.1\r\nHost: x\r\nRange: bytes=%d-%d\r\n\r\n"
    put = b"PUT /u HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    last = b"GET /blob.m4s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    said = server.say(get % (0, 99_999) + put + get % (7, 7) + get % (100_000, 299_999) + last)
    bodies = []
    while said:
        head, _, said = said.partition(b"\r\n\r\n")
        length = int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0])
        bodies.append(said[:length])
        said = said[length:]
    assert [bodies[0], *bodies[2:]] == [BLOB[:100_000], BLOB[7:8], BLOB[100_000:300_000], BLOB]
    assert json.loads(bodies[1])["sha256"] == hashlib.sha256(b"hello").hexdigest()


def test_a_request_byte_by_byte(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"\r\nGET /live/a%20b.m3u8 HTTP/1.0\r\n\r\n":
            sock.send(bytes([byte]))
        assert b"".join(iter(lambda: sock.recv(1000), b"")).endswith(b"\r\n\r\n#EXTM3U\n")


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /blob.m4s HTTP/1.1\r\n\r\n", 400),
        (b"GET blob.m4s HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n folded: 1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: x\r\nExpect: magic\r\n\r\n", 417),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"DELETE /blob.m4s HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 17000, 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431),
    ],
)
def test_bad_requests_are_told_so(server: Running, said: bytes, status: int) -> None:
    answer = server.say(said)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"Connection: close" in answer


@pytest.mark.parametrize(
    "path",
    ["/", "/live", "/nothing", "/../secret", "/live/../../secret", "/%2e%2e/secret", "/..%2fsecret", "/outside"]
    + ["/fifo", "//etc/passwd", "/%2fetc/passwd", "/blob.m4s%00", "/blob.m4s/", "/" + "a" * 5000],
)
def test_what_is_not_there(server: Running, path: str) -> None:
    said = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\nGET /inside HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = server.say(said.encode())
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert answer.endswith(BLOB[-100:])


def test_silent_clients_are_let_go(root: Path) -> None:
    running = Running(root, idle_limit=0.2)
    assert running.say(b"GET /half") == b""
    running.stop()


def test_a_client_that_stops_reading_is_waited_for(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(b"GET /blob.m4s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" * 1)
        time.sleep(0.3)
        assert b"".join(iter(lambda: sock.recv(1 << 16), b"")).endswith(BLOB)


def test_fifty_clients_at_once(server: Running) -> None:
    failures: list[int] = []

    def work(number: int) -> None:
        with contextlib.closing(server.connect()) as client:
            for turn in range(4):
                first = number * 1000 + turn
                body = ask(client, "/blob.m4s", headers={"Range": f"bytes={first}-{first + 150_000}"})[2]
                if body != BLOB[first : first + 150_001]:
                    failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failures


def test_bodies_are_offloaded(root: Path, tmp_path: Path) -> None:
    with ProtocolAgent(str(tmp_path / "agent.sock"), shares=[str(root)]) as agent:
        running = Running(root)
        with contextlib.closing(running.connect()) as client:
            for _ in range(3):
                assert ask(client, "/blob.m4s")[2] == BLOB
            assert ask(client, "/live/a%20b.m3u8")[2] == b"#EXTM3U\n"
            assert ask(client, "/blob.m4s", headers={"Range": "bytes=9-199999,-100000"})[0] == 206
            assert ask(client, "/upload", method="POST", body=b"x")[0] == 200
            told = json.loads(ask(client, "/.streamlift")[2])
        running.stop()
        assert told["offloaded"] == len(agent.requests) == 5
        assert told["local"] == {"too_small": 1}
        assert told["requests"] == 6 and told["failed"] == 0 and told["uploads"] == 1
        assert told["bytes"] == 3 * len(BLOB) + 8 + 199_991 + 100_000


def test_the_command_and_its_graceful_end(root: Path) -> None:
    """SIGTERM: the idle connection closes, the answer under way is finished, the port is closed."""
    command = [sys.executable, "-m", "guest_agent.examples.media_server", "--root", str(root), "--port", "0"]
    with subprocess.Popen([*command, "--no-offload"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        idle = socket.create_connection(("127.0.0.1", port), timeout=10)
        busy = socket.socket()
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        busy.settimeout(10)
        with idle, busy:
            busy.connect(("127.0.0.1", port))
            busy.sendall(b"GET /blob.m4s HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
            start = busy.recv(1000)
            process.send_signal(signal.SIGTERM)
            assert idle.recv(10) == b""
            said = start + b"".join(iter(lambda: busy.recv(1 << 16), b""))
        assert said.startswith(b"HTTP/1.1 200 OK") and said.endswith(BLOB[-1000:])
        assert said.count(b"HTTP/1.1 200 OK") < 20
        assert process.wait(10) == 0


def test_the_command_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert media_server.main(["--root", str(tmp_path / "nowhere")]) == 1
    assert "No such file" in capsys.readouterr().err


# Pure parts.


@given(st.text(alphabet="0123456789-, =bytes", max_size=40), st.integers(0, 1000))
def test_any_range_header_stays_inside(text: str, size: int) -> None:
    for offset, count in parse_ranges("bytes=" + text, size) or []:
        assert 0 <= offset < offset + count <= size


@given(st.binary(max_size=200))
def test_any_head_is_parsed_or_refused(head: bytes) -> None:
    for data in (head + b"\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n"):
        try:
            assert isinstance(parse_head(data), Request)
        except HttpError as error:
            assert 400 <= error.status <= 505


def test_absolute_targets() -> None:
    assert parse_head(b"GET http://host:80/a%2Fb?c HTTP/1.1\r\nHost: x\r\n\r\n").path == b"a/b"


def test_a_port_that_is_taken_is_said_with_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        assert media_server.main(["--root", str(tmp_path), "--host", "0.0.0.0", "--port", str(port)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"media_server: port {port} is taken"
    assert f"ss -ltnp 'sport = :{port}'" in second and "--port" in second
