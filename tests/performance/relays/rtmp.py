# SPDX-License-Identifier: Apache-2.0
"""As much of RTMP (Adobe's specification 1.0) as one needs to publish a stream on a server and to play it: the plain handshake,
three commands, and pieces as sound (MP3). For `./run bench peers`."""

from __future__ import annotations

import os
import socket
import struct
import time

APPLICATION, STREAM = "live", "radio"
CHUNK = 65536
"""Bytes; larger than any message of ours, so that none is cut."""
_SET_CHUNK_SIZE, _AUDIO, _COMMAND = 1, 8, 20
_MP3 = b"\x2f"
"""The byte before a frame of sound (FLV, E.4.2.1): MP3, 44 kHz, 16 bits, stereo."""


class Client:
    """A connection that publishes or plays. `sock` is what a player's stream comes on."""

    def __init__(self, port: int, *, publish: bool) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=20)
        self._seen = b""
        self._begun = time.monotonic()
        self._shake_hands()
        self._say(2, _SET_CHUNK_SIZE, 0, struct.pack(">I", CHUNK))
        self._command(0, "connect", 1.0, {"app": APPLICATION, "tcUrl": f"rtmp://127.0.0.1:{port}/{APPLICATION}"})
        self._until(b"_result")
        self._command(0, "createStream", 2.0, None)
        self._until(b"_result")
        self._command(1, *(("publish", 3.0, None, STREAM, "live") if publish else ("play", 3.0, None, STREAM)))
        self._until(b"Publish.Start" if publish else b"Play.Start")
        self.sock.settimeout(None)

    def send(self, piece: bytes) -> None:
        """One piece of the stream."""
        self._say(4, _AUDIO, 1, _MP3 + piece)

    def _shake_hands(self) -> None:
        """Section 5.2: C0 and C1, S0 to S2, C2."""
        self.sock.sendall(b"\3" + bytes(8) + os.urandom(1528))
        answer = b""
        while len(answer) < 1 + 2 * 1536:
            answer += self.sock.recv(1 + 2 * 1536 - len(answer))
        self.sock.sendall(answer[1:1537])

    def _say(self, channel: int, kind: int, stream: int, body: bytes) -> None:
        """One message in one chunk (section 5.3); before the chunk size is told, only short ones."""
        stamp = int((time.monotonic() - self._begun) * 1000) & 0xFFFFFF
        head = struct.pack(">B3s3sB", channel, stamp.to_bytes(3, "big"), len(body).to_bytes(3, "big"), kind)
        self.sock.sendall(head + struct.pack("<I", stream) + body)

    def _command(self, stream: int, *values: object) -> None:
        self._say(3, _COMMAND, stream, b"".join(map(amf, values)))

    def _until(self, words: bytes) -> None:
        while words not in self._seen:
            data = self.sock.recv(65536)
            if not data:
                raise RuntimeError(f"the server closed before {words!r}: {self._seen[-200:]!r}")
            self._seen += data
        self._seen = self._seen.split(words, 1)[1]

    def close(self) -> None:
        """The connection."""
        self.sock.close()


def amf(value: object) -> bytes:
    """AMF0."""
    if value is None:
        return b"\5"
    if isinstance(value, float):
        return b"\0" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"\2" + _text(value)
    if isinstance(value, dict):
        return b"\3" + b"".join(_text(name) + amf(one) for name, one in value.items()) + b"\0\0\t"
    raise TypeError(f"{value!r}")


def _text(words: str) -> bytes:
    return struct.pack(">H", len(words)) + words.encode()
