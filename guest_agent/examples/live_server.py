# SPDX-License-Identifier: Apache-2.0
"""A live server as Icecast's users know it: an encoder sends with PUT or SOURCE, listeners GET; MPEG-TS, MP3, AAC or anything.

    python -m guest_agent.examples.live_server --port 8000 --password hackme
    ffmpeg -re -i film.mkv -c copy -f mpegts -content_type video/mp2t icecast://source:hackme@SERVER:8000/film
    ffplay http://SERVER:8000/film

The control path is here: who may send, what a listener is told. The stream itself never is: encoder and listeners go to the
host's relay (`offload.publish`). A listener of a transport stream begins at a sync point. Metadata intervals are not asked for:
a stream arrives as it was sent. `GET /` tells what there is, as JSON. With `--folder` a file there that grows, NAME.ts, is the
stream /NAME.ts while somebody listens."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hmac
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from typing import Any

from guest_agent import offload
from guest_agent.examples.http_request import MAX_HEAD, HttpError, Request, find_head, parse_head
from guest_agent.examples.media_server import listen
from guest_agent.offload_relay import Relay

HEAD_LIMIT = 10.0
"""Seconds within which a head must come."""
TRANSPORT_STREAM = "video/mp2t"
_ICE = (b"ICE/1.0\r\n", b"HTTP/1.0\r\n")
_WORDS = {401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed", 409: "Conflict", 411: "Length Required"}


@dataclass
class Mount:
    """One stream. `listeners` counts those that are here now; without any, a file is not looked at (`idle`)."""

    path: str
    content_type: str
    name: str
    relay: Relay
    listeners: int = 0
    from_file: bool = False

    @property
    def idle(self) -> bool:
        """Nobody needs it."""
        return self.from_file and not self.listeners

    @property
    def join(self) -> str:
        """Where a new listener begins."""
        return "next_sync" if self.content_type == TRANSPORT_STREAM else "latest"


@dataclass
class Settings:
    """What the command line says."""

    password: str
    budget_ms: int
    ring_entries: int
    on_lag: str
    folder: str | None


@dataclass
class Server:
    """All mounts, and who is being served."""

    settings: Settings
    mounts: dict[str, Mount] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def serve(self, sock: socket.socket) -> None:
        """One connection, to its end."""
        try:
            request = await asyncio.wait_for(read_head(sock), HEAD_LIMIT)
            if request is None:
                return
            if request.method in ("PUT", "SOURCE"):
                await self._encoder(sock, request)
            elif request.method in ("GET", "HEAD"):
                await self._listener(sock, request)
            else:
                raise HttpError(405, "PUT, SOURCE, GET and HEAD are understood here")
        except HttpError as error:
            with contextlib.suppress(OSError):
                await _refuse(sock, error)
        except (OSError, TimeoutError):
            pass  # the other side is gone, or says nothing
        finally:
            sock.close()

    async def _encoder(self, sock: socket.socket, request: Request) -> None:
        path = _path(request)
        if not _allowed(request, self.settings.password):
            raise HttpError(401, "user source and the right password are needed")
        if path in self.mounts:
            raise HttpError(409, f"{path} has a source")
        if "transfer-encoding" in request.headers:
            raise HttpError(411, "send the stream as it is, not in chunks (ffmpeg: icecast:// or -chunked_post 0)")
        if request.method == "PUT" and request.headers.get("expect", "").lower() == "100-continue":
            await _say(sock, b"HTTP/1.1 100 Continue\r\n\r\n")
        else:
            await _say(sock, b"HTTP/1.0 200 OK\r\n\r\n")
        content_type = request.headers.get("content-type", "audio/mpeg")
        relay = await self._publish(sock, content_type)
        self.mounts[path] = Mount(path, content_type, request.headers.get("ice-name", ""), relay)
        try:
            await relay.over
        finally:
            del self.mounts[path]  # its listeners get what is left, and then their streams end

    async def _publish(self, source: Any, content_type: str) -> Relay:
        return await offload.publish(
            source,
            framing="mpegts" if content_type == TRANSPORT_STREAM else "raw",
            budget_ms=self.settings.budget_ms,
            ring_entries=self.settings.ring_entries,
        )

    async def _mount(self, path: str) -> Mount | None:
        """What there is at `path`; a file becomes a stream by being asked for."""
        async with self.opening:
            if path in self.mounts:
                return self.mounts[path]  # somebody else asked at the same time
            await offload.present()  # and nothing is waited for until the file is open, and held
            file = self._growing(path)
            if file is None:
                return None
            with contextlib.closing(file), offload.hold(file.fileno()):
                relay = await self._publish(file, TRANSPORT_STREAM)
            mount = self.mounts[path] = Mount(path, TRANSPORT_STREAM, "", relay, from_file=True)
            return mount

    def _growing(self, path: str) -> Any:
        """The file that grows, open."""
        name = path.removeprefix("/")
        if self.settings.folder is None or "/" in name or name.startswith(".") or not name.endswith(".ts"):
            return None
        try:
            return open(os.path.join(self.settings.folder, name), "rb")
        except OSError:
            return None

    async def _close_if_idle(self, mount: Mount) -> None:
        if mount.idle and self.mounts.get(mount.path) is mount:
            del self.mounts[mount.path]
            await mount.relay.close()

    async def _listener(self, sock: socket.socket, request: Request) -> None:
        path = _path(request)
        if path == "/":
            await _say(sock, await self._report())
            return
        mount = self.mounts.get(path) or await self._mount(path)
        if mount is None:
            raise HttpError(404, f"there is no {path}; there are: {', '.join(sorted(self.mounts)) or 'none'}")
        mount.listeners += 1
        try:
            await _say(sock, _stream_head(mount))
            if request.method == "HEAD":
                return
            sink = await mount.relay.add_sink(sock, join=mount.join, on_lag=self.settings.on_lag)
            await sink.wait()
        finally:
            mount.listeners -= 1
            await self._close_if_idle(mount)

    async def _report(self) -> bytes:
        rows = []
        for mount in list(self.mounts.values()):
            facts = {"mount": mount.path, "content_type": mount.content_type, "name": mount.name, "listeners": mount.listeners}
            rows.append({**facts, "path": mount.relay.path, "reason": mount.relay.reason, "relay": await mount.relay.status()})
        body = json.dumps({"mounts": rows}).encode()
        return b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


async def read_head(sock: socket.socket) -> Request | None:
    """The head, and not a byte more: what follows is the stream, and another's to read. None: the other side closed."""
    while True:
        await _readable(sock)
        try:
            seen = bytearray(sock.recv(MAX_HEAD + 1, socket.MSG_PEEK))
        except BlockingIOError:
            continue
        if not seen:
            return None
        head = _as_http(seen)
        length = find_head(head)
        if length:
            sock.recv(length - (len(head) - len(seen)))
            return parse_head(bytes(head[:length]))
        await asyncio.sleep(0.02)  # readable all the time, for what was peeked at is still there


