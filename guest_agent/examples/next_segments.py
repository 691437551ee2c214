# SPDX-License-Identifier: Apache-2.0
"""What the client of one connection is likely to ask next: DASH and HLS clients that asked for one segment mostly ask for the one
after; of those that did not, nothing is anticipated until they do. `offload.sendfile_async` is told with the answers, and the host
gives them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace

from guest_agent.examples.http_request import Request
from guest_agent.examples.media_answer import answer_file
from guest_agent.examples.media_files import Root
from guest_agent.handoff.anticipated import MAX_REQUEST
from guest_agent.offload import Anticipated

_NUMBERED = re.compile(r"(.*?)(\d{1,18})(\D*)")
_VARIES = frozenset({"if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if-range"})
"""Headers that say something else in each request, or of each file."""


class NextSegments:
    """Of one connection."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._head, self._request = b"", Request("", "", {}, False, 0, False)
        self._in_order = False

    def heard(self, head: bytes, request: Request) -> None:
        """The client has asked for this."""
        self._in_order = not self._head or successor(self._request.target) == request.target
        self._head, self._request = head, request

    def answered(self, last: Anticipated) -> None:
        """The host has, up to this one."""
        target = last.request.split(b" ", 2)[1].decode("latin-1")
        self._head, self._request = last.request, replace(self._request, target=target)

    @property
    def is_likely(self) -> bool:
        """Whether it is worth while to anticipate anything."""
        request = self._request
        plain = request.method == "GET" and request.keep_alive and request.length == 0 and len(self._head) < MAX_REQUEST
        whole = request.headers.get("range", "bytes=0-") == "bytes=0-" and request.headers.keys().isdisjoint(_VARIES)
        return self._in_order and plain and whole and successor(request.target) is not None

    def anticipate(self) -> Iterator[Anticipated]:
        """The segments that are there."""
        request, rest = self._request, self._head.split(b" ", 2)[2]
        while (target := successor(request.target)) is not None:
            request = replace(request, target=target)
            facts = self._root.facts(request.path)
            if facts is None or not facts.size:
                return
            answer = answer_file(request, facts)
            (_, offset, count), *_ = answer.parts
            yield Anticipated(
                request=b"GET " + target.encode("latin-1") + b" " + rest,
                head=answer.head(keep_alive=True),
                path=self._root.locate(request.path),
                offset=offset,
                count=count,
                size=facts.size,
                mtime_ns=facts.mtime_ns,
            )


def successor(target: str) -> str | None:
    """The target with its number one larger, as wide as it is; None: it has none. The number is the last of the file's name, but
    for its extension."""
    path, question, query = target.partition("?")
    folder, slash, name = path.rpartition("/")
    stem, extension = os.path.splitext(name)
    match = _NUMBERED.fullmatch(stem)
    if match is None:
        return None
    before, number, after = match.groups()
    return f"{folder}{slash}{before}{int(number) + 1:0{len(number)}d}{after}{extension}{question}{query}"
