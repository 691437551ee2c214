# SPDX-License-Identifier: Apache-2.0
"""`streamlift bench`: what the offload is worth on an operator's own VM. A client on this host fetches a file through the VM's own
server, in turns with the offload and without it; the VM is asked for nothing else.

"Without" is the service's doing: for the length of a block it refuses what the VM offers, and the server sends by itself. Other
clients of the VM are served by it too meanwhile; the service ends such a pause by itself if this program should die."""

from __future__ import annotations

import hashlib
import http.client
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from hypervisor_svc import tables
from hypervisor_svc.advice import of_status
from hypervisor_svc.errors import OperatorError, as_typed

SIDES = ("offloaded", "in the VM")
PAUSE = 60.0
"""Seconds after which the service offloads again, whatever became of us."""
TIMEOUT = 60.0
PIECE = 1 << 20
COUNTED = ("handed_out", "handed_back", "failed", "ended")
CAVEAT = (
    "The client is this host, so no network card is in the way; and a transfer that stays in the VM has been offered to the host"
    " and refused, which costs it about a millisecond."
)
Ask = Callable[..., dict[str, Any]]


class BenchmarkError(OperatorError):
    """It cannot be measured."""


@dataclass
class Block:
    """Requests of one side, one after the other on one connection: seconds of each, bytes, and what the service counted."""

    side: str
    seconds: list[float]
    bytes: int
    counters: dict[str, int]

    @property
    def megabits(self) -> float:
        """Mbit/s over the whole block."""
        return self.bytes * 8e-6 / sum(self.seconds)


@dataclass
class Result:
    """All blocks, and what stands for them."""

    machine: str
    url: str
    size: int
    blocks: list[Block] = field(default_factory=list)
    steps: dict[str, Any] = field(default_factory=dict)
    caveat: str = CAVEAT

    def megabits(self, side: str) -> float:
        """The median block's."""
        return statistics.median(block.megabits for block in self.blocks if block.side == side)

    def milliseconds(self, side: str) -> float:
        """The median request's."""
        return 1e3 * statistics.median(s for block in self.blocks if block.side == side for s in block.seconds)

    def counted(self, side: str, name: str) -> int:
        """What the service counted in all blocks of a side."""
        return sum(block.counters[name] for block in self.blocks if block.side == side)

    def requests(self, side: str) -> int:
        """How many there were."""
        return sum(len(block.seconds) for block in self.blocks if block.side == side)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        medians = {side: {"mbit_per_second": self.megabits(side), "ms": self.milliseconds(side)} for side in SIDES}
        return {**asdict(self), "medians": medians}


class Client:
    """A keep-alive connection to the VM's server. Raises BenchmarkError."""

    def __init__(self, address: str, port: int, path: str) -> None:
        self._connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT)
        self._path = path if path.startswith("/") else f"/{path}"
        host = f"[{address}]" if ":" in address else address
        self.url = f"http://{host}:{port}{self._path}"

    def get(self, digest: Any = None) -> tuple[float, int]:
        """Seconds to the last byte, and bytes; they go into `digest`, if one is given."""
        begin, size = time.perf_counter(), 0
        try:
            self._connection.request("GET", self._path)
            answer = self._connection.getresponse()
            while piece := answer.read(PIECE):
                size += len(piece)
                if digest is not None:
                    digest.update(piece)
        except (OSError, http.client.HTTPException) as error:
            hint = "is this the port and the address of its server? --port PORT --address ADDRESS"
            raise BenchmarkError(f"{self.url}: {error}", hint) from None
        if answer.status != 200:
            raise BenchmarkError(f"{self.url}: {answer.status} {answer.reason}", "--path names a file as its server does")
        return time.perf_counter() - begin, size

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def run(ask: Ask, machine: str, *, path: str, port: int, address: str | None, requests: int, blocks: int) -> Result:
    """Measure. Raises BenchmarkError, ControlError."""
    known = _machine(ask, machine)
    client = Client(address or known["addresses"][0], port, path)
    result = Result(machine, client.url, _agree(ask, client, machine))
    for _ in range(blocks):
        for side in SIDES:
            result.blocks.append(_block(ask, client, machine, side, requests))
    out = result.counted("offloaded", "handed_out")
    result.steps = ask("status", samples=out)["durations"] if out else {}
    client.close()
    return result


def _machine(ask: Ask, name: str) -> dict[str, Any]:
    """Its status. Raises BenchmarkError, with the command for what is missing."""
    status = ask("status")
    missing = next((advice for advice in of_status(status) if advice.machine == name), None)
    if missing is not None:
        raise BenchmarkError(f"{name}: {missing.message}", missing.hint)
    found: dict[str, Any] | None = next((machine for machine in status["machines"] if machine["name"] == name), None)
    if found is None:
        names = ", ".join(machine["name"] for machine in status["machines"]) or "none"
        hint = f"sudo {as_typed(f'attach {name} --share FOLDER --address ADDRESS')}"
        raise BenchmarkError(f"no VM named {name!r} has a channel here (known: {names})", hint)
    return found


def _agree(ask: Ask, client: Client, machine: str) -> int:
    """Both ways must give the same bytes; the size of the file. It is in all caches after this."""
    found = []
    for side in SIDES:
        digest = hashlib.sha256()
        with _way(ask, machine, side):
            found.append((client.get(digest)[1], digest.hexdigest()))
    if found[0] != found[1]:
        raise BenchmarkError(f"{client.url}: the two ways gave different bytes", "does the file change meanwhile?")
    return found[0][0]


def _block(ask: Ask, client: Client, machine: str, side: str, requests: int) -> Block:
    before = _counters(ask, machine)
    with _way(ask, machine, side):
        measured = [client.get() for _ in range(requests)]
    after = _counters(ask, machine)
    counters = {name: after[name] - before[name] for name in COUNTED}
    return Block(side, [seconds for seconds, _ in measured], sum(size for _, size in measured), counters)


def _counters(ask: Ask, machine: str) -> dict[str, int]:
    found = _machine(ask, machine)
    return {name: found[name] for name in COUNTED}


@contextmanager
def _way(ask: Ask, machine: str, side: str) -> Iterator[None]:
    """The service offloads for the VM, or does not, meanwhile."""
    if side == "offloaded":
        yield
        return
    ask("pause", machine=machine, seconds=PAUSE)
    try:
        yield
    finally:
        ask("pause", machine=machine, seconds=0)


def show(result: Result) -> None:
    """What people read."""
    console = Console()
    rows = []
    for side in SIDES:
        counts = [result.counted(side, name) for name in COUNTED]
        rates = (f"{result.megabits(side):,.0f}", f"{result.milliseconds(side):,.2f}")
        rows.append((side, result.requests(side), *rates, *counts[:2], sum(counts[2:])))
    columns = ("", "requests", "Mbit/s", "ms", "went out", "came home", "lost")
    title = f"{result.url}, {tables.size(result.size)}, medians"
    console.print(tables.table(columns, rows, title=title))
    if result.steps:
        console.print("", tables.steps(result.steps), sep="\n")
    factor = result.megabits("offloaded") / result.megabits("in the VM")
    console.print(f"\nThe offload gives {factor:.2f} times the rate. {result.caveat}", soft_wrap=True)
    if not result.counted("offloaded", "handed_out"):
        console.print(f"Nothing went out: does the VM's server use the offload, and is the file on the share? {as_typed('status')}")


def write(result: Result, path: Path) -> None:
    """The JSON."""
    path.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
