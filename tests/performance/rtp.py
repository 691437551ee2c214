# SPDX-License-Identifier: Apache-2.0
"""The same work by rtpengine: one RTP stream of 256 kbit/s to 1,000 UDP receivers, by its userspace forwarding and by the `user`
engine.

    ./run bench rtp [--json FILE] [--plot FILE] [--quick]

One run, in turns, on loopback: processor time of the relaying process for each Gbit/s that its receivers got. rtpengine is asked
through its NG protocol: one publisher, and a subscription for each receiver."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.performance import bench, fanout
from tests.performance.bench import Bar, Report
from tests.performance.peers import FULL, QUICK, Plan, cost, plot, table

RTPENGINE = "/usr/bin/rtpengine"
PORTS = (20000, 60000)
SIDES = ("rtpengine", "user, 0 ms", "user, 50 ms", "user, 200 ms")
LIMIT = 2
CAVEAT = (
    "loopback: receiving is part of each send here, in all columns. rtpengine sends each packet when it comes, as a telephone call"
    " needs it: of the engine's columns the one with 0 ms does the same, the others let a packet wait for others. Its kernel"
    " module, which forwards to at most 32 receivers a stream, is not used."
)
_HEADER = struct.Struct("!BBHII")
_VERSION, _PAYLOAD_TYPE, _SOURCE = 0x80, 0, 0x534C
"""RFC 3550, section 5.1."""


Value = int | bytes | str | dict[str, "Value"]


def encode(value: Value) -> bytes:
    """Bencode (BEP 3), as far as the NG protocol's questions need it."""
    if isinstance(value, int):
        return b"i%de" % value
    if isinstance(value, dict):
        return b"d" + b"".join(encode(key) + encode(value[key]) for key in sorted(value)) + b"e"
    raw = value.encode() if isinstance(value, str) else value
    return b"%d:%s" % (len(raw), raw)


def decode(raw: bytes, at: int = 0) -> tuple[Any, int]:
    """A value, and where the next one begins. Raises ValueError."""
    kind = raw[at : at + 1]
    if kind in (b"d", b"l"):
        items, at = [], at + 1
        while raw[at : at + 1] != b"e":
            item, at = decode(raw, at)
            items.append(item)
        found: Any = items if kind == b"l" else {key.decode(): item for key, item in zip(items[::2], items[1::2], strict=True)}
        return found, at + 1
    if kind == b"i":
        end = raw.index(b"e", at)
        return int(raw[at + 1 : end]), end + 1
    end = raw.index(b":", at)
    length = int(raw[at:end])
    return raw[end + 1 : end + 1 + length], end + 1 + length


def description(port: int, way: str) -> str:
    """SDP of one end (RFC 8866): `way` is sendonly or recvonly."""
    head = "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=-\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
    return f"{head}m=audio {port} RTP/AVP 0\r\na=rtpmap:0 PCMU/8000\r\na={way}\r\na=rtcp-mux\r\n"


class Rtpengine:
    """A running one, and its door."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self._door = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._door.connect(("127.0.0.1", port))
        self._door.settimeout(5)
        self._asked = 0

    def ask(self, command: str, **arguments: str) -> dict[str, Any]:
        """One question. Raises RuntimeError."""
        self._asked += 1
        words: dict[str, Value] = {"command": command, "call-id": "bench"}
        words |= {name.replace("_", "-"): value for name, value in arguments.items()}
        self._door.send(b"%d %s" % (self._asked, encode(words)))
        answer: dict[str, Any] = decode(self._door.recv(1 << 16).split(b" ", 1)[1])[0]
        if answer.get("result") not in (b"ok", b"pong"):
            raise RuntimeError(f"rtpengine: {command}: {answer}")
        return answer

    def publish(self, port: int) -> int:
        """One stream comes from `port`; where it is to be sent."""
        answer = self.ask("publish", from_tag="source", sdp=description(port, "sendonly"))
        return int(answer["sdp"].split(b"m=audio ")[1].split()[0])

    def subscribe(self, number: int, port: int) -> None:
        """The stream goes to `port` too."""
        self.ask("subscribe request", from_tag="source", to_tag=f"sink{number}")
        self.ask("subscribe answer", to_tag=f"sink{number}", sdp=description(port, "recvonly"))

    def close(self) -> None:
        """Close the door."""
        self._door.close()


@contextlib.contextmanager
def rtpengine(log: Path) -> Iterator[Rtpengine]:
    """On loopback, without its kernel module."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [RTPENGINE, "--foreground", "--table=-1", "--interface=127.0.0.1", f"--listen-ng=127.0.0.1:{port}", "--log-stderr"]
    argv += [f"--port-min={PORTS[0]}", f"--port-max={PORTS[1]}", "--log-level=3", f"--num-threads={os.cpu_count()}"]
    with log.open("wb") as output, subprocess.Popen(argv, stdout=output, stderr=output) as process:
        running = Rtpengine(process, port)
        try:
            _await(running, log)
            yield running
        finally:
            running.close()
            process.terminate()


