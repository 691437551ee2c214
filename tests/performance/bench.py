# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: the report's schema, verdicts, the table, and the file that a plot goes to."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Sense = Literal["<=", ">="]
ROOT = Path(__file__).resolve().parents[2]
FALLS_SHORT = 3
"""The exit status when a bar does not hold."""


@dataclass(frozen=True)
class Bar:
    """One promise and what became of it."""

    name: str
    value: float
    unit: str
    limit: float
    sense: Sense

    @property
    def holds(self) -> bool:
        """False for NaN too: what was not measured does not hold."""
        return self.value <= self.limit if self.sense == "<=" else self.value >= self.limit


@dataclass
class Report:
    """The result of one run; `rows` are the raw measurements, and `bars` follow from them alone."""

    benchmark: str
    caveat: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The schema of DESIGN.md."""
        return {
            "benchmark": self.benchmark,
            "machine": machine(),
            "versions": versions(),
            "caveat": self.caveat,
            "bars": [{**asdict(bar), "holds": bar.holds} for bar in self.bars],
            **self.details,
            "rows": self.rows,
        }

    @property
    def exit_status(self) -> int:
        """0 if all bars hold."""
        return 0 if all(bar.holds for bar in self.bars) else FALLS_SHORT


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed (nearest rank); NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the distance between the quartiles."""
    if not values:
        return math.nan, math.nan
    return statistics.median(values), percentile(values, 75) - percentile(values, 25)


def machine() -> dict[str, Any]:
    """Where it ran. No name: a result is about the kind of machine."""
    model = ""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": model or platform.machine(),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def versions() -> dict[str, str]:
    """Of what took part."""
    found = {"kernel": platform.release(), "python": platform.python_version()}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["pyroute2"] = metadata.version("pyroute2")
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if not done.returncode:
        found["streamlift"] = done.stdout.strip()
    return found


def arguments(description: str) -> argparse.Namespace:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report, raw measurements included")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (PNG)")
    parser.add_argument("--quick", action="store_true", help="fewer measurements: shows that it runs, proves little")
    return parser.parse_args()


def show(report: Report, tables: Sequence[Table] = ()) -> None:
    """Print the tables, then the bars, then what they cannot show."""
    console = Console()
    for table in tables:
        console.print(table)
    bars = Table("bar", "measured", "limit", "", title=f"{report.benchmark}: bars")
    for bar in report.bars:
        verdict = "[green]holds[/green]" if bar.holds else "[red]falls short[/red]"
        bars.add_row(bar.name, f"{bar.value:,.3f} {bar.unit}", f"{bar.sense} {bar.limit:g} {bar.unit}", verdict)
    console.print(bars)
    console.print(f"Caveat: {report.caveat}")


def finish(report: Report, options: argparse.Namespace, tables: Sequence[Table] = ()) -> int:
    """Write the JSON, print; the exit status."""
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=1, allow_nan=True) + "\n")
    show(report, tables)
    return report.exit_status


@contextlib.contextmanager
def drawing(path: Path, *, columns: int = 1) -> Iterator[list[Any]]:
    """Axes side by side; written to `path` in the end. Needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(6.4 * columns, 4.8), squeeze=False)
    try:
        yield list(axes[0])
        figure.tight_layout()
        figure.savefig(path, dpi=120, format="png")
    finally:
        pyplot.close(figure)
