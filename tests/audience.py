# SPDX-License-Identifier: Apache-2.0
"""A stream that is fed and an audience that watches, as processes where the test wants them, for as long as a block lasts."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATHS = os.environ.get("PYTHONPATH", str(ROOT))
LIVE, GROWING = "film", "grown.ts"
"""Paths of the streams: what an encoder sends, and a file in the share's folder `live`."""
LONGEST = 900
"""Seconds after which everything of this ends by itself."""
Inside = Callable[..., list[str]]
"""The command line that runs a program where the clients are."""


@dataclass
class Found:
    """What an audience saw, once it was stopped: see `viewers.py`. `bins`: bytes by tenth of a second of CLOCK_MONOTONIC."""

    seen: list[dict[str, Any]] = field(default_factory=list)
    bins: dict[int, int] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """Everything that anybody complains of."""
        return [f"{one['kind']} {one['port']}: {one['fault']}" for one in self.seen if one["fault"]]

    def gaps(self, kind: str) -> list[tuple[int, int]]:
        """Of all sinks of that kind."""
        return [tuple(gap) for one in self.seen if one["kind"] == kind for gap in one["gaps"]]

    def longest_silence(self, kind: str) -> float:
        """Seconds."""
        return max((float(one["largest"]) for one in self.seen if one["kind"] == kind), default=0.0)


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """How many watch: segments (with a `pause` of so many seconds between two), the encoder's stream, the file that grows. `rate`:
    bytes a second that each takes, 0: all that it can get; `port`: where the segments are."""

    segments: int = 0
    lives: int = 0
    files: int = 0
    pause: float = 0.2
    rate: float = 0
    port: int = 80

    @property
    def sinks(self) -> int:
        """Of both streams."""
        return self.lives + self.files


class Audience:
    """Clients of one server; `watching` starts them. `viewers`: addresses and ports of those that fetch segments."""

    def __init__(self, process: subprocess.Popen[str], count: int) -> None:
        self._process, self._count = process, count
        self.viewers: set[str] = set()

    def wait_for_all(self) -> None:
        """Until each has its first byte. Raises RuntimeError if one has to complain."""
        assert self._process.stdout is not None
        for _ in range(self._count):
            line = self._process.stdout.readline()
            word, _, rest = line.partition(" ")
            if word != "here":
                raise RuntimeError(f"an audience of {self._count}: {line.strip() or 'it ended'}")
            kind, _, address = rest.strip().partition(" ")
            if kind == "viewer":
                self.viewers.add(address)

    def stop(self) -> Found:
        """Each finishes what it has begun; what they saw."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        last = [line for line in self._process.stdout if line.startswith("{")]
        self._process.wait(60)
        told = json.loads(last[-1])
        return Found(told["seen"], dict(told["bins"]))


@contextlib.contextmanager
def watching(inside: Inside, server: str, root: Path, crowd: Crowd) -> Iterator[Audience]:
    """Viewers of the ladders below `root`, sinks of the two streams; all have their first byte."""
    argv = ["--server", server, "--root", str(root), "--segments", str(crowd.segments), "--pause", str(crowd.pause)]
    argv += ["--rate", str(crowd.rate), "--port", str(crowd.port)]
    argv += ["--live", LIVE, "--lives", str(crowd.lives), "--file", GROWING, "--files", str(crowd.files)]
    with _running(inside, "tests.viewers", *argv) as process:
        audience = Audience(process, crowd.segments + crowd.sinks)
        audience.wait_for_all()
        yield audience


@contextlib.contextmanager
def feeding(inside: Inside, server: str, share: Path, *, password: str, port: int = 8000) -> Iterator[None]:
    """Both streams; they are there."""
    (share / "live").mkdir(exist_ok=True)
    argv = ["--encoder", f"{server}:{port}/{LIVE}", "--password", password, "--file", str(share / "live" / GROWING)]
    with _running(inside, "tests.feeder", *argv) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the streams did not begin")
        yield


@contextlib.contextmanager
def _running(inside: Inside, module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Bounded by itself (`--seconds`), by the end of its standard input, and by the end of the block."""
    argv = inside("env", f"PYTHONPATH={PATHS}", sys.executable, "-m", module, *arguments, "--seconds", str(LONGEST))
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()
