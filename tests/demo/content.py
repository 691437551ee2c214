# SPDX-License-Identifier: Apache-2.0
"""DASH content (ISO/IEC 23009-1) made by ffmpeg: three ladders with the rates and lengths of Jeong 2015, Table I."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.mpd"


@dataclass(frozen=True)
class Ladder:
    """One quality: bits a second, seconds of a segment, how many segments, and the picture."""

    name: str
    rate: int
    seconds: int
    segments: int
    picture: str


LADDERS = (
    Ladder("tv", 6_000_000, 15, 4, "1280x720"),
    Ladder("tablet", 1_200_000, 10, 6, "640x360"),
    Ladder("phone", 400_000, 6, 10, "320x180"),
)


def command(ladder: Ladder) -> list[str]:
    """ffmpeg's arguments. The rate is constant (filler data), so that segments have the size that their name promises."""
    source = f"testsrc2=size={ladder.picture}:rate=25:duration={ladder.seconds * ladder.segments}"
    rate = str(ladder.rate)
    every = str(25 * ladder.seconds)
    return [
        *("ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-c:v", "libx264", "-preset", "ultrafast"),
        *("-b:v", rate, "-minrate", rate, "-maxrate", rate, "-bufsize", rate, "-x264-params", "nal-hrd=cbr:force-cfr=1"),
        *("-g", every, "-keyint_min", every, "-sc_threshold", "0", "-bitexact", "-threads", "1"),
        *("-f", "dash", "-seg_duration", str(ladder.seconds), "-use_template", "1", "-use_timeline", "0"),
        *("-init_seg_name", "init.mp4", "-media_seg_name", "segment-$Number%02d$.m4s", MANIFEST),
    ]


def make(cache: Path, *, progress: Callable[[str], None]) -> Path:
    """The folder with a folder for each ladder, from the cache if it is there."""
    key = hashlib.sha256(repr([command(ladder) for ladder in LADDERS]).encode()).hexdigest()[:16]
    made = cache / f"dash-{key}"
    if made.exists():
        return made
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="dash-", dir=cache))
    try:
        for ladder in LADDERS:
            progress(f"encoding {ladder.name}: {ladder.segments} segments of {ladder.seconds} s at {ladder.rate / 1e6:g} Mbit/s")
            (unfinished / ladder.name).mkdir()
            subprocess.run(command(ladder), cwd=unfinished / ladder.name, check=True)
        unfinished.chmod(0o755)
        os.rename(unfinished, made)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return made


def files(content: Path, ladder: Ladder) -> list[Path]:
    """What a client fetches of a ladder: manifest, initialisation and media segments."""
    found = sorted((content / ladder.name).iterdir())
    if len([path for path in found if path.suffix == ".m4s"]) != ladder.segments:
        raise RuntimeError(f"ffmpeg made {len(found)} files for {ladder.name}, expected {ladder.segments} segments and two more")
    return found
