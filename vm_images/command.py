# SPDX-License-Identifier: Apache-2.0
"""The one way in which this package runs programs."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# Every time stamp in an image is this one (2024-01-01), so equal inputs give equal bytes.
EPOCH = 1704067200

# What programs are told. Bytecode that a package's own script leaves behind differs from time to time.
ENVIRONMENT = {"LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": str(EPOCH), "PYTHONDONTWRITEBYTECODE": "1"}

# Debian's package of a program that is not called like it.
PACKAGE_OF = {"mke2fs": "e2fsprogs", "depmod": "kmod", "modprobe": "kmod", "qemu-img": "qemu-utils", "nft": "nftables"}


class BuildError(Exception):
    """A program that the build needs has failed: the text holds its last words, `hint` what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def run(
    arguments: Sequence[str | Path],
    *,
    text: str | None = None,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a program to its end and return what it printed; `BuildError` if it fails or is not there. What our own Python is told
    (PYTHONPATH, PYTHONPYCACHEPREFIX, ...) is not for an image's."""
    command = [str(argument) for argument in arguments]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables = {**ours, **ENVIRONMENT, **(environment or {})}
    try:
        result = subprocess.run(command, input=text, capture_output=True, text=True, cwd=directory, env=variables, check=False)
    except FileNotFoundError as error:
        package = PACKAGE_OF.get(command[0], command[0])
        raise BuildError(f"{command[0]} is not installed", f"sudo apt-get install {package}") from error
    if result.returncode != 0:
        last_words = (result.stderr or result.stdout).strip()[-2000:]
        raise BuildError(f"{' '.join(command[:3])} ... ended with {result.returncode}: {last_words}")
    return result.stdout