def _await(running: Rtpengine, log: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        with contextlib.suppress(OSError):
            running.ask("ping")
            return
        if time.monotonic() > deadline or running.process.poll() is not None:
            raise RuntimeError(f"rtpengine does not answer: {log.read_text()[-500:]}")
        time.sleep(0.05)


@contextlib.contextmanager
def receivers(count: int) -> Iterator[list[socket.socket]]:
    """UDP sockets on loopback that take from anybody."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            made.append(stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
            made[-1].bind(("127.0.0.1", 0))
        yield made


def feed(encoder: socket.socket, seconds: float) -> int:
    """Send packets of PIECE bytes at the rate for so long; how many."""
    interval, begun, sent = fanout.PIECE * 8 / fanout.RATE, time.monotonic(), 0
    while (due := begun + sent * interval) < begun + seconds:
        time.sleep(max(due - time.monotonic(), 0))
        header = _HEADER.pack(_VERSION, _PAYLOAD_TYPE, sent & 0xFFFF, sent * round(8000 * interval), _SOURCE)
        encoder.send(header + os.urandom(fanout.PIECE - _HEADER.size))
        sent += 1
    return sent


def measure_rtpengine(programs: dict[str, Path], folder: Path, plan: Plan) -> dict[str, Any]:
    """One measurement."""
    with rtpengine(folder / "rtpengine.log") as running, receivers(plan.listeners) as socks:
        encoder = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        encoder.bind(("127.0.0.1", 0))
        with encoder, fanout.consecutive(socks) as first:
            port, before = running.publish(encoder.getsockname()[1]), fanout.resident(running.process.pid)
            for number, sock in enumerate(socks):
                running.subscribe(number, sock.getsockname()[1])
            memory = (fanout.resident(running.process.pid) - before) / len(socks)
            encoder.connect(("127.0.0.1", port))
            drain = fanout.start([str(programs["drain"]), str(first), str(len(socks))], first, len(socks))
            spent, begun = fanout.processor_time(running.process.pid), time.monotonic()
            pieces = feed(encoder, plan.seconds)
            time.sleep(0.35)
            spent, took = fanout.processor_time(running.process.pid) - spent, time.monotonic() - begun
            delivered, longest = fanout.received(drain)
    row = {"side": "rtpengine", "sinks": plan.listeners, "seconds": took, "processor_seconds": spent, "memory_per_sink": memory}
    expected = pieces * fanout.PIECE * plan.listeners
    return {**row, "delivered": delivered, "expected": expected, "longest_gap_ms": longest}


def measure(programs: dict[str, Path], folder: Path, plan: Plan) -> list[dict[str, Any]]:
    """All rows, the sides in turn."""
    rows = []
    for _ in range(plan.repeats):
        rows.append(measure_rtpengine(programs, folder, plan))
        rows += [fanout.one(programs, side, udp=True, count=plan.listeners, seconds=plan.seconds) for side in SIDES[1:]]
    return rows


# Judging: pure.


def verdicts(rows: list[dict[str, Any]]) -> list[Bar]:
    """How many times better, and that everybody got everything."""
    better = cost(rows, "rtpengine") / cost(rows, "user, 200 ms")
    least = min(row["delivered"] / row["expected"] for row in rows)
    return [
        Bar("rtpengine's processor time by that of user, 200 ms", better, "times", LIMIT, ">="),
        Bar("bytes delivered of those expected, least", least, "", 1, ">="),
    ]


def main() -> int:
    """Entry point; the exit status."""
    options = bench.arguments("one RTP stream to many, beside rtpengine")
    plan = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as name:
        rows = measure(fanout.build(Path(name)), Path(name), plan)
    report = Report("rtp", CAVEAT, rows)
    report.bars = verdicts(rows)
    if options.plot:
        plot(report, options.plot, SIDES)
    return bench.finish(report, options, [table(rows, SIDES)])


if __name__ == "__main__":
    sys.exit(main())
