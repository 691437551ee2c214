# SPDX-License-Identifier: Apache-2.0
"""KVM or TCG: decided by running a machine, for /dev/kvm may exist and still be useless."""

import fcntl
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

from hypervisor_svc.errors import OperatorError

Accelerator = Literal["kvm", "tcg"]
Choice = Literal["auto", "kvm", "tcg"]

QEMU = "qemu-system-x86_64"
TRIAL_SECONDS = 10.0

# A boot sector: mov dx,0xf4; mov al,0x2a; out dx,al; hlt. The debug-exit device ends QEMU with (value << 1) | 1.
_EXIT_VALUE = 0x2A
_BOOT_SECTOR = bytes((0xBA, 0xF4, 0x00, 0xB0, _EXIT_VALUE, 0xEE, 0xF4)).ljust(510, b"\0") + b"\x55\xaa"
_EXPECTED_STATUS = (_EXIT_VALUE << 1) | 1


def choose(choice: Choice = "auto", *, cache: Path | None = None) -> Accelerator:
    """The accelerator to use; "auto" is tried once per boot of this machine and remembered in `cache`.

    Raises OperatorError: KVM is asked for and does not work."""
    if choice == "kvm" and (obstacle := kvm_obstacle()):
        raise OperatorError(f"KVM does not work here: {obstacle}", "emulation is slower and works: --accelerator tcg")
    if choice != "auto":
        return choice
    directory = cache or Path(os.environ.get("STREAMLIFT_CACHE") or "/var/cache/streamlift")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "accelerator").open("a+", encoding="ascii") as file:
        # Two deployments at once try once: the second waits for the first one's answer.
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        match file.read().split():
            case [known_boot, "kvm"] if known_boot == boot:
                return "kvm"
            case [known_boot, "tcg"] if known_boot == boot:
                return "tcg"
        found: Accelerator = "tcg" if kvm_obstacle() else "kvm"
        file.seek(0)
        file.truncate()
        file.write(f"{boot} {found}\n")
    return found


def kvm_obstacle() -> str:
    """Why no machine runs under KVM; empty: one does. The processor's flag first, then the proof."""
    if not _processor_can_virtualise():
        return "the processor shows neither vmx nor svm (switched off in the firmware, or a VM without nesting)"
    if not Path("/dev/kvm").exists():
        return "there is no /dev/kvm (modprobe kvm_intel or kvm_amd)"
    return "" if runs_with("kvm") else "a trial machine did not run"


def runs_with(accelerator: Accelerator, *, seconds: float = TRIAL_SECONDS) -> bool:
    """Boot a sector that ends the machine with an agreed exit status; False if that does not happen in time."""
    with tempfile.NamedTemporaryFile(prefix="streamlift-trial-") as disk:
        disk.write(_BOOT_SECTOR)
        disk.flush()
        command = [
            QEMU, "-accel", accelerator, "-machine", "pc", "-m", "16", "-nodefaults", "-display", "none",
            "-no-reboot", "-drive", f"file={disk.name},format=raw,if=ide,readonly=off,snapshot=on",
            "-device", "isa-debug-exit,iobase=0xf4,iosize=0x01",
        ]  # fmt: skip
        try:
            result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)
        except (subprocess.TimeoutExpired, FileNotFoundError):
            return False
    return result.returncode == _EXPECTED_STATUS


def _processor_can_virtualise() -> bool:
    words = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    return "vmx" in words or "svm" in words
