# SPDX-License-Identifier: Apache-2.0
"""The guest's agent as one file that any Python can run (a zip application, PEP 441): `attach` puts it on the VM's share."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from vm_images.root import AGENT

NAME = "streamlift-agent.pyz"
PARTS = ("*.py", "*.service", "*.mount")
_SHEBANG = b"#!/usr/bin/env python3\n"
# An old Python must be able to read this much, to be told that it is too old.
_MAIN = """import sys
if sys.version_info < (3, 11):
    sys.exit("streamlift-agent needs Python 3.11, and this is %d.%d\\n  sudo apt-get install python3.11" % sys.version_info[:2])
from guest_agent.__main__ import main
sys.exit(main())
"""
_TIME = (2024, 1, 1, 0, 0, 0)


def write(path: Path) -> None:
    """Write the file; it appears whole or not at all, and equal sources give equal bytes. Raises OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(_SHEBANG)
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                _add(archive, "__main__.py", _MAIN)
                for part in _parts():
                    _add(archive, str(part.relative_to(AGENT.parent)), part.read_text(encoding="utf-8"))
        aside.chmod(0o755)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def _parts() -> list[Path]:
    return sorted(path for pattern in PARTS for path in AGENT.rglob(pattern))


def _add(archive: zipfile.ZipFile, name: str, text: str) -> None:
    entry = zipfile.ZipInfo(name, _TIME)
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, text)
