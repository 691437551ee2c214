# SPDX-License-Identifier: Apache-2.0
"""What a status tells that something is missing, and the next command to type. Pure: a status in, sentences out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from guest_agent.handoff.errors import Reason
from guest_agent.handoff.presence import Presence
from hypervisor_svc.errors import as_typed

INSTALL = "python3 /srv/share/streamlift-agent.pyz install"
"""In the VM; `attach` puts the file on the share (`guest_agent/install.py`)."""


@dataclass(frozen=True)
class Advice:
    """About a VM (empty: the service): what is missing, and the next command."""

    machine: str
    message: str
    hint: str


def of_status(status: dict[str, Any]) -> list[Advice]:
    """All that is worth a command, the service's own first."""
    return [*_service(status), *(advice for machine in status["machines"] for advice in _machine(machine, status["version"]))]


def _service(status: dict[str, Any]) -> Iterator[Advice]:
    libvirt = status["libvirt"]
    if libvirt and not libvirt["connected"]:
        yield Advice("", f"libvirt at {libvirt['uri']} does not answer", "sudo systemctl start libvirtd")
    for name in libvirt["without_channel"] if libvirt else ():
        message = "it has no channel, so nothing of it is offloaded"
        yield Advice(name, message, f"sudo {as_typed(f'attach {name} --share FOLDER --address ADDRESS')}")
    if not status["machines"] and not (libvirt and libvirt["without_channel"]):
        yield Advice("", "there is no VM yet", f"sudo {as_typed('deploy tv1 --share FOLDER')}")


def _machine(machine: dict[str, Any], version: str) -> Iterator[Advice]:
    """At most one of the channel, for the first explains the others."""
    name = machine["name"]
    if Reason.BAD_VERSION.value in machine["refused"]:
        yield Advice(name, f"its agent is too old: it speaks another version of the channel than {version}", _in_vm(name))
    elif machine["channel"] == "down":
        yield Advice(name, "its channel cannot be opened: is the VM paused, or another program at it?", f"virsh domstate {name}")
    elif machine["channel"] != "hello":
        yield Advice(name, "no agent answers in it", _in_vm(name))
    elif _number(machine["agent_version"]) < _number(version):
        yield Advice(name, f"its agent is too old: {machine['agent_version']}, this service is {version}", _in_vm(name))
    elif machine["presence"] == Presence.AWAY.value:
        message = "it has left this host, to be moved or saved: nothing of it is offloaded"
        yield Advice(name, message, f"sudo {as_typed(f'return {name}')}")
    if not machine["share"]:
        restart = f"sudo {as_typed(f'attach {name} --share FOLDER --restart')}"
        yield Advice(name, "it has no share: a share that was attached appears when the VM is started anew", restart)
    if not machine["addresses"]:
        yield Advice(name, "its addresses are not known", f"sudo {as_typed(f'attach {name} --address ADDRESS')}")


def _in_vm(name: str) -> str:
    return f"in {name}, as root: {INSTALL}"


def _number(version: str | None) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", version or ""))
