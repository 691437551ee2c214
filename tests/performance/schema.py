# SPDX-License-Identifier: Apache-2.0
"""What `./run bench all` writes: one JSON file, whose form this is. `python -m tests.performance.schema FILE` checks one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

VERSION: Literal[1] = 1
"""Of this form; a change that an old reader would misread is a new one."""

Number = Annotated[float | None, Field(description="null: it could not be computed, and such a bar does not hold")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Bar(_Strict):
    """A promise, and what became of it."""

    name: str
    value: Number
    unit: str
    limit: float
    sense: Literal["<=", ">="]
    holds: bool

    @model_validator(mode="after")
    def _is_true(self) -> Bar:
        """A verdict that the numbers contradict is none."""
        holds = self.value is not None and (self.value <= self.limit if self.sense == "<=" else self.value >= self.limit)
        if holds != self.holds:
            raise ValueError(f"{self.name}: {self.value} {self.sense} {self.limit} is {holds}")
        return self


class Machine(_Strict):
    """Where it ran."""

    processor: str
    processors: int = Field(ge=1)
    memory_bytes: int = Field(ge=1)


class Measured(BaseModel):
    """One benchmark's own report (`bench.Report`): raw measurements, the bars that follow from them, and what else it tells."""

    model_config = ConfigDict(extra="allow")

    benchmark: str
    machine: Machine
    versions: dict[str, str]
    caveat: str
    bars: list[Bar]
    rows: list[dict[str, Any]] = Field(min_length=1)


class Part(_Strict):
    """One benchmark of the suite. `report` and `plot` (PNG, base64) are there if it was measured; `words` are its last if not."""

    name: str
    shows: str
    command: list[str]
    seconds: float = Field(ge=0)
    budget_seconds: float = Field(gt=0)
    outcome: Literal["measured", "failed", "out of time"]
    report: Measured | None = None
    plot: str | None = None
    words: str = ""

    @model_validator(mode="after")
    def _is_whole(self) -> Part:
        if (self.outcome == "measured") != (self.report is not None and self.plot is not None):
            raise ValueError(f"{self.name}: {self.outcome}, and the report and the plot do not say so")
        return self


class Suite(_Strict):
    """The whole file."""

    schema_version: Literal[1] = VERSION
    begun: str
    quick: bool
    seconds: float = Field(ge=0)
    command: list[str]
    seeds: dict[str, int]
    machine: Machine
    versions: dict[str, str]
    parts: list[Part]


def main() -> int:
    """Check a file; the exit status."""
    try:
        suite = Suite.model_validate_json(Path(sys.argv[1]).read_bytes())
    except (ValidationError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{sys.argv[1]}: schema {suite.schema_version}, {len(suite.parts)} parts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
