# SPDX-License-Identifier: Apache-2.0
"""A channel that can be cut at a chosen message: it stands between the service and the agent's port, and understands frames."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from guest_agent.handoff.wire import PREFIX


class Relay:
    """Listens at `front`, forwards to `back`. Cut once: at the first message of type `cut_at` after `arm()`, which is delivered
    before the cut or lost with it."""

    def __init__(self, front: Path, back: Path, *, cut_at: str, delivered: bool) -> None:
        self._front, self._back, self._cut_at, self._delivered = str(front), str(back), cut_at, delivered
        self._armed, self.has_cut = threading.Event(), threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._threads: list[threading.Thread] = []
        self._closing = False

    def __enter__(self) -> Self:
        self._listener.bind(self._front)
        self._listener.listen()
        self._run(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        self._listener.close()
        os.unlink(self._front)

    def arm(self) -> None:
        """From now on."""
        self._armed.set()

    def _run(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._closing:
                service, _ = self._listener.accept()
                agent = socket.socket(socket.AF_UNIX)
                try:
                    agent.connect(self._back)
                except OSError:
                    service.close()
                    agent.close()
                    continue
                for source, to in ((service, agent), (agent, service)):
                    self._run(self._forward, source, to)

    def _forward(self, source: socket.socket, to: socket.socket) -> None:
        """One direction, frame by frame, until either end closes or the cut comes."""
        buffer = bytearray()
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                buffer += data
                while (frame := _next_frame(buffer)) is not None:
                    cut = self._is_the_one(frame)
                    if not cut or self._delivered:
                        to.sendall(frame)
                    if cut:
                        raise OSError("cut")
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()

    def _is_the_one(self, frame: bytes) -> bool:
        length = PREFIX.unpack_from(frame)[2]
        kind = json.loads(frame[PREFIX.size : PREFIX.size + length])["type"]
        if kind != self._cut_at or not self._armed.is_set() or self.has_cut.is_set():
            return False
        self.has_cut.set()
        return True


def _next_frame(buffer: bytearray) -> bytes | None:
    """Take a whole frame from the front."""
    if len(buffer) < PREFIX.size:
        return None
    _, _, header, body, _, _ = PREFIX.unpack_from(buffer)
    size = PREFIX.size + header + body
    if len(buffer) < size:
        return None
    frame = bytes(buffer[:size])
    del buffer[:size]
    return frame
