# SPDX-License-Identifier: Apache-2.0
"""What a client is likely to ask next on its connection, and the answer. The host compares bytes and understands no HTTP: what is
not exactly what was anticipated (ISO/IEC 23009-5, AnticipatedRequests) goes home unread. Pure.

As JSON: [{"request": text, "head": text, "path": text, "offset": N, "count": N, "size": N, "mtime_ns": N}, ...], where `request`
and `head` are bytes, as Latin-1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from guest_agent.handoff.errors import GuestError, Reason

MAX_ANTICIPATED = 32
MAX_REQUEST, MAX_HEAD = 8192, 4096
"""Bytes. A head fits into any socket that has nothing to send (tcp(7), tcp_wmem)."""
MAX_TOLD = 1 << 16
"""Bytes of all that is anticipated on one connection."""
_LARGEST = 1 << 62
_FIELDS = frozenset({"request", "head", "path", "offset", "count", "size", "mtime_ns"})


@dataclass(frozen=True)
class Anticipated:
    """The next bytes of a client, and their answer: `head`, then `count` bytes from `offset` of the file at `path`, as long as that
    has `size` bytes and was last changed at `mtime_ns`."""

    request: bytes
    head: bytes
    path: str
    offset: int
    count: int
    size: int
    mtime_ns: int

    @property
    def size_told(self) -> int:
        """Bytes that have to be kept."""
        return len(self.request) + len(self.head) + len(self.path)


def write_anticipated(anticipated: Sequence[Anticipated]) -> list[dict[str, Any]]:
    """As JSON."""
    return [{**one.__dict__, "request": one.request.decode("latin-1"), "head": one.head.decode("latin-1")} for one in anticipated]


def read_anticipated(told: object) -> tuple[Anticipated, ...]:
    """The inverse. Raises GuestError for anything else."""
    if type(told) is not list or len(told) > MAX_ANTICIPATED:
        raise GuestError(Reason.BAD_REQUEST, f"what is anticipated is no list of at most {MAX_ANTICIPATED}")
    found = tuple(_read_one(one) for one in told)
    check_limits(found)
    return found


def _read_one(told: object) -> Anticipated:
    if type(told) is not dict or told.keys() != _FIELDS:
        raise GuestError(Reason.BAD_REQUEST, f"what is anticipated has the fields {', '.join(sorted(_FIELDS))}")
    path = told["path"]
    if type(path) is not str or not path or "\0" in path:
        raise GuestError(Reason.BAD_REQUEST, "an anticipated path is none")
    return Anticipated(
        request=_bytes("request", told["request"], MAX_REQUEST),
        head=_bytes("head", told["head"], MAX_HEAD),
        path=path,
        offset=_number("offset", told["offset"], 0),
        count=_number("count", told["count"], 1),
        size=_number("size", told["size"], 1),
        mtime_ns=_number("mtime_ns", told["mtime_ns"], 0),
    )


def _bytes(name: str, value: object, most: int) -> bytes:
    try:
        found = value.encode("latin-1") if isinstance(value, str) else b""
    except UnicodeEncodeError:
        found = b""
    if not 1 <= len(found) <= most:
        raise GuestError(Reason.BAD_REQUEST, f"an anticipated {name} has 1 to {most} bytes, as Latin-1")
    return found


def _number(name: str, value: object, least: int) -> int:
    if type(value) is not int or not least <= value < _LARGEST:
        raise GuestError(Reason.BAD_REQUEST, f"anticipated: {name} {value!r:.40} is out of range")
    return value


def within_limits(anticipated: Iterable[Anticipated]) -> Iterator[Anticipated]:
    """Those that may be told on one connection."""
    size = 0
    for one in islice(anticipated, MAX_ANTICIPATED):
        size += one.size_told
        if size > MAX_TOLD:
            return
        yield one


def check_limits(anticipated: Sequence[Anticipated]) -> None:
    """Whether all of them may be. Raises GuestError."""
    count, size = len(anticipated), sum(one.size_told for one in anticipated)
    if count > MAX_ANTICIPATED or size > MAX_TOLD:
        limits = f"{MAX_ANTICIPATED} of {MAX_TOLD} may be"
        raise GuestError(Reason.BAD_REQUEST, f"{count} requests of {size} bytes are anticipated; {limits}")


def find(anticipated: Sequence[Anticipated], first: int, data: bytes) -> int | None:
    """Which of them, from number `first` on, the client's next bytes begin with; None: none yet, but one may still come.
    Raises LookupError: none will."""
    left = range(first, len(anticipated))
    whole = next((at for at in left if data.startswith(anticipated[at].request)), None)
    if whole is None and not any(anticipated[at].request.startswith(data) for at in left):
        raise LookupError
    return whole
