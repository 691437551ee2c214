# SPDX-License-Identifier: Apache-2.0
"""Answers of the example media server, without I/O: status, headers, and which parts of a file (RFC 9110)."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus

from guest_agent.examples.http_request import HttpError, Request, not_modified, parse_ranges, range_applies
from guest_agent.examples.media_files import Facts, MediaFile


@dataclass
class Answer:
    """A response: a small body, or parts of a file as (bytes before it, offset, count) with an epilogue."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    media: MediaFile | None = None
    parts: tuple[tuple[bytes, int, int], ...] = ()
    epilogue: bytes = b""
    keep_alive: bool = True

    @property
    def length(self) -> int:
        """Of the whole body, in bytes."""
        return len(self.body) + sum(len(prefix) + count for prefix, _, count in self.parts) + len(self.epilogue)

    def head(self, *, keep_alive: bool) -> bytes:
        """Status line and headers."""
        lines = [f"HTTP/1.1 {self.status} {_PHRASES[self.status]}", f"Date: {_date()}", "Server: streamlift-example"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if self.status != 304:
            lines.append(f"Content-Length: {self.length}")
        lines.append("Connection: keep-alive" if keep_alive else "Connection: close")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def close(self) -> None:
        """Close the file."""
        if self.media is not None:
            self.media.close()


_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_now = (0, "")


def _date() -> str:
    """The Date header, formatted once a second."""
    global _now
    second = int(time.time())
    if _now[0] != second:
        _now = second, formatdate(second, usegmt=True)
    return _now[1]


def json_answer(value: object) -> Answer:
    """Not to be kept by anybody."""
    body = json.dumps(value).encode() + b"\n"
    return Answer(200, (("Content-Type", "application/json"), ("Cache-Control", "no-store")), body)


def refusal(error: HttpError) -> Answer:
    """Why not."""
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "text/plain; charset=utf-8"),)
    if error.status == 405:
        headers += (("Allow", "GET, HEAD, POST, PUT"),)
    return Answer(error.status, headers, f"{error}\n".encode(), keep_alive=error.keep_alive)


def answer_file(request: Request, media: Facts) -> Answer:
    """What GET and HEAD of a file that is there are answered; its `media` is to be added."""
    validators = (("ETag", media.etag), ("Last-Modified", media.last_modified))
    if not_modified(request, media.etag, media.modified):
        return Answer(304, validators)
    common = (*validators, ("Accept-Ranges", "bytes"))
    ranges = _ranges(request, media)
    if ranges is None:
        whole = ((b"", 0, media.size),)
        return Answer(200, (*common, ("Content-Type", media.content_type)), parts=whole)
    if not ranges:
        return Answer(416, (*common, ("Content-Range", f"bytes */{media.size}")))
    if len(ranges) > 1:
        return _multipart(media, common, ranges)
    offset, count = ranges[0]
    described = (("Content-Type", media.content_type), ("Content-Range", _content_range(media, offset, count)))
    return Answer(206, (*common, *described), parts=((b"", offset, count),))


def _ranges(request: Request, media: Facts) -> list[tuple[int, int]] | None:
    header = request.headers.get("range")
    if header is None or request.method != "GET" or not range_applies(request, media.etag, media.modified):
        return None
    return parse_ranges(header, media.size)


def _content_range(media: Facts, offset: int, count: int) -> str:
    return f"bytes {offset}-{offset + count - 1}/{media.size}"


def _multipart(media: Facts, common: tuple[tuple[str, str], ...], ranges: list[tuple[int, int]]) -> Answer:
    """RFC 9110, 14.6. The boundary is random so that no file can contain it."""
    boundary = os.urandom(16).hex()
    parts = []
    for offset, count in ranges:
        described = f"Content-Type: {media.content_type}\r\nContent-Range: {_content_range(media, offset, count)}"
        parts.append((f"\r\n--{boundary}\r\n{described}\r\n\r\n".encode("latin-1"), offset, count))
    headers = (*common, ("Content-Type", f"multipart/byteranges; boundary={boundary}"))
    return Answer(206, headers, parts=tuple(parts), epilogue=f"\r\n--{boundary}--\r\n".encode())
