# SPDX-License-Identifier: Apache-2.0
"""This machine's userland on another kernel: a VM whose root is ours, read-only, with a memory file system over it.

    status = OtherKernel("6.12").run(["pytest", "tests/host_module"], output=path)

What the command prints goes to a file that grows while it runs; its exit status is returned."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypervisor_svc.accelerator import QEMU, choose
from vm_images import build
from vm_images.initramfs import write_initramfs
from vm_images.kernel import Kernel, early_modules

ROOT = Path(__file__).resolve().parents[2]
MEMORY_MIB, CPUS = 4096, 2
QUICK = "mitigations=off init_on_alloc=0 rcupdate.rcu_expedited=1"
"""Kernel parameters. An emulator has no side channels, and each guard against them is more instructions to emulate; namespaces come
and go by the hundred here, each with several grace periods."""

QUICK_CPU = "max,-erms,-fsrm"
"""An emulator copies byte by byte with the instruction that real processors copy fastest with: memory to memory a third as fast."""

INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs none /dev
$b mount -t proc none /proc
$b mount -t sysfs none /sys
while read -r module; do $b insmod "/modules/$module"; done < /modules/order
share() { $b mkdir -p "$2"; $b mount -t 9p -o "trans=virtio,version=9p2000.L,msize=524288,$3" "$1" "$2" || echo "no share $1"; }
$b mkdir /over
$b mount -t tmpfs none /over
$b mkdir /over/upper /over/work /over/modules /over/modules-work
share root /lower ro,cache=loose
$b mount -t overlay -o lowerdir=/lower,upperdir=/over/upper,workdir=/over/work none /root
share kernel /kernel ro,cache=loose
$b mkdir -p /root/lib/modules
$b mount -t overlay -o lowerdir=/kernel,upperdir=/over/modules,workdir=/over/modules-work none /root/lib/modules
share work /root/outside rw,cache=none
for place in dev proc sys; do $b mount -o move "/$place" "/root/$place"; done
for place in run dev/shm; do $b mkdir -p "/root/$place"; $b mount -t tmpfs none "/root/$place"; done
$b mkdir -p /root/run/netns /root/run/tmp
$b mkdir -p /root/dev/pts
$b mount -t devpts none /root/dev/pts
exec $b switch_root /root /bin/sh -c 'ip link set lo up; cd /outside
    sh command > output 2>&1 < /dev/null; echo $? > status; sync; busybox poweroff -f'
"""


@dataclass(frozen=True)
class OtherKernel:
    """A kernel of Debian's, by series ("6.1", "6.12"). `modules` of ours (`host_module/`) are loaded before the command.

    `counted`: one emulated processor whose instructions are the clock, a nanosecond each, and waiting costs nothing (QEMU's
    -icount): how slow the emulator is does not show, and a measurement repeats within a few percent."""

    series: str
    modules: tuple[str, ...] = ()
    counted: bool = False

    def run(
        self, command: Sequence[str], *, timeout: float, output: Path | None = None, outside: Sequence[Path] = ()
    ) -> int:
        """Run the command in this checkout; its exit status. Files `outside` are at /outside, by their names, for both to write.
        Raises RuntimeError if the kernel did not live to its end, TimeoutError if it took too long."""
        kernel = self.kernel()
        with tempfile.TemporaryDirectory(prefix="streamlift-kernel-") as folder:
            work = Path(folder)
            loads = [f"insmod {_into(work, self.module(name))}" for name in self.modules]
            (work / "command").write_text("\n".join(["set -e", *loads, _script(command)]), encoding="utf-8")
            (work / "output").touch()
            for file in outside:
                os.link(file, work / file.name)
            if output is not None:
                output.unlink(missing_ok=True)
                os.link(work / "output", output)
            busybox = build.busybox(build.kernel(self.series))
            write_initramfs(work / "initrd", busybox=busybox, modules=self.early(kernel), init=INIT)
            self._boot(kernel, work, timeout)
            if not (work / "status").exists():
                raise RuntimeError(f"Linux {kernel.release} ended early:\n{_tail(work / 'console')}\n{_tail(work / 'output')}")
            if output is not None and _oops(work / "console"):
                output.open("a").write(_tail(work / "console", 20_000))
            return 99 if _oops(work / "console") else int((work / "status").read_text())

    def kernel(self) -> Kernel:
        """Which one."""
        return build.kernel(self.series)

    def module(self, name: str) -> Path:
        """NAME.ko, built for it."""
        return build.module(name, self.series)

    def early(self, kernel: Kernel) -> list[Path]:
        """What it needs to mount its root."""
        return early_modules(kernel, also=("overlay",))

    def parameters(self) -> str:
        """Its command line. What is counted is counted as it would run elsewhere."""
        return "console=ttyS0 panic=-1 oops=panic random.trust_cpu=on" + ("" if self.counted else f" {QUICK}")

    def _boot(self, kernel: Kernel, work: Path, timeout: float) -> None:
        shares = {"root": "/", "kernel": str(kernel.modules / "lib" / "modules"), "work": str(work)}
        argv = [QEMU, *self._processors(), "-cpu", "max" if self.counted else QUICK_CPU, "-machine", "pc", "-m", str(MEMORY_MIB)]
        argv += ["-nodefaults", "-display", "none", "-no-reboot"]
        argv += ["-serial", f"file:{work}/console", "-kernel", str(kernel.image), "-initrd", str(work / "initrd")]
        argv += ["-append", self.parameters()]
        for tag, path in shares.items():
            access = "off" if tag == "work" else "on"
            argv += ["-fsdev", f"local,id={tag},path={path},security_model=none,multidevs=remap,readonly={access}"]
            argv += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"not done within {timeout:g} s:\n{_tail(work / 'output')}\n{_tail(work / 'console')}") from None
        if done.returncode:
            raise RuntimeError(done.stderr.decode(errors="replace"))

    def _processors(self) -> list[str]:
        if self.counted:
            return ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]
        return ["-accel", "tcg,thread=multi" if choose() == "tcg" else "kvm", "-smp", str(CPUS)]


def _script(command: Sequence[str]) -> str:
    names = ("PATH", "PYTHONPATH", "PYTHONPYCACHEPREFIX", "STREAMLIFT_CACHE")
    exports = [f"export {name}={shlex.quote(os.environ[name])}" for name in names if name in os.environ]
    prepare = ["modprobe tun || true", "export TMPDIR=/run/tmp", *exports, f"cd {shlex.quote(str(ROOT))}"]
    return "\n".join([*prepare, "exec " + shlex.join(command)]) + "\n"


def _into(work: Path, module: Path) -> str:
    (work / module.name).write_bytes(module.read_bytes())
    return f"/outside/{module.name}"


def _oops(console: Path) -> bool:
    """Whether the kernel complained: a warning is a defect too."""
    words = console.read_text(encoding="utf-8", errors="replace")
    return any(sign in words for sign in ("Oops", "BUG:", "WARNING:", "general protection", "Call Trace"))


def _tail(path: Path, length: int = 3000) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-length:] if path.exists() else ""
