# SPDX-License-Identifier: Apache-2.0
"""Build a guest image, or find it in the cache: `python -m vm_images.build [--kernel 6.1|6.12]`.

Three layers, each cached by what went into it, so that a change of the agent costs seconds:
the bare Debian (`base-KEY/`), the kernel (`kernel-PACKAGE_VERSION-KEY/`), and the image itself (`KEY/`).
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vm_images import kernel as kernels
from vm_images import module as modules
from vm_images import packages, root
from vm_images.command import ENVIRONMENT, BuildError
from vm_images.initramfs import write_initramfs

Progress = Callable[[str], None]
RECIPE = Path(__file__).parent
DEFAULT_KERNEL = "6.1"
GUEST_MODULE = "socket_offload"
SPACE = 1 << 30
"""Bytes that one more layer may need, with what it is made from."""


@dataclass(frozen=True)
class Image:
    """A bootable guest: `root` is a raw ext4 image that virtual machines share read-only below their overlays."""

    root: Path
    kernel: Path
    initrd: Path
    version: str


def cache_directory() -> Path:
    """Where images are kept: $STREAMLIFT_CACHE/images, else /var/cache/streamlift/images."""
    return Path(os.environ.get("STREAMLIFT_CACHE") or "/var/cache/streamlift") / "images"


def build(kernel: str = DEFAULT_KERNEL, *, also: Sequence[str] = (), progress: Progress = lambda line: None) -> Image:
    """The image with this kernel series and the Debian packages `also`; takes half a minute when nothing is cached, else at
    most seconds."""
    if os.geteuid() != 0:
        raise BuildError("building an image needs root: files in it belong to root", "type it again with sudo")
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        base = _base(cache, also=also, progress=progress)
        unpacked = _kernel(cache, series=kernel, progress=progress)
        module = module_against(headers(unpacked, progress=progress), GUEST_MODULE, progress=progress)
        return _image(cache, base=base, kernel=unpacked, module=module, progress=progress)


def kernel(series: str = DEFAULT_KERNEL, *, progress: Progress = lambda line: None) -> kernels.Kernel:
    """The unpacked kernel of this series."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        return _kernel(cache, series=series, progress=progress)


def module(name: str, series: str = DEFAULT_KERNEL, *, progress: Progress = lambda line: None) -> Path:
    """NAME.ko of `host_module/NAME`, built for the kernel of this series."""
    found = kernel(series, progress=progress)
    cache = cache_directory()
    with _locked(cache / "lock"):
        return module_against(headers(found, progress=progress), name, progress=progress)


def headers(found: kernels.Kernel, *, progress: Progress = lambda line: None) -> Path:
    """The headers of a kernel: a tree to build modules against."""
    path = cache_directory() / f"headers-{found.release}-{key(_text(RECIPE / 'module.py'))}"
    with layer(path) as (directory, missing):
        if missing:
            progress(f"fetching the headers of Linux {found.release}")
            modules.unpack_headers(found.release, directory=directory)
    return modules.folder(path, release=found.release)


def checkpatch(series: str) -> Path:
    """checkpatch.pl of a kernel series."""
    path = cache_directory() / f"checkpatch-{kernel(series).release}-{key(_text(RECIPE / 'module.py'))}"
    with layer(path) as (directory, missing):
        if missing:
            modules.unpack_checkpatch(series, directory=directory)
    return path / modules.CHECKPATCH[0]


def module_against(tree: Path, name: str, *, progress: Progress = lambda line: None) -> Path:
    """NAME.ko of `host_module/NAME`, built against a tree in the cache."""
    source, cache = RECIPE.parent / "host_module" / name, cache_directory()
    built = cache / f"module-{name}-{key(str(tree.relative_to(cache)), *map(_text, modules.sources(source)))}"
    with layer(built) as (directory, missing):
        if missing:
            progress(f"building {name}.ko against {tree.name}")
            modules.build_module(source, tree=tree, directory=directory)
    return built / f"{name}.ko"


def busybox(found: kernels.Kernel) -> Path:
    """The statically linked busybox that lies beside an unpacked kernel."""
    return found.image.parent / "busybox" / "unpacked" / "bin" / "busybox"


