# SPDX-License-Identifier: Apache-2.0
"""The files beneath a root directory, with what HTTP says about them."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from email.utils import formatdate

from guest_agent import offload

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
class MediaFile:
    """An open file. `modified` in seconds of the epoch."""

    file: offload.File
    size: int
    modified: int
    etag: str
    content_type: str

    def close(self) -> None:
        """Until then the share may leave and come back: the file is the same afterwards."""
        self.file.close()

    @property
    def last_modified(self) -> str:
        """As HTTP writes dates."""
        return formatdate(self.modified, usegmt=True)


class Root:
    """A directory that requests do not leave: neither by `..` nor by a symbolic link."""

    def __init__(self, path: str) -> None:
        self._path = os.path.realpath(path, strict=True)
        if not os.path.isdir(self._path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)

    async def open(self, path: bytes) -> MediaFile:
        """Open a file by its path beneath the root. Raises OSError, FileNotFoundError also for what is outside."""
        if not path or b"\0" in path or b".." in path.split(b"/") or path.startswith(b"/"):
            raise FileNotFoundError(path)
        file = await offload.open(os.path.join(self._path, os.fsdecode(path)), beneath=self._path)
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            file.close()
            raise FileNotFoundError(path)
        extension = os.path.splitext(path)[1].decode("latin-1").lower()
        return MediaFile(
            file=file,
            size=facts.st_size,
            modified=int(facts.st_mtime),
            etag=f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"',
            content_type=CONTENT_TYPES.get(extension, "application/octet-stream"),
        )
