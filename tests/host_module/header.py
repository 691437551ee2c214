# SPDX-License-Identifier: Apache-2.0
"""A uapi header as the compiler sees it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def compiled(header: Path, tmp_path: Path, expressions: list[str]) -> list[int]:
    """The values of C expressions over a header."""
    if os.geteuid() != 0 and not shutil.which("gcc"):
        pytest.skip("no gcc: sudo ./run test installs it")
    lines = "".join(f'printf("%lu\\n", (unsigned long)({expression}));' for expression in expressions)
    source = f'#include <stddef.h>\n#include <stdio.h>\n#include "{header}"\nint main(void) {{ {lines} return 0; }}\n'
    (tmp_path / "numbers.c").write_text(source, encoding="ascii")
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", tmp_path / "numbers", tmp_path / "numbers.c"], check=True)
    return [int(word) for word in subprocess.run([tmp_path / "numbers"], capture_output=True, check=True).stdout.split()]
