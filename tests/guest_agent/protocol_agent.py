# SPDX-License-Identifier: Apache-2.0
"""An agent's door without the host behind it: speaks the whole protocol, and really sends files on the sockets it gets."""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, Self

Message = dict[str, Any]
Behaviour = Callable[[Message, list[int]], "Message | None"]


def reply(outcome: str, sent: int = 0, *, reason: str | None = None, errno: int | None = None) -> Message:
    """A reply without its number."""
    return {"v": 1, "outcome": outcome, "sent": sent, "reason": reason, "message": f"test: {reason}", "errno": errno}


def deliver(request: Message, fds: list[int]) -> Message:
    """Send the file on the socket that came, as the host would."""
    return reply("offloaded", send_bytes(fds, request["offset"], request["count"]))


def send_bytes(fds: list[int], offset: int, count: int) -> int:
    """Bytes sent of file fds[1] on socket fds[0]."""
    sent = 0
    os.set_blocking(fds[0], True)  # the open file description is shared: what follows is for that caller who waits
    try:
        while sent < count and (moved := os.sendfile(fds[0], fds[1], offset + sent, count - sent)):
            sent += moved
    finally:
        os.set_blocking(fds[0], False)
    return sent


class ProtocolAgent:
    """Listens at `path`. `behaviour` answers each sendfile and reclaim; None closes the connection unanswered. `seen`: files that a
    host would know while the share is away, and their sizes; empty: it cannot be asked. `unheard`: so many times the host is
    another one before it has answered."""

    def __init__(self, path: str, *, shares: list[str], threshold: int = 65536, behaviour: Behaviour = deliver) -> None:
        self.path, self.shares, self.threshold, self.behaviour = path, shares, threshold, behaviour
        self.anticipates = False
        self.greeting: Message | None = None
        self.requests: list[Message] = []
        self.connections = 0
        self.presence = "here"
        self.seen: dict[str, int] = {}
        self.unheard = 0
        self.let_go = threading.Event()
        self.answered = threading.Event()
        self._attending: set[socket.socket] = set()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; also after `stop`: a new life."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._spawn(self._accept, self._listener)

    def stop(self) -> None:
        """Close everything and wait for the threads."""
        if self._listener is not None:
            os.unlink(self.path)
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for connection in list(self._open):
            self._end(connection)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(5)
        self._threads.clear()

    def _spawn(self, run: Callable[[socket.socket], None], sock: socket.socket) -> None:
        thread = threading.Thread(target=run, args=(sock,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.add(connection)
            self._spawn(self._serve, connection)

    def hello(self) -> Message:
        """What a status says too."""
        told = {"agent_version": "0", "threshold": self.threshold, "shares": self.shares, "host": "up"}
        return {**told, "anticipates": self.anticipates}

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.send(json.dumps(self.greeting or {"v": 1, "hello": self.hello()}).encode())
            while self._serve_one(connection):
                pass
        except OSError:
            pass
        finally:
            self._end(connection)

    def _serve_one(self, connection: socket.socket) -> bool:
        size = socket.CMSG_SPACE(2 * array.array("i").itemsize)
        data, ancillary, _, _ = connection.recvmsg(1 << 16, size, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i", b"".join(rights for _, _, rights in ancillary)).tolist()
        try:
            if not data:
                return False
            request = json.loads(data)
            if request["op"] in ("attend", "let_go_of"):
                self._attend(connection, request["op"])
                return True
            if request["op"] == "look":
                self._look(connection, request)
                return True
            self.requests.append(request)
            if request["op"] == "anticipate":
                return True
            if request["op"] == "status":
                answer: Message | None = {"v": 1, "status": self.hello()}
            else:
                answer = self.behaviour(request, fds)
        finally:
            for fd in fds:
                os.close(fd)
        if answer is None:
            return False
        connection.send(json.dumps({**answer, "id": request["id"]}).encode())
        if request["op"] != "status":
            self.answered.set()
        return True

    def _attend(self, connection: socket.socket, operation: str) -> None:
        if operation == "let_go_of":
            self.let_go.set()
            return
        self._attending.add(connection)
        connection.send(self._note())

    def _look(self, connection: socket.socket, request: Message) -> None:
        answer, size = {"v": 1, "id": request["id"], "looked": errno.ENOENT}, self.seen.get(request["path"])
        if self.unheard:
            self.unheard -= 1
            gone = {**json.loads(self._note()), "look": False}
            for word in (gone, {**answer, "looked": errno.EAGAIN}, json.loads(self._note())):
                connection.send(json.dumps(word).encode())
            return
        if size is None:
            connection.send(json.dumps(answer).encode())
            return
        with open(os.memfd_create("seen", os.MFD_CLOEXEC), "wb") as memory:
            os.truncate(memory.fileno(), size)
            given = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_PATH | os.O_CLOEXEC)
        socket.send_fds(connection, [json.dumps({**answer, "looked": 0}).encode()], [given])
        os.close(given)

    def _note(self) -> bytes:
        leaving = self.presence == "leaving"
        told = {"presence": self.presence, "let_go": leaving, "look": leaving and bool(self.seen)}
        return json.dumps({"v": 1, **told, "hello": self.hello()}).encode()

    def tell(self, presence: str) -> None:
        """The VM is "leaving", or "here" again: everybody who attends hears of it."""
        self.presence = presence
        self.let_go.clear()
        for connection in self._attending & self._open:
            connection.send(self._note())

    def _end(self, connection: socket.socket) -> None:
        if connection in self._open:
            self._open.discard(connection)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
