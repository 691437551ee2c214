# SPDX-License-Identifier: Apache-2.0
"""A kernel module of ours, built out of its tree against Debian's headers (Documentation/kbuild/modules.rst)."""

import re
import shutil
from pathlib import Path

from vm_images.command import BuildError, run
from vm_images.packages import fetch

SOURCES = ("*.c", "*.h", "uapi/*.h", "Kbuild", "Makefile")
HEADERS = "/usr/src/linux-headers-"


def sources(folder: Path) -> list[Path]:
    """All that a module is made of, in a fixed order."""
    found = sorted(path for pattern in SOURCES for path in folder.glob(pattern) if not path.name.endswith(".mod.c"))
    if not found:
        raise BuildError(f"{folder} holds no module")
    return found


def unpack_headers(release: str, *, directory: Path) -> None:
    """Download the headers of one kernel and what they need, and make them find each other where they are."""
    package = f"linux-headers-{release}"
    needed = run(["apt-cache", "depends", "--important", package])
    parts = re.findall(r"Depends: (linux-(?:headers-\S+-common|kbuild-\S+))", needed)
    if len(parts) != 2:
        raise BuildError(f"{package}: apt does not know it: 'apt-get update', or add its source")
    for name in (package, *parts):
        fetch(name, directory=directory)
    makefile = folder(directory, release=release) / "Makefile"
    beside = makefile.read_text(encoding="utf-8").replace("/usr/src/", "../")
    makefile.write_text(beside, encoding="utf-8")


def folder(directory: Path, *, release: str) -> Path:
    """Where the headers are that `unpack_headers` left in `directory`."""
    return directory / "unpacked" / f"{HEADERS[1:]}{release}"


def build_module(source: Path, *, tree: Path, directory: Path) -> None:
    """Build against a prepared kernel tree and leave the module in `directory`, the same bytes wherever that is. A warning is
    an error."""
    copy_sources(source, directory)
    variables = {"KCFLAGS": f"-Werror -ffile-prefix-map={directory}=. -ffile-prefix-map={tree}=headers"}
    run(["make", "-s", f"KDIR={tree}", "W=1"], directory=directory, environment=variables)
    run(["strip", "--strip-debug", "--remove-section=.note.gnu.build-id", f"{source.name}.ko"], directory=directory)


def sparse(source: Path, *, tree: Path, directory: Path) -> list[str]:
    """What sparse(1) says of the module's own files."""
    copy_sources(source, directory)
    command = f"make -s KDIR={tree} C=2 CF=-D__CHECK_ENDIAN__ 2>&1"
    lines = run(["sh", "-c", command], directory=directory).splitlines()
    return [line for line in lines if line.startswith(str(directory)) and ("warning" in line or "error" in line)]


NOT_CHECKED = {
    "LINUX_VERSION_CODE": "one source is built for several kernels; compat.h alone asks for the version",
    "CONSTANT_COMPARISON": "KERNEL_VERSION() on the right side of such a question is taken for a value",
    "CONST_STRUCT": "omss copies a struct proto_ops of the kernel when it is loaded, and replaces one call",
}
"""Rules of checkpatch.pl that cannot hold here, and why."""
CHECKPATCH = ("checkpatch.pl", "spelling.txt", "const_structs.checkpatch")


def unpack_checkpatch(series: str, *, directory: Path) -> None:
    """Download the sources of a kernel series and leave their checkpatch.pl, and what it reads, in `directory`."""
    unpacked = fetch(f"linux-source-{series}", directory=directory)
    archive = unpacked / "usr" / "src" / f"linux-source-{series}.tar.xz"
    wanted = [f"linux-source-{series}/scripts/{name}" for name in CHECKPATCH]
    run(["tar", "--extract", "--file", archive, "--directory", directory, "--strip-components=2", "--occurrence=1", *wanted])
    shutil.rmtree(unpacked)


def checkpatch(source: Path, *, script: Path) -> list[str]:
    """What checkpatch.pl says of the module's own files, but for NOT_CHECKED."""
    files = " ".join(str(path) for path in sources(source) if path.suffix in (".c", ".h"))
    options = f"--no-tree --terse --show-types --no-summary --ignore {','.join(NOT_CHECKED)}"
    lines = run(["sh", "-c", f"{script} {options} --file {files} 2>&1 || true"]).splitlines()
    return [line for line in lines if line.startswith(str(source))]


def copy_sources(source: Path, directory: Path) -> None:
    """Nothing that a build has left."""
    for path in sources(source):
        copy = directory / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
