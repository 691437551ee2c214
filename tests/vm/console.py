# SPDX-License-Identifier: Apache-2.0
"""A root shell in a guest, on its serial console: for what nobody can do from outside."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import IO

import libvirt


def give_shell(domain: libvirt.virDomain) -> None:
    """Start the VM again with a shell on its serial console."""
    definition = ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    command_line = definition.find("os/cmdline")
    assert command_line is not None
    command_line.text = f"{command_line.text} systemd.debug_shell=ttyS0"
    domain.destroy()
    domain.connect().defineXML(ET.tostring(definition, encoding="unicode")).create()


def open_shell(domain: libvirt.virDomain) -> IO[str]:
    """That shell's input. It must stay open for a while: QEMU reads a console only as long as somebody has it open."""
    console = ET.fromstring(domain.XMLDesc()).find("devices/serial/source")
    assert console is not None
    return Path(str(console.get("path"))).open("w", encoding="ascii", buffering=1)
