# SPDX-License-Identifier: Apache-2.0
"""The migration demo: a VM moves to another hypervisor and back. ffmpeg plays from it meanwhile, curl downloads one large file on
one connection, and other clients fetch segments. What each got is compared with the files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tests.audience import Crowd
from tests.demo.clients import play
from tests.demo.content import MANIFEST
from tests.vm.moving import Move, Moving

LADDER = "tablet"
DOWNLOAD, DOWNLOAD_BYTES, DOWNLOAD_RATE = "film.bin", 64_000_000, "1500k"
CROWD = Crowd(segments=8, rate=250_000)
MOVES = 2
HEADINGS = ("move", "connections\nthat came home", "drain\nms", "share let go\nms", "in all\nms")
PATIENCE = 180
"""Seconds for ffmpeg and curl to end, after the last move."""


@dataclass
class Found:
    """`moves`: what each migration told; `silences`: seconds of each client; `verdicts`: by program, its fault or nothing."""

    moves: list[Move] = field(default_factory=list)
    silences: list[float] = field(default_factory=list)
    verdicts: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    @property
    def holds(self) -> bool:
        """The VM moved, and nobody got a wrong byte or an error."""
        moved = [move.last.get("moved") for move in self.moves]
        return moved == [True] * MOVES and bool(self.verdicts) and not any(self.verdicts.values())

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "holds": self.holds}

    def show(self, console: Console) -> None:
        """One table, then a line for each watcher."""
        table = Table(title="A VM moved while it was watched", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in HEADINGS:
            table.add_column(heading, justify="right")
        for number, move in enumerate(self.moves, 1):
            table.add_row(str(number), *_cells(move))
        console.print(table)
        silence = max(self.silences, default=0)
        console.print(f"{self.bytes / 1e6:,.0f} MB were compared; the longest silence of a client was {silence:.2f} s.")
        for program, fault in self.verdicts.items():
            console.print(f"{program}: [red]{fault}[/red]" if fault else f"{program}: [green]every byte[/green]")


def _cells(move: Move) -> list[str]:
    left = move.last.get("leave", {})
    values = [*(left.get(key) for key in ("connections", "drain_ms", "share_ms")), move.last.get("total_ms")]
    return ["-" if value is None else f"{value:,.0f}" for value in values]


def add_download(share: Path) -> None:
    """The large file."""
    with (share / DOWNLOAD).open("wb") as file:
        for _ in range(DOWNLOAD_BYTES // 1_000_000):
            file.write(os.urandom(1_000_000))


def watch(scene: Moving, folder: Path, *, say: Callable[[str], None]) -> Found:
    """The whole of it."""
    found, target = Found(), folder / DOWNLOAD
    url = f"http://{scene.address}"
    curl = ["curl", "-sSf", "--max-time", str(PATIENCE), "--limit-rate", DOWNLOAD_RATE, "-o", str(target), f"{url}/{DOWNLOAD}"]
    with contextlib.ExitStack() as stack:
        downloading = stack.enter_context(_watcher(scene, curl))
        playing = stack.enter_context(_watcher(scene, play(f"{url}/{LADDER}/{MANIFEST}", real_time=True)))
        watchers = stack.enter_context(scene.watched(CROWD))
        for number in range(MOVES):
            say(f"move {number + 1} of {MOVES}")
            found.moves.append(scene.end(scene.begin()))
            watchers.wait_out(scene.here)
        seen = watchers.stop()
        say("curl and ffmpeg finish")
        found.verdicts = {"curl": _fault(downloading, target, scene.share), "ffmpeg": _played(playing, scene.share)}
    found.verdicts["other clients"] = "; ".join(seen.faults)
    found.silences = [float(one["largest"]) for one in seen.seen]
    found.bytes = sum(one["bytes"] for one in seen.seen) + target.stat().st_size
    return found


@contextlib.contextmanager
def _watcher(scene: Moving, argv: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Where the clients are; ended however the block ends."""
    command = scene.hosts.fabric.client.command(*argv)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _fault(curl: subprocess.Popen[str], got: Path, share: Path) -> str:
    _, words = curl.communicate(timeout=PATIENCE)
    if curl.returncode:
        return words.strip() or f"exit status {curl.returncode}"
    digests = (hashlib.sha256(path.read_bytes()).digest() for path in (got, share / DOWNLOAD))
    return "" if len(set(digests)) == 1 else "wrong bytes"


def _played(ffmpeg: subprocess.Popen[str], share: Path) -> str:
    output, words = ffmpeg.communicate(timeout=PATIENCE)
    local = subprocess.run(play(str(share / LADDER / MANIFEST)), capture_output=True, text=True, check=True)
    return "" if not ffmpeg.returncode and output == local.stdout else words[-300:].strip() or "wrong bytes"
