# SPDX-License-Identifier: Apache-2.0
"""What a status makes us say; and what nobody may make a terminal do."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from hypervisor_svc.advice import of_status
from hypervisor_svc.tables import show_status

MACHINE: dict[str, Any] = {
    "name": "tv1", "channel": "hello", "presence": "here", "agent_version": "0.1.0", "backend": "tcp_repair",
    "addresses": ["10.78.0.2"],
    "share": "/srv/media", "priority": "normal", "relays": 1, "ring_bytes": 4096, "frames_per_second": 3, "connections_out": 2,
    "handed_out": 9, "handed_back": 6, "failed": 1, "ended": 0, "lost": {"peer_gone": 1}, "refused": {"foreign_address": 2},
    "bytes_sent": 1 << 20, "bytes_per_second": 2048,
}  # fmt: skip


def status(**machine: Any) -> dict[str, Any]:
    return {
        "version": "0.1.0", "pid": 7, "memory_bytes": 1 << 25, "uptime_seconds": 3.0, "lossless_freeze": True, "redirect": "nat",
        "backend": {"name": "tcp_repair", "why": "no module"}, "relay_engine": {"name": "user", "why": "omss is not loaded"},
        "libvirt": {"uri": "qemu:///system", "connected": True, "without_channel": []},
        "limits": {"connections_out": 4096, "relays": 64, "ring_bytes": 1 << 28, "frames_per_second": 20000},
        "durations": {"restore": {"samples": 9, "p50_us": 50.0, "p99_us": 70.0}},
        "machines": [{**MACHINE, **machine}],
        "totals": {"connections_out": 2, "handed_out": 9, "handed_back": 6, "answered": 40, "failed": 1, "ended": 0,
                   "bytes_sent": 1 << 20, "bytes_per_second": 2048},
    }  # fmt: skip


def drawn(found: dict[str, Any], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    show_status(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_nothing_is_said_of_what_is_well() -> None:
    assert of_status(status()) == []


@pytest.mark.parametrize(
    ("machine", "message", "hint"),
    [
        ({"agent_version": "0.0.9"}, "too old: 0.0.9", "in tv1, as root: python3 /srv/share/streamlift-agent.pyz install"),
        ({"channel": "up", "refused": {"bad_version": 4}}, "too old", "streamlift-agent.pyz install"),
        ({"channel": "up", "agent_version": None}, "no agent answers", "streamlift-agent.pyz install"),
        ({"channel": "down", "agent_version": None}, "cannot be opened", "virsh domstate tv1"),
        ({"presence": "away"}, "has left this host", "sudo streamlift return tv1"),
        ({"share": None}, "no share", "sudo streamlift attach tv1 --share FOLDER --restart"),
        ({"addresses": []}, "addresses are not known", "sudo streamlift attach tv1 --address ADDRESS"),
    ],
)
def test_what_is_missing_comes_with_a_command(machine: dict[str, Any], message: str, hint: str) -> None:
    (advice,) = of_status(status(**machine))
    assert message in advice.message and hint in advice.hint
    assert "\n".join((f"! tv1: {advice.message}", f"  {advice.hint}")) in drawn(status(**machine), 200)


def test_vms_that_are_not_ours_yet() -> None:
    found = status()
    found["libvirt"] = {"uri": "qemu:///system", "connected": True, "without_channel": ["db", "web"]}
    assert [(advice.machine, "attach" in advice.hint) for advice in of_status(found)] == [("db", True), ("web", True)]
    found = {**status(), "machines": [], "libvirt": {"uri": "qemu:///system", "connected": False, "without_channel": []}}
    assert ["libvirtd" in advice.hint or "deploy" in advice.hint for advice in of_status(found)] == [True, True]


def test_one_screen_has_all_of_it() -> None:
    text = drawn(status(), 120)
    assert len(text.splitlines()) <= 24
    for part in ("no module", "omss is not loaded", "2/4096", "1/64", "3/20000", "peer_gone 1", "foreign_address 2", "2.0 KiB/s"):
        assert part in text


def test_a_guest_cannot_write_to_the_terminal() -> None:
    text = drawn(status(agent_version="\x1b[2J[red]0.1.0[/red]"), 200)
    assert "\x1b[2J" not in text and "?[2J[red]0.1.0[/red]" in text
