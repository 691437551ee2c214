# SPDX-License-Identifier: Apache-2.0
"""A player: fetches numbered segments on one connection, as slowly as it likes, and compares every byte."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from tests.client import Reader
from tests.namespaces.topology import Namespace

SEGMENTS, SIZE = 40, 200_000


def make_film(folder: Path, *, segments: int = SEGMENTS, size: int = SIZE) -> None:
    """`folder/1.m4s` and so on, of which no two are alike."""
    folder.mkdir()
    for number in range(1, segments + 1):
        (folder / f"{number}.m4s").write_bytes(_bytes(number, size))


def _bytes(number: int, size: int) -> bytes:
    words = (f"{number:08d}{at:08d}".encode() for at in range(size // 16 + 1))
    return b"".join(words)[:size]


class Player:
    """On one connection to a server; the truth is in `film`, a folder."""

    def __init__(self, sock: socket.socket, film: Path) -> None:
        self.sock, self._film, self._reader = sock, film, Reader(sock)

    def request(self, number: int) -> bytes:
        """What it says for a segment."""
        return f"GET /{self._film.name}/{number}.m4s HTTP/1.1\r\nHost: x\r\nUser-Agent: player\r\n\r\n".encode()

    def ask(self, *numbers: int) -> None:
        """For these, in one go."""
        self.sock.sendall(b"".join(map(self.request, numbers)))

    def begin(self) -> int:
        """Read the next answer's head; how long its body is."""
        status, fields = self._reader.head()
        assert status == 200, (status, fields)
        return int(fields["content-length"])

    def take(self, count: int) -> bytes:
        """So much of the body."""
        while len(self._reader.buffer) < count:
            piece = self.sock.recv(1 << 16)
            assert piece, f"the server closed, {count - len(self._reader.buffer)} bytes before the end"
            self._reader.buffer += piece
        taken = bytes(self._reader.buffer[:count])
        del self._reader.buffer[:count]
        return taken

    def check(self, number: int) -> None:
        """The answer is this segment."""
        truth = (self._film / f"{number}.m4s").read_bytes()
        assert self.begin() == len(truth)
        assert self.take(len(truth)) == truth

    def fetch(self, *numbers: int) -> None:
        """One after another."""
        for number in numbers:
            self.ask(number)
            self.check(number)

    def closed(self) -> bool:
        """Whether the server has closed, and said nothing else."""
        return not self._reader.buffer and self.sock.recv(1) == b""


@contextlib.contextmanager
def player(where: Namespace, server: str, film: Path) -> Iterator[Player]:
    """A client that takes little at once."""
    with where.entered():
        sock = socket.socket()
    with sock:
        sock.settimeout(20)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        sock.connect((server, 80))
        yield Player(sock, film)
