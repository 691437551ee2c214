# SPDX-License-Identifier: Apache-2.0
"""Every benchmark there is, one after the other, into one JSON file and one page.

    sudo ./run bench all --out DIR [--quick] [--only NAME]

DIR/report.json has the form of `schema.py`, DIR/report.html the plots. A part that was measured already, by this version and at
this length, is not measured again: after an interruption the same command goes on. A part has its share of forty minutes
(`--quick`: six) and some of what others leave of theirs; one that takes longer is ended, and the page says so."""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tests.performance import bench, page
from tests.performance.schema import Machine, Measured, Part, Suite

HERE = Path(__file__).resolve().parent
FULL_SECONDS, QUICK_SECONDS = 40 * 60.0, 6 * 60.0
WEIGHTS = {
    "dash": 45,
    "fanout": 46,
    "warm": 45,
    "peers": 24,
    "migrate": 23,
    "overload": 17,
    "files": 15,
    "rtp": 12,
    "handoff": 5,
    "payload": 5,
    "moves": 3,
}
"""Shares of the time. Of forty minutes they are tens of seconds: what each was seen to need on two processors, and some more."""
WEIGHT = 10
"""Of one that is not there."""
SEED = 1
GRACE = 20.0
"""Seconds for a part whose time is over to take down what it put up."""
FAILED = 1
"""The exit status if a part was not measured."""
PROGRAMS = {
    "qemu": ("qemu-system-x86_64", "--version"),
    "libvirt": ("libvirtd", "--version"),
    "nft": ("nft", "--version"),
    "curl": ("curl", "--version"),
    "icecast": ("icecast2", "-v"),
    "gcc": ("gcc", "--version"),
}


@dataclass(frozen=True)
class Benchmark:
    """One that was found: what it shows is the first paragraph of its own words."""

    name: str
    shows: str
    budget: float


def discover(seconds: float, only: Sequence[str] = ()) -> list[Benchmark]:
    """All files of this folder that have a benchmark's options, with their shares of `seconds`. Raises ValueError."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.py"))}
    names = [name for name, tree in trees.items() if _has_options(tree)]
    unknown = set(only) - set(names)
    if unknown:
        raise ValueError(f"no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    names = [name for name in names if not only or name in only]
    total = sum(WEIGHTS.get(name, WEIGHT) for name in names)
    return [Benchmark(name, _shows(trees[name]), seconds * WEIGHTS.get(name, WEIGHT) / total) for name in names]


def _has_options(tree: ast.Module) -> bool:
    """Whether it calls `arguments` of `bench`."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(call, ast.Attribute) and (ast.unparse(call.value), call.attr) == ("bench", "arguments") for call in calls)


def _shows(tree: ast.Module) -> str:
    paragraph = (ast.get_docstring(tree) or "").split("\n\n")[0]
    return " ".join(paragraph.split())


# One part.


def measure(benchmark: Benchmark, folder: Path, *, quick: bool, budget: float) -> Part:
    """Run it in a process of its own, which is ended with all that it started when its time is over."""
    report, plot, log = (folder / f"{benchmark.name}.{kind}" for kind in ("json", "png", "log"))
    for path in (report, plot):
        path.unlink(missing_ok=True)
    argv = [sys.executable, "-m", f"tests.performance.{benchmark.name}", "--json", str(report), "--plot", str(plot)]
    argv += ["--quick"] if quick else []
    begun = time.monotonic()
    with log.open("wb") as output:
        status = _run(argv, output, budget)
    command = ["./run", "bench", benchmark.name, *(["--quick"] if quick else [])]
    facts: dict[str, Any] = {"name": benchmark.name, "shows": benchmark.shows, "command": command}
    facts |= {"seconds": round(time.monotonic() - begun, 1), "budget_seconds": round(benchmark.budget, 1)}
    if status in (0, bench.FALLS_SHORT):
        with contextlib.suppress(OSError, ValueError):
            found = Measured.model_validate(_without_nan(json.loads(report.read_text())))
            return Part(**facts, outcome="measured", report=found, plot=base64.b64encode(plot.read_bytes()).decode())
    words = log.read_text(errors="replace")[-1000:]
    return Part(**facts, outcome="out of time" if status is None else "failed", words=words)


