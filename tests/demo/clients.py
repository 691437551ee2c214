# SPDX-License-Identifier: Apache-2.0
"""The clients of the demo, programs that everybody has: curl, and ffmpeg's DASH demuxer. What they get is compared with the
files."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.demo.content import MANIFEST
from tests.vm.namespaces import Namespaces

TIMEOUT = "120"


@dataclass(frozen=True)
class Fetched:
    """Bytes of every answer that was asked for, and what was wrong."""

    sizes: list[int]
    faults: list[str]


def curl(client: Namespaces, address: str, root: Path, files: Sequence[Path]) -> Fetched:
    """Every file, and a range from the middle of every one, on one keep-alive connection."""
    with tempfile.TemporaryDirectory() as folder:
        arguments: list[str] = ["curl", "-sSf", "--max-time", TIMEOUT, "-w", "%{num_connects}\n"]
        expected: list[tuple[Path, str, bytes]] = []
        for path in files:
            url, data = f"http://{address}/{path.relative_to(root)}", path.read_bytes()
            first, last = len(data) // 4, len(data) - len(data) // 4 - 1
            for part, options in ((data, []), (data[first : last + 1], ["-r", f"{first}-{last}"])):
                target = Path(folder) / str(len(expected))
                more = ["--next", "-sSf", "--max-time", TIMEOUT, "-w", "%{num_connects}\n"] if expected else []
                arguments += [*more, *options, "-o", str(target), url]
                expected.append((target, " ".join([url, *options]), part))
        done = subprocess.run(client.command(*arguments), capture_output=True, text=True, check=False)
        faults = [f"curl: {line}" for line in done.stderr.splitlines()]
        faults += [f"{what}: wrong bytes" for target, what, part in expected if not target.exists() or target.read_bytes() != part]
    connects = sum(int(line) for line in done.stdout.split())
    if connects != 1:
        faults.append(f"curl needed {connects} connections, the server shall keep one alive")
    return Fetched([len(part) for _, _, part in expected], faults)


def ffmpeg(client: Namespaces, address: str, root: Path, ladder: str, files: Sequence[Path]) -> Fetched:
    """Play a ladder without decoding, which fetches each of its files. The packets' hash must be that of the same played
    locally."""
    remote = client.command(*play(f"http://{address}/{ladder}/{MANIFEST}"))
    played = subprocess.run(remote, capture_output=True, text=True, check=False)
    local = subprocess.run(play(str(root / ladder / MANIFEST)), capture_output=True, text=True, check=True)
    wrong = played.returncode or played.stdout != local.stdout
    faults = [f"ffmpeg, {ladder}: {played.stderr[-300:].strip() or 'wrong bytes'}"] if wrong else []
    return Fetched([path.stat().st_size for path in files], faults)


def play(source: str, *, real_time: bool = False) -> list[str]:
    """ffmpeg's arguments: it prints the hash of all packets."""
    pace = ("-re",) if real_time else ()
    return ["ffmpeg", "-v", "error", *pace, "-i", source, "-map", "0", "-c", "copy", "-f", "hash", "-hash", "sha256", "-"]
