# SPDX-License-Identifier: Apache-2.0
"""DASH clients (ISO/IEC 23009-1): read the manifest, fetch every segment that it names, one after the other on one connection.

    python -m tests.performance.dash_client --server 10.78.0.2:80 --manifest tv/manifest.mpd --clients 50

They play nothing, so they fetch as fast as they can (Jeong 2015, section IV-C). All begin at once; prints a JSON object: the
seconds until the last has everything, and what each has got."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import threading
import time
import urllib.request
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from tests.performance.fetch import TIMEOUT, Connection

_NAMES = {"": "urn:mpeg:dash:schema:mpd:2011"}
_DURATION = re.compile(r"PT(?:(\d+(?:\.\d+)?)H)?(?:(\d+(?:\.\d+)?)M)?(?:(\d+(?:\.\d+)?)S)?")


@dataclass(frozen=True)
class Film:
    """What a manifest names, in the order in which it is fetched."""

    segments: tuple[str, ...]


def parse(manifest: bytes) -> Film:
    """A static manifest with a SegmentTemplate: duration and number. Raises ValueError."""
    root = ET.fromstring(manifest)
    template = root.find(".//SegmentTemplate", _NAMES)
    match = _DURATION.fullmatch(root.get("mediaPresentationDuration", ""))
    if template is None or match is None:
        raise ValueError("not a static manifest with a template")
    hours, minutes, rest = (float(part or 0) for part in match.groups())
    length = float(template.get("duration", "0")) / float(template.get("timescale", "1"))
    count = math.ceil((hours * 3600 + minutes * 60 + rest) / length - 1e-6)
    first = int(template.get("startNumber", "1"))
    return Film(tuple(_named(template.get("media", ""), first + at) for at in range(count)))


def _named(pattern: str, number: int) -> str:
    """$Number$ or $Number%05d$ filled in."""
    return re.sub(r"\$Number(%0\d+d)?\$", lambda match: (match[1] or "%d") % number, pattern)


class Client(threading.Thread):
    """One of them. `failure` is set if it did not get everything."""

    def __init__(self, server: str, manifest: str, segments: int | None, begin: threading.Event) -> None:
        super().__init__()
        self._server, self._manifest, self._segments, self._begin = server, manifest, segments, begin
        self.ready = threading.Event()
        self.bytes = 0
        self.failure = ""

    def run(self) -> None:
        """Connect and read the manifest; when all others have too, fetch."""
        try:
            with urllib.request.urlopen(f"http://{self._server}/{self._manifest}", timeout=TIMEOUT) as answer:
                film = parse(answer.read())
            connection = Connection(self._server, f"/{self._manifest}")
            folder = PurePosixPath("/", self._manifest).parent
            self.ready.set()
            self._begin.wait()
            for name in film.segments[: self._segments]:
                self.bytes += connection.get(str(folder / name))[2]
        except (OSError, ValueError, ET.ParseError) as error:
            self.failure = repr(error)
            self.ready.set()


def run(server: str, manifest: str, *, clients: int, segments: int | None) -> dict[str, Any]:
    """All of them; raises RuntimeError if one fails."""
    begin = threading.Event()
    made = [Client(server, manifest, segments, begin) for _ in range(clients)]
    for client in made:
        client.start()
    for client in made:
        client.ready.wait()
    started = time.perf_counter()
    begin.set()
    for client in made:
        client.join()
    seconds = time.perf_counter() - started
    failures = [client.failure for client in made if client.failure]
    if failures:
        raise RuntimeError(f"{len(failures)} of {clients} clients failed: {failures[0]}")
    return {"seconds": seconds, "bytes": [client.bytes for client in made]}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="fetch all segments of a DASH manifest")
    parser.add_argument("--server", required=True, metavar="ADDRESS:PORT")
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--segments", type=int, help="of each client; default: all")
    options = parser.parse_args()
    json.dump(run(options.server, options.manifest, clients=options.clients, segments=options.segments), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
