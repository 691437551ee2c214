# SPDX-License-Identifier: Apache-2.0
"""What the demo found: one table, one JSON object, one verdict. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.vm.setups import NAMES, caveat

STEPS = {"out": "to the host", "back": "back home"}


@dataclass
class Row:
    """One ladder. `rates`: Mbit/s of each block of requests, by set-up."""

    name: str
    segments: int
    bytes: int = 0
    faults: list[str] = field(default_factory=list)
    offloaded: int = 0
    local: Counter[str] = field(default_factory=Counter)
    rates: dict[str, list[float]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Every byte matched, and what was not too small was offloaded."""
        return not self.faults and self.offloaded > 0 and set(self.local) <= {"too_small"}

    def rate(self, setup: str) -> float:
        """The median, Mbit/s."""
        return statistics.median(self.rates[setup])


@dataclass
class Report:
    """All of it. `steps`: the service's durations, microseconds."""

    address: str
    accelerator: str
    rows: list[Row] = field(default_factory=list)
    steps: dict[str, dict[str, float]] = field(default_factory=dict)

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
                "bytes": row.bytes,
                "faults": row.faults,
                "offloaded": row.offloaded,
                "local": dict(row.local),
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
            "handoff_us": {step: self.steps[step] for step in STEPS},
            "holds": self.holds,
        }

    def show(self, console: Console) -> None:
        """For people."""
        table = Table(title=f"DASH from the VM at {self.address}; throughput of one client in Mbit/s", title_justify="left")
        for name in ("ladder", "seg-\nments", "MB\nfetched", "bytes\nmatch", "host\nserved", "guest\nserved", *NAMES.values()):
            table.add_column(name.replace(" ", "\n"), justify="right" if name != "ladder" else "left")
        for row in self.rows:
            verdict = "[green]all[/green]" if not row.faults else f"[red]{len(row.faults)} wrong[/red]"
            local = "\n".join(f"{count} {reason}" for reason, count in sorted(row.local.items())) or "0"
            rates = (f"{row.rate(setup):,.0f}" for setup in NAMES)
            table.add_row(row.name, str(row.segments), f"{row.bytes / 1e6:,.1f}", verdict, str(row.offloaded), local, *rates)
        console.print(table)
        console.print(self._caption())
        for row in self.rows:
            for fault in row.faults:
                console.print(f"[red]{row.name}: {fault}[/red]")

    def _caption(self) -> str:
        times = [
            f"{words} p50 {self.steps[step]['p50_us']:,.0f} us, p99 {self.steps[step]['p99_us']:,.0f} us"
            for step, words in STEPS.items()
        ]
        return f"The host's part of a handoff: {'; '.join(times)}.\n{self.caveat}"
