# SPDX-License-Identifier: Apache-2.0
"""`streamlift module`: build, load and ask about the kernel modules on this machine."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guest_agent.handoff.backend import explain
from guest_agent.handoff.socket_offload import Device
from hypervisor_svc import omss
from vm_images.command import BuildError, run
from vm_images.module import copy_sources

NAMES = ("socket_offload", "omss")
SOURCES = Path(__file__).resolve().parents[1] / "host_module"


class ModuleError(Exception):
    """A step failed; `hint` is the next command to type."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def built(name: str, release: str | None = None) -> Path:
    """Where a module for a kernel is put: with the other modules that did not come with it."""
    return Path("/lib/modules") / (release or platform.release()) / "updates" / f"{name}.ko"


def build(headers: Path | None = None, names: Sequence[str] = NAMES) -> list[Path]:
    """Build modules against `headers` (default: those of the running kernel), install them and run depmod. Raises ModuleError."""
    _check(names)
    headers = headers or Path("/lib/modules") / platform.release() / "build"
    if not (headers / "Makefile").exists():
        raise ModuleError(f"no kernel headers at {headers}", f"apt-get install linux-headers-{platform.release()}")
    if not SOURCES.exists():
        raise ModuleError(f"the modules' sources are not here ({SOURCES})", "run ./run streamlift module build in a checkout")
    made = [_build(name, headers) for name in names]
    _run("depmod")
    return made


def _build(name: str, headers: Path) -> Path:
    work = Path("/var/lib/streamlift/module") / name
    shutil.rmtree(work, ignore_errors=True)
    copy_sources(SOURCES / name, work)
    _run("make", "-s", f"-j{os.cpu_count() or 1}", "-C", str(work), f"KDIR={headers}")
    target = built(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / target.name, target)
    return target


def load(names: Sequence[str] = NAMES) -> None:
    """modprobe. Raises ModuleError: not built, of another kernel, refused by lockdown or a signature policy."""
    _check(names)
    for name in names:
        try:
            _run("modprobe", name)
        except ModuleError as error:
            hint = "it has to be signed where Secure Boot is on" if built(name).exists() else "streamlift module build"
            raise ModuleError(str(error), hint) from None


def _check(names: Sequence[str]) -> None:
    for name in names:
        if name not in NAMES:
            raise ModuleError(f"there is no module {name!r}", f"there are: {', '.join(NAMES)}")


def status() -> list[dict[str, Any]]:
    """Of each module whether it is built, loaded, and speaks our version; `used`: what a service that starts now would use."""
    return [_socket_offload(), _omss()]


def _socket_offload() -> dict[str, Any]:
    found = _facts("socket_offload")
    try:
        device = Device()
    except OSError as error:
        return {**found, "used": "tcp_repair", "why": explain(error)}
    device.close()
    return {**found, "loaded": True, "version": device.handshake.version, "used": "socket_offload", "why": "the module is loaded"}


def _omss() -> dict[str, Any]:
    found = _facts("omss")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
        try:
            told = omss.hello(door)
        except OSError as error:
            return {**found, "used": "user", "why": str(error)}
    return {**found, "loaded": True, "version": told.version, "used": "omss", "why": "the module is loaded"}


def _facts(name: str) -> dict[str, Any]:
    return {"module": name, "kernel": platform.release(), "built": built(name).exists(), "loaded": False}


def _run(*command: str) -> None:
    if os.geteuid() != 0:
        raise ModuleError("kernel modules need root", "run it with sudo")
    try:
        run(command)
    except BuildError as error:
        raise ModuleError(str(error)) from None
