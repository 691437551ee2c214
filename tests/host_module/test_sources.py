# SPDX-License-Identifier: Apache-2.0
"""What the kernel's own tools say of the modules' sources, and that dkms(8) builds them."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vm_images import build, module
from vm_images.packages import KERNEL_PACKAGES

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["socket_offload", "omss"])
def test_sparse(name: str, tmp_path: Path) -> None:
    """Address spaces, byte orders and locks, as sparse(1) sees them; the build itself takes a warning (W=1) for an error. For each
    kernel, side by side."""

    def complaints(series: str) -> list[str]:
        folder = tmp_path / series
        folder.mkdir()
        return module.sparse(ROOT / "host_module" / name, tree=build.headers(build.kernel(series)), directory=folder)

    with ThreadPoolExecutor() as pool:
        assert [line for found in pool.map(complaints, KERNEL_PACKAGES) for line in found] == []


@pytest.mark.parametrize("name", ["socket_offload", "omss"])
def test_checkpatch(name: str) -> None:
    """The kernel's own style, by the newer kernel's script."""
    assert module.checkpatch(ROOT / "host_module" / name, script=build.checkpatch("6.12")) == []


@pytest.mark.parametrize("name", ["socket_offload", pytest.param("omss", marks=pytest.mark.long)])
def test_dkms(name: str, tmp_path: Path) -> None:
    """`dkms.conf` is what dkms(8) takes: it builds the module for a kernel, from a folder of the sources alone."""
    found = build.kernel("6.12")
    sources, trees = tmp_path / f"{name}-0.1.0", [f"--{tree}tree={tmp_path / tree}" for tree in ("dkms", "install")]
    module.copy_sources(ROOT / "host_module" / name, sources)
    shutil.copy(ROOT / "host_module" / name / "dkms.conf", sources)
    for tree in ("dkms", "install"):
        (tmp_path / tree).mkdir()
    what = ["-m", name, "-v", "0.1.0", "-k", found.release, f"--kernelsourcedir={build.headers(found)}"]
    subprocess.run(["dkms", "build", *what, f"--sourcetree={tmp_path}", *trees], check=True)
    (built,) = (tmp_path / "dkms" / name).rglob(f"{name}.ko*")
    told = subprocess.run(["modinfo", "-F", "vermagic", built], capture_output=True, text=True, check=True).stdout
    assert told.split()[0] == found.release