def _as_http(seen: bytearray) -> bytearray:
    """Encoders of old say "SOURCE /mount ICE/1.0"; that is HTTP/1.0."""
    return seen.replace(*_ICE, 1) if seen.startswith(b"SOURCE ") else seen


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(sock)


async def _say(sock: socket.socket, words: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, words)


async def _refuse(sock: socket.socket, error: HttpError) -> None:
    words = f"{error}\n".encode()
    more = b'WWW-Authenticate: Basic realm="encoders"\r\n' if error.status == 401 else b""
    status = f"{error.status} {_WORDS.get(error.status, 'Error')}".encode()
    head = b"HTTP/1.0 %s\r\n%sContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % (status, more, len(words))
    await _say(sock, head + words)
    sock.shutdown(socket.SHUT_WR)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(_drain(sock), 1.0)  # else what the encoder has sent already resets the answer away


async def _drain(sock: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(sock, 65536):
        pass


def _stream_head(mount: Mount) -> bytes:
    name = f"icy-name: {mount.name}\r\n" if mount.name else ""
    head = f"HTTP/1.0 200 OK\r\nContent-Type: {mount.content_type}\r\n{name}Cache-Control: no-cache\r\nConnection: close\r\n\r\n"
    return head.encode("latin-1", "replace")


def _path(request: Request) -> str:
    return "/" + request.path.decode("utf-8", "replace")


def _allowed(request: Request, password: str) -> bool:
    kind, _, words = request.headers.get("authorization", "").partition(" ")
    try:
        given = base64.b64decode(words, validate=True) if kind.lower() == "basic" else b""
    except ValueError:
        return False
    return hmac.compare_digest(given, b"source:" + password.encode())


async def run(listener: socket.socket, server: Server, stop: asyncio.Event) -> None:
    """Accept until `stop`; then everybody is let go."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)

    def accept() -> None:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            sock.setblocking(False)
            task = loop.create_task(server.serve(sock))
            server.tasks.add(task)
            task.add_done_callback(server.tasks.discard)

    loop.add_reader(listener, accept)
    try:
        await stop.wait()
    finally:
        loop.remove_reader(listener)
        listener.close()
        for mount in list(server.mounts.values()):
            await mount.relay.close()
        for task in list(server.tasks):
            task.cancel()
        await asyncio.gather(*server.tasks, return_exceptions=True)


def _arguments(argv: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="live_server", description="A live server for encoders and listeners.")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one, printed")
    parser.add_argument("--host", default="", help="address to listen on (default: all, IPv6 and IPv4)")
    parser.add_argument("--password", required=True, help="of the user 'source'")
    parser.add_argument("--budget-ms", type=int, default=50, help="how long a piece may wait for others, 0 to 1000")
    parser.add_argument("--ring-entries", type=int, default=1024, help="pieces that a listener may fall behind")
    parser.add_argument("--folder", help="files NAME.ts that grow here are streams too; best on a share of the host")
    parser.add_argument("--on-lag", choices=("head_drop", "drop_to_sync", "disconnect"), default="drop_to_sync")
    return parser.parse_args(argv)


async def _main(arguments: Any) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    offload.attend()
    listener = listen(arguments.host, arguments.port)
    host, port = listener.getsockname()[:2]
    print(f"live at {f'[{host}]' if ':' in host else host}:{port}", flush=True)
    settings = Settings(arguments.password, arguments.budget_ms, arguments.ring_entries, arguments.on_lag, arguments.folder)
    await run(listener, Server(settings), stop)
    offload.close()


def main(argv: list[str] | None = None) -> int:
    """The command."""
    try:
        asyncio.run(_main(_arguments(argv)))
    except OSError as error:
        print(f"live_server: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
