# SPDX-License-Identifier: Apache-2.0
"""The modules on a kernel that watches itself: built from Debian's linux-source with `debug.config` (KASAN, lockdep,
DEBUG_OBJECTS, kmemleak), once, and kept in the cache.

    ./run debug-kernel [--minutes N]

Runs the modules' tests, then N minutes of each fuzzer, then asks kmemleak twice. Any report of the kernel is a failure."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.vm.other_kernel import OtherKernel
from vm_images import build
from vm_images.command import run
from vm_images.kernel import Kernel
from vm_images.packages import fetch

SERIES = "6.12"
CONFIG = Path(__file__).with_name("debug.config")
MODULES = ("socket_offload", "omss")
SCRIPT = """set -e
mount -t debugfs none /sys/kernel/debug
{tests}
for round in 1 2; do echo scan > /sys/kernel/debug/kmemleak; sleep 6; done
cat /sys/kernel/debug/kmemleak
! grep -q -e {pattern} /sys/kernel/debug/kmemleak
"""


def tests(name: str, minutes: float) -> str:
    """A module's tests and its fuzzer, as lines for the shell. This kernel has no cgroups."""
    suite = f"{sys.executable} -m pytest -q -p no:cacheprovider --tb short -k 'not cgroup' tests/host_module/{name}"
    return f"{suite}\n{sys.executable} -m tests.host_module.{name}.fuzz --minutes {minutes}"


def source() -> Path:
    """The built kernel tree; making it takes long."""
    release = build.kernel(SERIES).release
    path = build.cache_directory() / f"debug-{release}-{build.key(CONFIG.read_text(encoding='utf-8'))}"
    with build.layer(path) as (directory, missing):
        if missing:
            unpacked = fetch(f"linux-source-{SERIES}", directory=directory)
            archive = unpacked / "usr" / "src" / f"linux-source-{SERIES}.tar.xz"
            run(["tar", "--extract", "--file", archive, "--directory", directory])
            shutil.rmtree(unpacked)
            _make(directory / f"linux-source-{SERIES}")
    return path / f"linux-source-{SERIES}"


def _make(tree: Path) -> None:
    configuration = {"KCONFIG_ALLCONFIG": str(CONFIG)}
    run(["make", "-s", "allnoconfig"], directory=tree, environment=configuration)
    settings = (tree / ".config").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in CONFIG.read_text(encoding="utf-8").splitlines() if line.startswith("CONFIG_")]
    lost = [line for line in wanted if line not in settings]
    print(f"not to be had in this kernel: {', '.join(lost) or 'nothing'}", file=sys.stderr)
    run(["make", "-s", f"-j{os.cpu_count()}", "bzImage", "modules"], directory=tree)
    (tree / "empty" / "lib" / "modules").mkdir(parents=True)


@dataclass(frozen=True)
class DebugKernel(OtherKernel):
    """Everything that it needs is built in."""

    def kernel(self) -> Kernel:
        """The built tree, as if it were unpacked from a package."""
        tree = source()
        release = (tree / "include" / "config" / "kernel.release").read_text(encoding="ascii").strip()
        return Kernel(release=release, image=tree / "arch" / "x86" / "boot" / "bzImage", modules=tree / "empty")

    def module(self, name: str) -> Path:
        """NAME.ko, built against the tree."""
        return build.module_against(source(), name)

    def parameters(self) -> str:
        """ACPI's interpreter is so slow here that it may give up the routes of interrupts, and a VM without them stands still."""
        return f"{super().parameters()} pci=noacpi"

    def early(self, kernel: Kernel) -> list[Path]:
        """Nothing."""
        return []


def main() -> int:
    """The exit status: 0 if nobody complained."""
    parser = argparse.ArgumentParser(description="The modules on a kernel that watches itself.")
    parser.add_argument("--minutes", type=float, default=10, help="of each fuzzer (%(default)s)")
    parser.add_argument("--module", choices=MODULES, help="only this one")
    arguments = parser.parse_args()
    chosen, minutes = [arguments.module] if arguments.module else list(MODULES), arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        script = SCRIPT.format(tests="\n".join(tests(name, minutes) for name in chosen), pattern=" -e ".join(chosen))
        limit = 3600 + 60 * minutes * len(chosen)
        status = DebugKernel(SERIES, tuple(chosen)).run(["sh", "-c", script], timeout=limit, output=output)
        print(output.read_text())
    print("no report" if status == 0 else f"ended with {status}")
    return status


if __name__ == "__main__":
    sys.exit(main())
