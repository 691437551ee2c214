# SPDX-License-Identifier: Apache-2.0
"""The files beneath a root directory, with what HTTP says about them."""

from __future__ import annotations

import errno
import os
import stat
import time
from dataclasses import dataclass
from email.utils import formatdate

from guest_agent import offload
from guest_agent.handoff.recent import Recent

CONTENT_TYPES = {
    ".mpd": "application/dash+xml",
    ".m4s": "video/iso.segment",
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".m4a": "audio/mp4",
    ".cmfv": "video/mp4",
    ".cmfa": "audio/mp4",
    ".webm": "video/webm",
    ".m3u8": "application/vnd.apple.mpegurl",
    ".ts": "video/mp2t",
    ".aac": "audio/aac",
    ".mp3": "audio/mpeg",
    ".vtt": "text/vtt",
    ".html": "text/html; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".json": "application/json",
    ".jpg": "image/jpeg",
    ".png": "image/png",
}


@dataclass(frozen=True)
class Facts:
    """What HTTP says about a file."""

    size: int
    mtime_ns: int
    content_type: str

    @property
    def modified(self) -> int:
        """Seconds of the epoch."""
        return self.mtime_ns // 1_000_000_000

    @property
    def etag(self) -> str:
        """Another one after each change."""
        return f'"{self.mtime_ns:x}-{self.size:x}"'

    @property
    def last_modified(self) -> str:
        """As HTTP writes dates."""
        return formatdate(self.modified, usegmt=True)


@dataclass(frozen=True)
class MediaFile:
    """An open file."""

    file: offload.File
    facts: Facts

    def close(self) -> None:
        """Until then the share may leave and come back: the file is the same afterwards."""
        self.file.close()


_FACTS_LIMIT = 10.0
"""Seconds for which facts are believed: whoever acts on them looks again."""
_KNOWN = 4096


class Root:
    """A directory that requests do not leave: neither by `..` nor by a symbolic link."""

    def __init__(self, path: str) -> None:
        self._path = os.path.realpath(path, strict=True)
        if not os.path.isdir(self._path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        self._known: Recent[bytes, tuple[float, Facts]] = Recent(_KNOWN)

    async def open(self, path: bytes) -> MediaFile:
        """Open a file by its path beneath the root. Raises OSError, FileNotFoundError also for what is outside."""
        if not path or b"\0" in path or b".." in path.split(b"/") or path.startswith(b"/"):
            raise FileNotFoundError(path)
        file = await offload.open(self.locate(path), beneath=self._path)
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            file.close()
            raise FileNotFoundError(path)
        return MediaFile(file, _facts(path, status))

    def locate(self, path: bytes) -> str:
        """Its path in the file system."""
        return os.path.join(self._path, os.fsdecode(path))

    def facts(self, path: bytes) -> Facts | None:
        """Of a file that need not be there; as it was a short time ago, perhaps."""
        now = time.monotonic()
        until, known = self._known.get(path, (0.0, None))
        if now <= until:
            return known
        facts = self._look(path)
        if facts is not None:
            self._known[path] = now + _FACTS_LIMIT, facts
        return facts

    def _look(self, path: bytes) -> Facts | None:
        try:
            status = os.lstat(self.locate(path))
        except OSError:
            return None
        return _facts(path, status) if stat.S_ISREG(status.st_mode) else None


def _facts(path: bytes, status: os.stat_result) -> Facts:
    extension = os.path.splitext(path)[1].decode("latin-1").lower()
    return Facts(
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        content_type=CONTENT_TYPES.get(extension, "application/octet-stream"),
    )
