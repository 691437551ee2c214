# SPDX-License-Identifier: Apache-2.0
"""What people read: tables of machines and connections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, console: Console | None = None) -> None:
    """Print one table."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    (console or Console()).print(table)


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def show_status(status: dict[str, Any]) -> None:
    """The service in one screen."""
    backend = status["backend"]
    freeze = "nothing is lost while a socket is frozen" if status["lossless_freeze"] else "packets are lost while frozen"
    memory, up = size(status["memory_bytes"]), status["uptime_seconds"]
    print(f"streamlift {status['version']}, process {status['pid']}, {memory}, up {up:.0f} s")
    print(f"backend {backend['name']} ({backend['why']}); redirect {status['redirect']}; {freeze}")
    engine = status["relay_engine"]
    print(f"relays: engine {engine['name']} ({engine['why']})")
    rows = [
        (
            machine["name"],
            machine["channel"],
            f"{machine['agent_version'] or '-'}, {machine['backend']}",
            ", ".join(machine["addresses"]),
            machine["priority"],
            machine["relays"],
            machine["connections_out"],
            machine["handed_out"],
            machine["handed_back"],
            machine["failed"] + machine["ended"],
            ", ".join(f"{reason} {count}" for reason, count in machine["refused"].items()) or "-",
            size(machine["bytes_sent"]),
            f"{size(machine['bytes_per_second'])}/s",
        )
        for machine in status["machines"]
    ]
    about = ("VM", "channel", "agent", "addresses", "class", "relays")
    show("machines", (*about, "out now", "out", "home", "ended", "refused", "sent", "now"), rows)
    steps = [(step, s["samples"], s["p50_us"], s["p99_us"]) for step, s in status["durations"].items()]
    if steps:
        show("steps", ("step", "samples", "p50, us", "p99, us"), steps)


def show_connections(connections: Sequence[dict[str, Any]]) -> None:
    """What is out now."""
    rows = [
        (c["machine"], c["client"], c["server"], c["state"], c["file"], f"{size(c['sent'])} of {size(c['count'])}", c["token"])
        for c in connections
    ]
    show("connections", ("VM", "client", "server", "state", "file", "sent", "token"), rows)


def show_relays(relays: Sequence[dict[str, Any]], *, clear: bool = False) -> None:
    """Who sends to how many; lag and losses in entries."""
    console = Console()
    if clear:
        console.clear()
    for engine, why in {(relay["engine"], relay["why"]) for relay in relays}:
        console.print(f"engine {engine}: {why}")
    rows = [
        (
            relay["machine"],
            relay["relay"][:8],
            relay["source"] + (f" (ended: {relay['ended']})" if relay["ended"] else ""),
            relay["class"],
            relay.get("sink_count", 0),
            sum(sink["state"] != "live" for sink in relay["sinks"]),
            max((sink["lag"] for sink in relay["sinks"]), default=0),
            _lost(relay.get("out", {})),
            f"{size(relay.get('in_per_second', 0))}/s",
            f"{size(relay.get('out_per_second', 0))}/s",
            _sends(relay.get("out", {})),
        )
        for relay in relays
    ]
    columns = ("VM", "relay", "source", "class", "sinks", "behind", "lag", "lost", "in", "out", "entries a send")
    show("relays", columns, rows, console=console)


def _lost(counts: dict[str, int]) -> str:
    reasons = {name: counts.get(name, 0) for name in ("overrun", "lagged", "unreachable")}
    return ", ".join(f"{count} {name}" for name, count in reasons.items() if count) or "-"


def _sends(counts: dict[str, int]) -> str:
    return f"{counts['entries'] / counts['turns']:.1f}" if counts.get("turns") else "-"
