# SPDX-License-Identifier: Apache-2.0
"""The live demo: ffmpeg encodes a transport stream into the VM, fifty curls and ffmpegs watch it through the host, and some of
them stop reading for a while. What each got must decode without an error."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.vm.libvirt_host import wait_for
from tests.vm.product import Product
from tests.vm.setups import ADDRESS

PASSWORD = "hackme"
PORT, MOUNT = 8000, "/film"
CLIENTS, STALLED, PLAYERS = 50, 5, 5
"""Clients in all; curls that stall; clients that are ffmpeg."""
STALL = 20
"""Seconds."""
ENCODE = ("-f", "lavfi", "-i", "testsrc=size=320x180:rate=25", "-f", "lavfi", "-i", "sine", "-g", "25", "-bf", "0")
CODECS = ("-c:v", "libx264", "-preset", "ultrafast", "-b:v", "300k", "-c:a", "aac", "-f", "mpegts", "-content_type", "video/mp2t")


@dataclass
class Found:
    """`bytes`: of each curl; `frames`: pictures that each client could decode; `relay`: what the service counted."""

    bytes: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    relay: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Everybody saw it, and the host sent it."""
        return not self.faults and len(self.frames) == CLIENTS and min(self.frames) > 25 and self.relay.get("sink_count") == CLIENTS

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "holds": self.holds}

    def show(self, console: Console) -> None:
        """One table."""
        out = self.relay["out"]
        table = Table("clients", "frames decoded", "engine", "sends", "entries a send", "MB out", "lost", "faults")
        sends = f"{out['entries'] / max(out['turns'], 1):.1f}"
        lost = out["overrun"] + out["lagged"]
        row = (len(self.frames), f"{min(self.frames)} to {max(self.frames)}", self.relay["engine"], out["turns"], sends)
        table.add_row(*(str(cell) for cell in (*row, f"{out['bytes'] / 1e6:.1f}", lost, len(self.faults))))
        console.print(table)
        for fault in self.faults:
            console.print(fault)


def watch(product: Product, folder: Path) -> Found:
    """The whole of it."""
    client = product.host.client
    target = f"icecast://source:{PASSWORD}@{ADDRESS}:{PORT}{MOUNT}"
    url = f"http://{ADDRESS}:{PORT}{MOUNT}"
    argv = client.command("ffmpeg", "-v", "error", "-re", *ENCODE, *CODECS, target)
    found = Found()
    wait_for(lambda: _is_there(client, f"http://{ADDRESS}:{PORT}/"), seconds=60, what="the live server")
    outputs = [folder / f"client{number}.ts" for number in range(CLIENTS)]
    with contextlib.ExitStack() as stack:
        encoder = stack.enter_context(_ended(subprocess.Popen(argv, stderr=subprocess.PIPE)))
        wait_for(lambda: _is_there(client, url), seconds=30, what="the stream")
        watching = [stack.enter_context(_ended(_start(client, url, path, number))) for number, path in enumerate(outputs)]
        wait_for(lambda: _relay(product).get("sink_count") == CLIENTS, seconds=90, what="all clients at the host")
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in watching[-STALLED:]:
                process.send_signal(number)
            time.sleep(STALL if number == signal.SIGSTOP else 2)
        found.relay = _relay(product)
        encoder.send_signal(signal.SIGINT)  # it finishes what it has begun
        assert encoder.stderr is not None
        found.faults += [f"encoder: {line.decode().strip()}" for line in encoder.stderr]
        for process in watching:
            process.wait(30)
    for path in outputs:
        frames, words = _decode(path)
        found.frames.append(frames)
        found.bytes.append(path.stat().st_size)
        found.faults += [f"{path.name}: {line}" for line in words]
    return found


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """However the block ends."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def _start(client: Any, url: str, path: Path, number: int) -> subprocess.Popen[bytes]:
    argv = ["curl", "-s", "-o", str(path), url]
    if number < PLAYERS:
        argv = ["ffmpeg", "-v", "quiet", "-i", url, "-c", "copy", "-f", "mpegts", str(path)]
    return subprocess.Popen(client.command(*argv))


def _is_there(client: Any, url: str) -> bool:
    return not subprocess.run(client.command("curl", "-sfI", "-m", "5", url), stdout=subprocess.DEVNULL, check=False).returncode


def _relay(product: Product) -> dict[str, Any]:
    rows = json.loads(product.command("relays", "--json"))
    return dict(rows[0]) if rows else {}


def _decode(path: Path) -> tuple[int, list[str]]:
    """Pictures, and what ffmpeg has to complain of."""
    argv = ["ffmpeg", "-v", "error", "-progress", "-", "-i", str(path), "-f", "null", "-"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    frames = [int(line.split("=")[1]) for line in done.stdout.splitlines() if line.startswith("frame=")]
    return max(frames, default=0), done.stderr.splitlines()
