# SPDX-License-Identifier: Apache-2.0
"""What people read: tables of machines and connections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from hypervisor_svc.advice import of_status
from hypervisor_svc.preflight import Finding


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> Table:
    """One table; cells are shown as they are, never as markup or as what a terminal obeys: guests choose some of them."""
    heads = (Column(name, overflow="fold", header_style="bold") for name in columns)
    made = Table(*heads, title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        made.add_row(*(_plain(cell) for cell in row))
    return made


def _plain(cell: object) -> Text:
    return Text("".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in str(cell)))


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def show_status(status: dict[str, Any], console: Console | None = None) -> None:
    """The service in one screen: what it is, what it carries, the VMs, and what is missing with the command for it."""
    (console or Console()).print(status_screen(status))


def status_screen(status: dict[str, Any]) -> Group:
    """The same as one thing that can be drawn again and again."""
    parts: list[RenderableType] = [_about(status)]
    if status["machines"]:
        parts += ["", _machines(status), "", _quotas(status)]
    if status["durations"]:
        parts += ["", steps(status["durations"])]
    parts += ["", *(_plain(line) for line in _advised(status))]
    return Group(*parts)


def show_findings(findings: Sequence[Finding]) -> None:
    """What `streamlift check` saw: a line a need, and below what is missing the next command."""
    grid = Table.grid("", "", Column(overflow="fold"), padding=(0, 2))
    for finding in findings:
        mark = Text("!", style="bold red") if finding.hint else Text("ok", style="green")
        grid.add_row(mark, _plain(finding.subject), _plain(finding.message))
        if finding.hint:
            grid.add_row("", "", _plain(finding.hint))
    Console().print(grid)


def _about(status: dict[str, Any]) -> Table:
    """Engines, each with the reason why it was chosen, and the totals."""
    backend, engine, libvirt = status["backend"], status["relay_engine"], status["libvirt"]
    freeze = "nothing is lost while a socket is frozen" if status["lossless_freeze"] else "packets are lost while frozen"
    totals = status["totals"]
    lines = {
        "service": f"streamlift {status['version']}, process {status['pid']}, {size(status['memory_bytes'])}, "
        f"up {status['uptime_seconds']:.0f} s",
        "moves by": f"{backend['name']}: {backend['why']}",
        "relays by": f"{engine['name']}: {engine['why']}",
        "redirects by": f"{status['redirect']}; {freeze}",
        "VMs from": f"{libvirt['uri']}, {'connected' if libvirt['connected'] else 'away'}" if libvirt else "configuration file",
        "connections": f"{totals['connections_out']} out now; {totals['handed_out']} went out, {totals['handed_back']} came home, "
        f"{totals['answered']} more requests were answered, {totals['failed'] + totals['ended']} were lost",
        "sent": f"{size(totals['bytes_sent'])}, now {size(totals['bytes_per_second'])}/s",
    }
    grid = Table.grid("", Column(overflow="fold"), padding=(0, 2))
    for name, words in lines.items():
        grid.add_row(Text(name, style="bold"), _plain(words))
    return grid


def _machines(status: dict[str, Any]) -> Table:
    """Who they are."""
    rows = (
        (
            machine["name"],
            machine["channel"],
            machine["presence"],
            f"{machine['agent_version'] or '-'}, {machine['backend']}",
            ", ".join(machine["addresses"]) or "-",
            machine["priority"],
            size(machine["bytes_sent"]),
            f"{size(machine['bytes_per_second'])}/s",
        )
        for machine in status["machines"]
    )
    return table(("VM", "channel", "presence", "agent", "addresses", "class", "sent", "now"), rows)


def _quotas(status: dict[str, Any]) -> Table:
    """What they have of what they may have, and what became of the rest."""
    limits = status["limits"]
    rows = (
        (
            machine["name"],
            *(f"{machine[name]}/{limits[name]}" for name in ("connections_out", "relays")),
            f"{size(machine['ring_bytes'])}/{size(limits['ring_bytes'])}",
            f"{machine['frames_per_second']}/{limits['frames_per_second']}",
            machine["handed_out"],
            machine["handed_back"],
            _reasons(machine["lost"]),
            _reasons(machine["refused"]),
        )
        for machine in status["machines"]
    )
    return table(("VM", "out", "relays", "rings", "messages/s", "went out", "came home", "lost", "refused"), rows)


def steps(durations: dict[str, Any]) -> Table:
    """The steps side by side, so that all fits one screen."""
    rows = ((name, *(f"{step[f'{name}_us']:,.0f}" for step in durations.values())) for name in ("p50", "p99"))
    return table(("us", *durations), rows)


def _advised(status: dict[str, Any]) -> Iterator[str]:
    for advice in of_status(status):
        yield f"! {advice.machine + ': ' if advice.machine else ''}{advice.message}\n  {advice.hint}"


def _reasons(counts: dict[str, int]) -> str:
    return "\n".join(f"{reason} {count}" for reason, count in counts.items()) or "-"


def show_connections(connections: Sequence[dict[str, Any]]) -> None:
    """What is out now."""
    Console().print(connection_table(connections))


def connection_table(connections: Sequence[dict[str, Any]]) -> Table:
    """The same as one thing that can be drawn again and again."""
    rows = (
        (
            *(c["machine"], c["client"], c["server"], c["state"], c["file"]),
            *(f"{size(c['sent'])} of {size(c['count'])}", c["answered"], c["token"]),
        )
        for c in connections
    )
    return table(("VM", "client", "server", "state", "file", "sent", "answered", "token"), rows)


def show_relays(relays: Sequence[dict[str, Any]], *, clear: bool = False) -> None:
    """Who sends to how many; lag and losses in entries."""
    console = Console()
    if clear:
        console.clear()
    for engine, why in {(relay["engine"], relay["why"]) for relay in relays}:
        console.print(_plain(f"engine {engine}: {why}"))
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
    console.print(table(columns, rows, title="relays"))


def _lost(counts: dict[str, int]) -> str:
    reasons = {name: counts.get(name, 0) for name in ("overrun", "lagged", "unreachable")}
    return ", ".join(f"{count} {name}" for name, count in reasons.items() if count) or "-"


def _sends(counts: dict[str, int]) -> str:
    return f"{counts['entries'] / counts['turns']:.1f}" if counts.get("turns") else "-"
