# SPDX-License-Identifier: Apache-2.0
"""A Debian kernel, cut down to what a guest on virtio needs."""

import lzma
import shutil
from dataclasses import dataclass
from pathlib import Path

from vm_images.command import BuildError, run
from vm_images.packages import fetch

# Loaded before the root file system is mounted, in this order, each after what it depends on.
EARLY_MODULES = (
    "virtio_pci",
    "virtio_blk",
    # ext4 asks for its checksum by name, so modules.dep does not say that it needs one.
    "crc32c_generic",
    "ext4",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "9pnet_virtio",
    "9p",
    "tcp_diag",
    "sch_fq",
    "tcp_bbr",
)

# Kept in the image, so that a guest can load them later.
KEPT_FOLDERS = ("net", "lib", "crypto", "arch", "drivers/virtio", "drivers/vhost", "drivers/net")
KEPT_MODULES = ("virtio_net", "tun", "veth", "dummy", "net_failover", "ifb", "tap", "autofs4", "overlay", "button", "evdev")


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: `modules` is the tree that holds lib/modules/RELEASE."""

    release: str
    image: Path
    modules: Path


def unpack_kernel(package: str, *, version: str, directory: Path) -> Kernel:
    """Download a kernel package and leave in `directory` the image and the modules that a guest may need."""
    unpacked = fetch(package, version=version, directory=directory)
    release = next((unpacked / "boot").glob("vmlinuz-*")).name.removeprefix("vmlinuz-")
    (unpacked / "boot" / f"vmlinuz-{release}").rename(directory / "vmlinuz")
    source = unpacked / "lib" / "modules" / release
    target = directory / "tree" / "lib" / "modules" / release
    _run_depmod(unpacked, release=release)
    wanted = _with_dependencies(source, _kept(source))
    for name in sorted(wanted):
        _copy_plain(source / name, target=target / name)
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    _run_depmod(directory / "tree", release=release)
    shutil.rmtree(unpacked)
    return open_kernel(directory)


def open_kernel(directory: Path) -> Kernel:
    """The kernel that `unpack_kernel` left in `directory`."""
    release = next((directory / "tree" / "lib" / "modules").iterdir()).name
    return Kernel(release=release, image=directory / "vmlinuz", modules=directory / "tree")


def early_modules(kernel: Kernel, *, also: tuple[str, ...] = ()) -> list[Path]:
    """The modules for the initramfs, dependencies first; `also` are loaded after the others."""
    root = kernel.modules / "lib" / "modules" / kernel.release
    dependencies = _read_dependencies(root)
    by_name = {_module_name(path): path for path in dependencies}
    ordered: list[str] = []
    for name in (*EARLY_MODULES, *also):
        path = by_name.get(name)
        # A module that this series has built in (or does not have) is not there to load.
        for entry in [*reversed(dependencies[path]), path] if path else []:
            if entry not in ordered:
                ordered.append(entry)
    if not any(_module_name(entry) == "virtio_blk" for entry in ordered):
        raise BuildError(f"kernel {kernel.release} has no virtio_blk module")
    return [root / entry for entry in ordered]


def _module_name(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".ko", 1)[0].replace("-", "_")


def _run_depmod(tree: Path, *, release: str) -> None:
    run(["/sbin/depmod", "-b", tree, release])


def _read_dependencies(root: Path) -> dict[str, list[str]]:
    """modules.dep: each module's path and, nearest first, all it depends on."""
    lines = (root / "modules.dep").read_text(encoding="utf-8").splitlines()
    return {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}


def _kept(root: Path) -> set[str]:
    kept: set[str] = set()
    for name in _read_dependencies(root):
        inside = name.removeprefix("kernel/")
        if _module_name(name) in (*EARLY_MODULES, *KEPT_MODULES):
            kept.add(name)
        elif inside.startswith("drivers/net/"):
            continue
        elif inside.startswith(tuple(f"{folder}/" for folder in KEPT_FOLDERS)):
            kept.add(name)
    return kept


def _with_dependencies(root: Path, names: set[str]) -> set[str]:
    dependencies = _read_dependencies(root)
    return names | {needed for name in names for needed in dependencies[name]}


def _copy_plain(source: Path, *, target: Path) -> None:
    """Copy a module, unpacked: busybox's insmod hands the file to the kernel as it is."""
    if source.suffix == ".xz":
        target = target.with_suffix("")
        data = lzma.decompress(source.read_bytes())
    else:
        data = source.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
