# SPDX-License-Identifier: Apache-2.0
"""What an agent makes of a host's look at a file; a list stands for the channel."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from guest_agent.look import Looks
from guest_agent.share import SharedFile

SEEN: dict[str, Any] = {"size": 1 << 40, "mtime_ns": 1_700_000_000_123_456_789, "inode": 7, "public": True}


class Asked:
    """One look, and its answer; the descriptor is a duplicate of the answer's."""

    def __init__(self, looks: Looks, sent: list[Any], path: object = "/srv/share/film/1.m4s", *, everything: bool = False) -> None:
        self.errno, self.fd = -1, -1
        looks.ask(path, ("/srv/other", "/srv/share/"), everything=everything, answer=self._answer)
        self.token = sent[-1]["token"] if sent else ""

    def _answer(self, number: int, fd: int | None = None) -> None:
        self.errno = number
        if fd is not None:
            self.fd = os.dup(fd)


@pytest.fixture
def sent() -> list[Any]:
    return []


@pytest.fixture
def looks(sent: list[Any]) -> Looks:
    return Looks(send=lambda header, body: sent.append(header))


def test_a_descriptor_stands_for_the_file(looks: Looks, sent: list[Any]) -> None:
    asked = Asked(looks, sent)
    assert sent == [{"type": "look", "token": asked.token, "path": "film/1.m4s"}]
    looks.message({"type": "seen", "token": asked.token, **SEEN})
    facts = os.fstat(asked.fd)
    assert (asked.errno, facts.st_size, facts.st_mtime_ns) == (0, SEEN["size"], SEEN["mtime_ns"])
    with pytest.raises(OSError) as error:
        os.pread(asked.fd, 1, 0)
    assert error.value.errno == errno.EBADF
    assert looks.find(asked.fd) == SharedFile("film/1.m4s", 7, 1 << 40)
    other = os.memfd_create("other", os.MFD_CLOEXEC)
    assert looks.find(other) is None
    looks.clear()
    assert looks.find(asked.fd) is None
    os.close(asked.fd)
    os.close(other)


def test_what_not_everybody_may_read(looks: Looks, sent: list[Any]) -> None:
    for everything, public, expected in ((False, False, errno.EACCES), (False, "yes", errno.EACCES), (True, False, 0)):
        asked = Asked(looks, sent, everything=everything)
        looks.message({"type": "seen", "token": asked.token, **SEEN, "public": public})
        assert asked.errno == expected
        if asked.fd >= 0:
            os.close(asked.fd)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"errno": errno.ENOENT}, errno.ENOENT),
        ({"errno": -1}, errno.EIO),
        ({"errno": "2"}, errno.EIO),
        ({}, errno.EIO),
        ({**SEEN, "size": -1}, errno.EIO),
        ({**SEEN, "size": True}, errno.EIO),
        ({**SEEN, "inode": 1 << 62}, errno.EIO),
        ({**SEEN, "mtime_ns": None, "errno": errno.ESTALE}, errno.ESTALE),
    ],
)
def test_what_the_host_may_say(looks: Looks, sent: list[Any], said: dict[str, Any], expected: int) -> None:
    asked = Asked(looks, sent)
    looks.message({"type": "seen", "token": asked.token, **said})
    assert (asked.errno, asked.fd) == (expected, -1)
    looks.message({"type": "seen", "token": asked.token, **SEEN})  # nobody waits for it any more
    assert asked.fd == -1


def test_what_is_not_asked(looks: Looks, sent: list[Any]) -> None:
    assert Asked(looks, sent, "/etc/passwd").errno == errno.EXDEV
    with pytest.raises(ValueError, match="no text"):
        Asked(looks, sent, 7)
    assert sent == []


def test_a_host_that_goes_away(looks: Looks, sent: list[Any]) -> None:
    asked = Asked(looks, sent)
    looks.host_down()
    assert asked.errno == errno.EAGAIN

    def lost(header: object, body: bytes) -> None:
        raise ConnectionError

    assert Asked(Looks(send=lost), []).errno == errno.EAGAIN
