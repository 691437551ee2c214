# SPDX-License-Identifier: Apache-2.0
"""What the example server anticipates: the segments after those that were asked for in order, as the client would ask for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from guest_agent.examples.http_request import parse_head
from guest_agent.examples.media_files import Root
from guest_agent.examples.next_segments import NextSegments, successor
from guest_agent.handoff.anticipated import Anticipated

SEGMENTS, SIZE = 40, 1000


@pytest.mark.parametrize(
    "target, following",
    [
        ("/tv/6m/seg-12.m4s", "/tv/6m/seg-13.m4s"),
        ("/tv/00099.ts", "/tv/00100.ts"),
        ("/99.ts?token=7", "/100.ts?token=7"),
        ("/chunk-stream0-00005.m4s", "/chunk-stream0-00006.m4s"),
        ("/1.video.m4s", "/2.video.m4s"),
        ("/12", "/13"),
        ("/init.mp4", None),
        ("/v2/init.mp4", None),
        ("/v2/", None),
        ("", None),
    ],
)
def test_the_one_after(target: str, following: str | None) -> None:
    assert successor(target) == following


def test_no_target_takes_long() -> None:
    assert successor("/" + "1a" * 8000) is not None
    assert successor("/" + "1" * 16000 + "a") is not None


@pytest.fixture
def root(tmp_path: Path) -> Root:
    (tmp_path / "film").mkdir()
    for number in range(1, SEGMENTS + 1):
        (tmp_path / "film" / f"{number}.m4s").write_bytes(bytes(SIZE + number))
    return Root(str(tmp_path))


def asked(root: Root, *numbers: int, more: str = "", method: str = "GET") -> NextSegments:
    """A client that has asked for these."""
    found = NextSegments(root)
    for number in numbers:
        head = f"{method} /film/{number}.m4s?x HTTP/1.1\r\nHost: me\r\n{more}\r\n".encode()
        found.heard(head, parse_head(head))
    return found


def ahead(found: NextSegments) -> list[Anticipated]:
    """All of it."""
    return list(found.anticipate())


def test_as_long_as_it_goes_in_order(root: Root, tmp_path: Path) -> None:
    assert not asked(root).is_likely
    assert asked(root, 1).is_likely
    assert not asked(root, 1, 3).is_likely
    assert not asked(root, 1, 1).is_likely
    assert asked(root, 1, 3, 4).is_likely
    found = asked(root, 1, 2)
    assert found.is_likely
    assert [one.path for one in ahead(found)] == [str(tmp_path / "film" / f"{number}.m4s") for number in range(3, SEGMENTS + 1)]
    third = ahead(found)[0]
    assert third.request == b"GET /film/3.m4s?x HTTP/1.1\r\nHost: me\r\n\r\n"
    assert third.head.startswith(b"HTTP/1.1 200 OK\r\n") and b"\r\nContent-Length: 1003\r\n" in third.head
    facts = os.stat(third.path)
    assert (third.offset, third.count, third.size, third.mtime_ns) == (0, 1003, 1003, facts.st_mtime_ns)


def test_to_the_end_of_the_film(root: Root) -> None:
    assert len(ahead(asked(root, 36, 37))) == 3
    assert ahead(asked(root, 39, 40)) == []


def test_it_goes_on_after_what_the_host_answered(root: Root) -> None:
    found = asked(root, 1, 2)
    found.answered(ahead(found)[4])
    head = b"GET /film/8.m4s?x HTTP/1.1\r\nHost: me\r\n\r\n"
    found.heard(head, parse_head(head))
    assert found.is_likely
    assert ahead(found)[0].path.endswith("/9.m4s")


def test_a_range_of_everything(root: Root) -> None:
    """As ffmpeg asks."""
    third = ahead(asked(root, 1, 2, more="Range: bytes=0-\r\n"))[0]
    assert third.head.startswith(b"HTTP/1.1 206 Partial Content\r\n") and b"\r\nContent-Range: bytes 0-1002/1003\r\n" in third.head
    assert b"\r\nRange: bytes=0-\r\n" in third.request


@pytest.mark.parametrize(
    "more", ["Range: bytes=0-99\r\n", 'If-None-Match: "x"\r\n', "Connection: close\r\n", "Content-Length: 3\r\n"], ids=str.strip
)
def test_what_is_another_each_time(root: Root, more: str) -> None:
    assert not asked(root, 1, 2, more=more).is_likely


def test_what_is_no_get(root: Root) -> None:
    assert not asked(root, 1, 2, method="HEAD").is_likely


def test_a_segment_that_is_not_there_yet(root: Root, tmp_path: Path) -> None:
    """A live stream's next one; nobody remembers that it was missing."""
    found = asked(root, 39, 40)
    assert ahead(found) == []
    (tmp_path / "film" / "41.m4s").write_bytes(b"x")
    (tmp_path / "film" / "42.m4s").write_bytes(b"")  # and this one is being written
    assert [one.count for one in ahead(found)] == [1]


def test_what_leads_elsewhere(root: Root, tmp_path: Path) -> None:
    (tmp_path / "film" / "41.m4s").symlink_to("/etc/passwd")
    assert ahead(asked(root, 39, 40)) == []
