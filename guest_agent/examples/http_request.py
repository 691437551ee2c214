# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 requests without I/O (RFC 9110, 9112): the head of a message, its body's framing, ranges and conditions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import unquote_to_bytes

MAX_HEAD = 16384
MAX_HEADERS = 100
MAX_RANGES = 16
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (\S+) HTTP/(\d)\.(\d)")
_BAD_VALUE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_RANGE = re.compile(r"(\d{0,18})-(\d{0,18})")


class HttpError(Exception):
    """A request that is answered with `status`; unless `keep_alive`, the connection closes after it."""

    def __init__(self, status: int, message: str, *, keep_alive: bool = False) -> None:
        super().__init__(message)
        self.status, self.keep_alive = status, keep_alive


@dataclass(frozen=True)
class Request:
    """The head of a request; header names are lower case. `length` is None for a chunked body."""

    method: str
    target: str
    headers: dict[str, str]
    keep_alive: bool
    length: int | None
    expects_continue: bool

    @property
    def path(self) -> bytes:
        """The path, percent-decoded, without the query and the leading slash."""
        target = self.target
        if not target.startswith("/"):  # absolute form (RFC 9112, 3.2.2)
            target = "/" + target.partition("://")[2].partition("/")[2]
        return unquote_to_bytes(target.partition("?")[0]).lstrip(b"/")


def find_head(data: bytearray) -> int:
    """Bytes up to and with the empty line, 0 if it has not come. Raises HttpError 431 if it cannot come any more."""
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD)
    if end < 0 and len(data) >= MAX_HEAD:
        raise HttpError(431, f"a request's head has at most {MAX_HEAD} bytes")
    return end + 4 if end >= 0 else 0


def parse_head(head: bytes) -> Request:
    """Parse a head as `find_head` found it. Raises HttpError."""
    lines = head[:-4].decode("latin-1").split("\r\n")
    method, target, minor = _parse_request_line(lines[0])
    headers = _parse_headers(lines[1:])
    if minor and "host" not in headers:
        raise HttpError(400, "no Host header")
    length = _body_length(headers)
    return Request(
        method=method,
        target=target,
        headers=headers,
        keep_alive=_keeps_alive(headers.get("connection", ""), minor),
        length=length,
        expects_continue=_expects_continue(headers.get("expect"), minor) and length != 0,
    )


def _parse_request_line(line: str) -> tuple[str, str, int]:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise HttpError(400, "the request line is none")
    method, target, major, minor = match.groups()
    if major != "1":
        raise HttpError(505, "HTTP/1.0 and HTTP/1.1 are spoken here")
    if not target.startswith(("/", "http://", "https://")) or not target.isascii():
        raise HttpError(400, "the target is neither a path nor a URL")
    return method, target, int(minor)


def _parse_headers(lines: list[str]) -> dict[str, str]:
    if len(lines) > MAX_HEADERS:
        raise HttpError(431, f"at most {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name) or _BAD_VALUE.search(value):
            raise HttpError(400, "a header is malformed")
        name, value = name.lower(), value.strip(" \t")
        if name in ("content-length", "host", "transfer-encoding") and headers.get(name, value) != value:
            raise HttpError(400, f"contradicting {name} headers")
        headers[name] = (
            value if name not in headers or name in ("content-length", "host") else f"{headers[name]}, {value}"
        )
    return headers


def _body_length(headers: dict[str, str]) -> int | None:
    """RFC 9112, 6.3. Both framings at once is how requests are smuggled: refused."""
    encoding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if encoding is not None:
        if length is not None:
            raise HttpError(400, "both Transfer-Encoding and Content-Length")
        if encoding.lower() != "chunked":
            raise HttpError(501, "the only transfer coding here is chunked")
        return None
    if length is None:
        return 0
    if not length.isascii() or not length.isdigit() or len(length) > 18:
        raise HttpError(400, "Content-Length is not a number")
    return int(length)


def _keeps_alive(connection: str, minor: int) -> bool:
    options = {option.strip().lower() for option in connection.split(",")} if connection else set()
    return "close" not in options if minor else "keep-alive" in options


def _expects_continue(expect: str | None, minor: int) -> bool:
    if expect is None or not minor:
        return False
    if expect.lower() != "100-continue":
        raise HttpError(417, "the only expectation here is 100-continue")
    return True


def parse_chunk_size(line: bytes) -> int:
    """The size in a chunk's first line (RFC 9112, 7.1); extensions are ignored."""
    size = line.partition(b";")[0].strip(b" \t")
    if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size):
        raise HttpError(400, "a chunk's size is not a number")
    return int(size, 16)


def parse_ranges(header: str, size: int) -> list[tuple[int, int]] | None:
    """The satisfiable ranges as (offset, count); None: ignore the header (RFC 9110, 14.2). An empty list means 416."""
    unit, _, text = header.partition("=")
    specs = [spec.strip(" \t") for spec in text.split(",")]
    if unit.strip().lower() != "bytes" or len(specs) > MAX_RANGES:
        return None
    ranges = []
    for spec in specs:
        match = _RANGE.fullmatch(spec)
        if match is None or spec == "-":
            return None
        first, last = match.groups()
        if first and last and int(last) < int(first):
            return None
        found = _one_range(first, last, size)
        if found[1] > 0:
            ranges.append(found)
    # Overlapping ranges that ask for more than the whole are an attack or a mistake: the whole serves both.
    return ranges if sum(count for _, count in ranges) <= size or len(ranges) == 1 else None


def _one_range(first: str, last: str, size: int) -> tuple[int, int]:
    if not first:
        count = min(int(last), size)
        return size - count, count
    start = int(first)
    end = min(int(last) + 1, size) if last else size
    return start, end - start


def not_modified(request: Request, etag: str, modified: int) -> bool:
    """Whether the client's copy is good (RFC 9110, 13.1.2 and 13.1.3); `modified` in seconds of the epoch."""
    tags = request.headers.get("if-none-match")
    if tags is not None:
        return tags.strip() == "*" or etag in [tag.strip().removeprefix("W/") for tag in tags.split(",")]
    since = _parse_date(request.headers.get("if-modified-since"))
    return since is not None and modified <= since


def range_applies(request: Request, etag: str, modified: int) -> bool:
    """Whether If-Range (RFC 9110, 13.1.5) leaves the Range header standing."""
    condition = request.headers.get("if-range")
    return condition is None or condition == etag or _parse_date(condition) == modified


def _parse_date(text: str | None) -> int | None:
    try:
        return int(parsedate_to_datetime(text).timestamp()) if text else None
    except (ValueError, TypeError, OverflowError):
        return None
