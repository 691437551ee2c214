# SPDX-License-Identifier: Apache-2.0
"""`streamlift module`: build, load and ask about the kernel module on this machine."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from guest_agent.handoff.backend import explain
from guest_agent.handoff.socket_offload import Device
from vm_images.command import BuildError, run
from vm_images.module import copy_sources

NAME = "socket_offload"
SOURCE = Path(__file__).resolve().parents[1] / "host_module" / NAME


class ModuleError(Exception):
    """A step failed; `hint` is the next command to type."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def built(release: str | None = None) -> Path:
    """Where the module for a kernel is put: with the other modules that did not come with it."""
    return Path("/lib/modules") / (release or platform.release()) / "updates" / f"{NAME}.ko"


def build(headers: Path | None = None) -> Path:
    """Build the module against `headers` (default: those of the running kernel), install it and run depmod. Raises ModuleError."""
    headers = headers or Path("/lib/modules") / platform.release() / "build"
    if not (headers / "Makefile").exists():
        raise ModuleError(f"no kernel headers at {headers}", f"apt-get install linux-headers-{platform.release()}")
    if not SOURCE.exists():
        raise ModuleError(f"the module's sources are not here ({SOURCE})", "run ./run streamlift module build in a checkout")
    work = Path("/var/lib/streamlift/module")
    shutil.rmtree(work, ignore_errors=True)
    copy_sources(SOURCE, work)
    _run("make", "-s", "-C", str(work), f"KDIR={headers}")
    target = built()
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / target.name, target)
    _run("depmod")
    return target


def load() -> None:
    """modprobe. Raises ModuleError: not built, of another kernel, refused by lockdown or a signature policy."""
    try:
        _run("modprobe", NAME)
    except ModuleError as error:
        hint = "it has to be signed where Secure Boot is on" if built().exists() else "streamlift module build"
        raise ModuleError(str(error), hint) from None


def status() -> dict[str, Any]:
    """Whether it is built, loaded, and speaks our version; `backend` is what a service that starts now would use."""
    found: dict[str, Any] = {"module": NAME, "kernel": platform.release(), "built": built().exists(), "loaded": False}
    try:
        device = Device()
    except OSError as error:
        return {**found, "backend": "tcp_repair", "why": explain(error)}
    device.close()
    return {**found, "loaded": True, "version": device.handshake.version, "backend": NAME, "why": "the module is loaded"}


def _run(*command: str) -> None:
    if os.geteuid() != 0:
        raise ModuleError("kernel modules need root", "run it with sudo")
    try:
        run(command)
    except BuildError as error:
        raise ModuleError(str(error)) from None
