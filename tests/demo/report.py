# SPDX-License-Identifier: Apache-2.0
"""What the demo found: one table, one JSON object, one verdict. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hypervisor_svc.config import Policy
from tests.vm.setups import NAMES, caveat

STEPS = ("out", "back")
LARGE = Policy().threshold_bytes
HEADINGS = (
    *("ladder", "seg-\nments", "MB", "bytes\nmatch", "host\nserved", "guest\nserved", "out, back:\np50/p99 us"),
    *("VM\nalone", "off-\nloaded", "bare\nmetal"),
)


@dataclass
class Row:
    """One ladder. `sizes`: bytes of every answer that was fetched; `steps`: the service's durations of these handoffs,
    microseconds; `rates`: Mbit/s of each block of requests, by set-up."""

    name: str
    segments: int
    sizes: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    offloaded: int = 0
    local: Counter[str] = field(default_factory=Counter)
    steps: dict[str, dict[str, float]] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)

    @property
    def large(self) -> int:
        """How many answers the host has to deliver."""
        return sum(size >= LARGE for size in self.sizes)

    @property
    def holds(self) -> bool:
        """Every byte matched, and everything large was offloaded."""
        return not self.faults and self.offloaded >= self.large > 0 and set(self.local) <= {"too_small"}

    def rate(self, setup: str) -> float:
        """The median, Mbit/s."""
        return statistics.median(self.rates[setup])


@dataclass
class Report:
    """All of it."""

    address: str
    accelerator: str
    rows: list[Row] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether the product did what it promises."""
        return bool(self.rows) and all(row.holds for row in self.rows)

    @property
    def caveat(self) -> str:
        """What the figures cannot show."""
        return caveat(self.accelerator)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        ladders = [
            {
                "name": row.name,
                "segments": row.segments,
                "bytes": sum(row.sizes),
                "large_answers": row.large,
                "faults": row.faults,
                "offloaded": row.offloaded,
                "local": dict(row.local),
                "handoff_us": {step: row.steps.get(step) for step in STEPS},
                "mbit_per_second": row.rates,
                "holds": row.holds,
            }
            for row in self.rows
        ]
        return {
            "address": self.address,
            "accelerator": self.accelerator,
            "caveat": self.caveat,
            "ladders": ladders,
            "holds": self.holds,
        }

    def show(self, console: Console) -> None:
        """For people; 80 columns are enough."""
        title = f"DASH from the VM at {self.address}, fetched by curl and ffmpeg"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
        for row in self.rows:
            table.add_row(*_cells(row))
        console.print(table)
        console.print("Out, back: the host's part of a handoff. Last three columns: Mbit/s of one client.")
        console.print(self.caveat)
        for row in self.rows:
            for fault in row.faults:
                console.print(f"[red]{row.name}: {fault}[/red]")


def _cells(row: Row) -> list[str]:
    verdict = "[green]all[/green]" if not row.faults else f"[red]{len(row.faults)}\nwrong[/red]"
    local = "\n".join(f"{count}_{reason}".replace("_", "\n") for reason, count in sorted(row.local.items())) or "0"
    steps = (row.steps[name] for name in STEPS if name in row.steps)
    handoff = "\n".join(f"{times['p50_us']:.0f}/{times['p99_us']:.0f}" for times in steps)
    rates = (f"{row.rate(setup):,.0f}" for setup in NAMES)
    served = f"{row.offloaded}\nof {row.large}"
    return [row.name, str(row.segments), f"{sum(row.sizes) / 1e6:,.1f}", verdict, served, local, handoff, *rates]