def bare(*, also: Sequence[str] = (), progress: Progress = lambda line: None) -> Path:
    """The bare Debian with the packages `also`, nothing of ours in it: a tar archive."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        return _base(cache, also=also, progress=progress)


def _base(cache: Path, *, also: Sequence[str], progress: Progress) -> Path:
    sources = packages.debian_sources()
    name = key(*sources, *root.base_recipe(also), *map("=".join, ENVIRONMENT.items()))
    with layer(cache / f"base-{name}") as (directory, missing):
        if missing:
            progress("building the bare Debian with mmdebstrap (about 20 s)")
            root.make_base(directory / "root.tar", sources=sources, also=also)
    return cache / f"base-{name}" / "root.tar"


def _kernel(cache: Path, *, series: str, progress: Progress) -> kernels.Kernel:
    try:
        return _fetch_kernel(cache, series=series, progress=progress)
    except BuildError as error:
        # The lists may name a version that the archive has replaced meanwhile.
        progress(f"fetching apt's package lists anew: {error}")
        packages.refresh()
        return _fetch_kernel(cache, series=series, progress=progress)


def _fetch_kernel(cache: Path, *, series: str, progress: Progress) -> kernels.Kernel:
    package, version = packages.newest_kernel(series)
    path = cache / f"kernel-{package}_{version}-{key(_text(RECIPE / 'kernel.py'))}"
    with layer(path) as (directory, missing):
        if missing:
            progress(f"fetching {package} {version}")
            kernels.unpack_kernel(package, version=version, directory=directory)
            packages.fetch("busybox-static", directory=directory / "busybox")
    return kernels.open_kernel(path)


def _image(cache: Path, *, base: Path, kernel: kernels.Kernel, module: Path, progress: Progress) -> Image:
    inputs = [base.parent.name, kernel.modules.parent.name, module.parent.name, *(_text(path) for path in _recipe_files())]
    path = cache / key(*inputs)
    with layer(path) as (directory, missing):
        if missing:
            progress(f"building the guest image with Linux {kernel.release}")
            _fill(directory, base=base, kernel=kernel, module=module)
    version = json.loads(_text(path / "image.json"))["version"]
    return Image(root=path / "root.ext4", kernel=path / "vmlinuz", initrd=path / "initrd.img", version=version)


def _fill(directory: Path, *, base: Path, kernel: kernels.Kernel, module: Path) -> None:
    tree = directory / "tree"
    root.unpack_base(base, root=tree)
    root.install_modules(tree, modules=kernel.modules)
    root.install_module(tree, module=module, release=kernel.release)
    root.install_agent(tree)
    root.configure(tree)
    root.make_image(tree, image=directory / "root.ext4")
    shutil.rmtree(tree)
    shutil.copyfile(kernel.image, directory / "vmlinuz")
    write_initramfs(directory / "initrd.img", busybox=busybox(kernel), modules=kernels.early_modules(kernel))
    (directory / "image.json").write_text(json.dumps({"version": kernel.release}), encoding="utf-8")


def _recipe_files() -> list[Path]:
    """All that goes into the top layer, in a fixed order: this folder's recipe and the agent."""
    agent = [*root.AGENT.rglob("*.py"), *(root.AGENT / unit for unit in root.AGENT_UNITS)]
    found = [*RECIPE.glob("*.py"), *(RECIPE / "guest").iterdir(), *agent]
    return sorted(path for path in found if path.is_file())


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def key(*inputs: str) -> str:
    """A name for what was made of these."""
    digest = hashlib.sha256()
    for text in inputs:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two builds at once would do the same work twice: the second waits and finds it done."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def layer(path: Path) -> Iterator[tuple[Path, bool]]:
    """(directory, is it to be filled?): filled aside and renamed at the end, so a layer is whole or absent."""
    if path.exists():
        yield path, False
        return
    _require_space(path.parent)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix="making-"))
    try:
        aside.chmod(0o755)
        yield aside, True
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _require_space(folder: Path) -> None:
    """Better said before than by mke2fs(8) in the middle."""
    free = shutil.disk_usage(folder).free
    if free < SPACE:
        raise BuildError(
            f"{folder} has {free >> 20} MiB left; building an image needs {SPACE >> 20}",
            f"make room (df -h {folder}), or name another place: sudo STREAMLIFT_CACHE=/FOLDER ...",
        )


def main() -> int:
    """Build from the command line and print where the parts are, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m vm_images.build", description="Build a guest image.")
    parser.add_argument("--kernel", choices=sorted(packages.KERNEL_PACKAGES), default=DEFAULT_KERNEL)
    arguments = parser.parse_args()
    try:
        image = build(arguments.kernel, progress=lambda line: print(line, file=sys.stderr))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({name: str(value) for name, value in vars(image).items()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
