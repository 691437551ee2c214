# SPDX-License-Identifier: Apache-2.0
"""A client in the middle of a file: curl, whose output is read at leisure until somebody waits for its end."""

from __future__ import annotations

import hashlib
import subprocess
import threading

from tests.namespaces.topology import Namespace

PIECE, RATE = 1 << 16, 8_000_000
"""Bytes, and bytes a second."""


class Download(threading.Thread):
    """Of the body at `url`, by curl with these options."""

    def __init__(self, where: Namespace, url: str, *options: str) -> None:
        super().__init__(daemon=True)
        self._curl = where.popen(["curl", "-sSf", *options, url], stdout=subprocess.PIPE)
        self._got, self._hurry = hashlib.sha256(), threading.Event()
        self.start()

    def run(self) -> None:
        """While nobody waits, never quicker than RATE: it does not end before what is to happen meanwhile."""
        assert self._curl.stdout is not None
        with self._curl.stdout as body:
            while piece := body.read(PIECE):
                self._got.update(piece)
                self._hurry.wait(len(piece) / RATE)

    @property
    def over(self) -> bool:
        """Whether curl has ended."""
        return self._curl.poll() is not None

    def digest(self, *, seconds: float = 60) -> str:
        """The SHA-256 of all that came, when it ends, for which it makes haste now. Raises TimeoutExpired."""
        self._hurry.set()
        self.join(seconds)
        self._curl.wait(1)
        return self._got.hexdigest()

    def kill(self) -> None:
        """End it, wherever it is."""
        self._hurry.set()
        self._curl.kill()
        self._curl.wait()
        self.join()
