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
from hypervisor_svc.errors import OperatorError, as_root, as_typed
from vm_images.command import BuildError, run
from vm_images.module import copy_sources

NAMES = ("socket_offload", "omss")
SOURCES = Path(__file__).resolve().parents[1] / "host_module"


class ModuleError(OperatorError):
    """A step failed."""


def built(name: str, release: str | None = None) -> Path:
    """Where a module for a kernel is put: with the other modules that did not come with it."""
    return Path("/lib/modules") / (release or platform.release()) / "updates" / f"{name}.ko"


def build(headers: Path | None = None, names: Sequence[str] = NAMES) -> list[Path]:
    """Build modules against `headers` (default: those of the running kernel), install them and run depmod. Raises ModuleError."""
    _check(names)
    headers = headers or Path("/lib/modules") / platform.release() / "build"
    _check_headers(headers)
    if not SOURCES.exists():
        raise ModuleError(f"the modules' sources are not here ({SOURCES})", "in a checkout: sudo ./run streamlift module build")
    made = [_build(name, headers) for name in names]
    _run("depmod")
    return made


def _check_headers(headers: Path) -> None:
    """They must be there, and be those of the kernel that is to load what is built."""
    hint = f"sudo apt-get install linux-headers-{platform.release()}"
    if not (headers / "Makefile").exists():
        raise ModuleError(f"no kernel headers at {headers}", hint)
    release = headers / "include" / "config" / "kernel.release"
    if release.exists() and (found := release.read_text().strip()) != platform.release():
        raise ModuleError(f"the headers at {headers} are those of Linux {found}; {platform.release()} runs here", hint)


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
            raise ModuleError(*_refused(name, str(error))) from None


_REFUSALS = {
    "not found in directory": ("is not built for Linux {release}", "sudo {build}"),
    "Exec format error": ("was not built for Linux {release}", "sudo {build}"),
    "Invalid argument": ("was not built for Linux {release}", "sudo {build}"),
    "Unknown symbol": ("was not built for Linux {release}", "sudo {build}"),
    "Key was rejected": ("is refused: Secure Boot wants its signature", "enroll a key: mokutil --import /var/lib/dkms/mok.pub"),
    "Required key not available": ("is refused: no key signed it", "enroll a key: mokutil --import /var/lib/dkms/mok.pub"),
    "Operation not permitted": ("is refused: a container, or the kernel is locked down", "cat /sys/kernel/security/lockdown"),
    "Function not implemented": ("is refused: this kernel takes no modules", "it works without: {status}"),
}
"""What modprobe(8) says, and what it means for a module: the cause, and the next command."""


def _refused(name: str, words: str) -> tuple[str, str]:
    known = {"release": platform.release(), "build": as_typed("module build"), "status": as_typed("module status")}
    for said, (cause, hint) in _REFUSALS.items():
        if said in words:
            return f"{name} {cause.format(**known)}", hint.format(**known)
    return f"{name} is refused: {words}", "dmesg | tail says why"


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
            return {**found, "used": "user", "why": error.strerror or str(error)}
    return {**found, "loaded": True, "version": told.version, "used": "omss", "why": "the module is loaded"}


def _facts(name: str) -> dict[str, Any]:
    return {"module": name, "kernel": platform.release(), "built": built(name).exists(), "loaded": False}


def _run(*command: str) -> None:
    if os.geteuid() != 0:
        raise ModuleError("kernel modules need root", as_root())
    try:
        run(command)
    except BuildError as error:
        raise ModuleError(str(error)) from None