def _run(argv: Sequence[str], output: Any, seconds: float) -> int | None:
    """The exit status; None: its time was over."""
    environment = {**os.environ, "PYTHONHASHSEED": str(SEED)}
    with subprocess.Popen(argv, cwd=bench.ROOT, stdout=output, stderr=output, env=environment, process_group=0) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """It is asked first, so that it takes down what it put up; what is left of its process group is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what could not be computed is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list) else value


# All parts.


def resumed(path: Path, benchmark: Benchmark, *, quick: bool) -> Part | None:
    """What an earlier run has measured, if it is worth as much as a new measurement."""
    try:
        part = Part.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    same = part.report is not None and part.report.versions == bench.versions() and ("--quick" in part.command) is quick
    return part if same and part.name == benchmark.name else None


def run(benchmarks: Sequence[Benchmark], out: Path, *, quick: bool, total: float) -> Iterator[Part]:
    """Each part as it is done; all of them within `total` seconds."""
    parts = out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + total
    left = list(benchmarks)
    while left:
        benchmark = left.pop(0)
        kept = parts / f"{benchmark.name}.part.json"
        part = resumed(kept, benchmark, quick=quick)
        if part is None:
            part = measure(benchmark, parts, quick=quick, budget=allowed(benchmark, left, deadline - time.monotonic()))
            kept.write_text(part.model_dump_json(indent=1))
        yield part


def allowed(benchmark: Benchmark, others: Sequence[Benchmark], remaining: float) -> float:
    """Seconds for this one: its share, and more as long as each of the others still has half of its own."""
    spare = remaining - sum(other.budget for other in others) / 2
    return max(min(max(benchmark.budget, spare), remaining), 0.1)


def versions() -> dict[str, str]:
    """Of all that may take part: the first line that each program says of itself."""
    found = bench.versions()
    for name, argv in PROGRAMS.items():
        with contextlib.suppress(OSError):
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            found[name] = (done.stdout or done.stderr).split("\n", 1)[0].strip()
    return found


def suite(benchmarks: Sequence[Benchmark], options: argparse.Namespace, total: float) -> Suite:
    """Measure, with a bar that moves."""
    begun, start = datetime.now(UTC), time.monotonic()
    console = Console(stderr=True)
    counted = TextColumn("{task.completed:.0f}/{task.total:.0f} parts")
    columns = (TextColumn("{task.description}"), BarColumn(), counted, TimeElapsedColumn())
    parts = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(benchmarks[0].name, total=len(benchmarks))
        for part in run(benchmarks, options.out, quick=options.quick, total=total):
            parts.append(part)
            console.print(_line(part))
            following = benchmarks[len(parts)].name if len(parts) < len(benchmarks) else "done"
            progress.update(task, advance=1, description=following)
    return Suite(
        begun=begun.isoformat(timespec="seconds"),
        quick=options.quick,
        seconds=round(time.monotonic() - start, 1),
        command=["./run", "bench", "all", *sys.argv[1:]],
        seeds={"PYTHONHASHSEED": SEED},
        machine=Machine(**bench.machine()),
        versions=versions(),
        parts=parts,
    )


def _line(part: Part) -> str:
    bars = part.report.bars if part.report else []
    short = sum(not bar.holds for bar in bars)
    verdict = f"{len(bars) - short} of {len(bars)} bars hold" if part.report else part.outcome
    return f"{part.name}: {verdict} ({part.seconds:.0f} of {part.budget_seconds:.0f} s)"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="./run bench all", description="every benchmark, one JSON file and one page")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where report.json and report.html go")
    parser.add_argument("--quick", action="store_true", help="six minutes: shows that everything runs, proves little")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this benchmark; may be repeated")
    options = parser.parse_args()
    total = QUICK_SECONDS if options.quick else FULL_SECONDS
    try:
        benchmarks = discover(total, options.only)
    except ValueError as error:
        parser.error(str(error))
    found = suite(benchmarks, options, total)
    (options.out / "report.json").write_text(found.model_dump_json(indent=1) + "\n")
    (options.out / "report.html").write_text(page.render(found))
    print(f"{options.out}/report.json, {options.out}/report.html")
    if any(part.outcome != "measured" for part in found.parts):
        return FAILED
    return 0 if all(bar.holds for part in found.parts if part.report for bar in part.report.bars) else bench.FALLS_SHORT


if __name__ == "__main__":
    sys.exit(main())
