# SPDX-License-Identifier: Apache-2.0
"""The files beneath a root directory, with what HTTP says about them."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from email.utils import formatdate
from typing import IO

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

    file: IO[bytes]
    size: int
    modified: int
    etag: str
    content_type: str
    held: contextlib.ExitStack

    def close(self) -> None:
        """Until then the share may leave and come back: the file is the same afterwards."""
        self.held.close()
        self.file.close()

    @property
    def last_modified(self) -> str:
        """As HTTP writes dates."""
        return formatdate(self.modified, usegmt=True)


class Root:
    """A directory that requests do not leave: neither by `..` nor by a symbolic link."""

    def __init__(self, path: str) -> None:
        self._directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._held = contextlib.ExitStack()
        self._held.enter_context(offload.hold(self._directory))
        self._prefix = os.fsencode(os.readlink(f"/proc/self/fd/{self._directory}")).rstrip(b"/") + b"/"

    def close(self) -> None:
        """Opened files stay open."""
        self._held.close()
        os.close(self._directory)

    def open(self, path: bytes) -> MediaFile:
        """Open a file by its path beneath the root. Raises OSError, FileNotFoundError also for what is outside."""
        if not path or b"\0" in path or b".." in path.split(b"/") or path.startswith(b"/"):
            raise FileNotFoundError(path)
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=self._directory)
        try:
            # Asked of the open descriptor, so that no exchanged link can slip in between.
            facts = os.fstat(fd)
            inside = os.readlink(b"/proc/self/fd/%d" % fd).startswith(self._prefix)
            if not stat.S_ISREG(facts.st_mode) or not inside:
                raise FileNotFoundError(path)
            file = os.fdopen(fd, "rb", buffering=0)
            held = contextlib.ExitStack()
            held.enter_context(offload.hold(fd))
        except BaseException:
            os.close(fd)
            raise
        extension = os.path.splitext(path)[1].decode("latin-1").lower()
        return MediaFile(
            file=file,
            size=facts.st_size,
            modified=int(facts.st_mtime),
            etag=f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"',
            content_type=CONTENT_TYPES.get(extension, "application/octet-stream"),
            held=held,
        )
