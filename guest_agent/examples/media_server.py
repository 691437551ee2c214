# SPDX-License-Identifier: Apache-2.0
"""A media server for DASH and HLS over HTTP/1.1 that uses the offload API as any application would.

    python3 -m guest_agent.examples.media_server --root /srv/share --port 8080

The way of a request: bytes arrive in Connection.data_received -> `serve` parses a head -> Answer (`media_answer.py`) decides
status, headers and ranges -> the head is written, and the body goes out by `offload.sendfile_async`. Nothing here knows how. What a
client that goes through its segments asks next is anticipated (`next_segments.py`), and need not come here at all.
`GET /.streamlift` tells what became of the bodies. `--no-offload` is the same server with the event loop's own sendfile."""

from __future__ import annotations

import argparse
import asyncio
import errno
import hashlib
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import IO

from guest_agent import offload
from guest_agent.examples.http_request import HttpError, Request, find_head, parse_chunk_size, parse_head
from guest_agent.examples.media_answer import Answer, answer_file, json_answer, refusal
from guest_agent.examples.media_files import MediaFile, Root
from guest_agent.examples.next_segments import NextSegments

HIGH_WATER = 1 << 18
"""Bytes received but not yet consumed, above which the client has to wait."""
MAX_LINE = 1024
MAX_UPLOAD = 1 << 32
IDLE_LIMIT = 75.0
SHUTDOWN_LIMIT = 30.0
BACKLOG = 1024

Anticipate = Callable[[], Iterable[offload.Anticipated]]
Send = Callable[[asyncio.WriteTransport, IO[bytes], int, int, Anticipate | None], Awaitable[offload.Transfer]]


async def send_offloaded(
    transport: asyncio.WriteTransport, file: IO[bytes], offset: int, count: int, anticipate: Anticipate | None
) -> offload.Transfer:
    """With us."""
    return await offload.sendfile_async(transport, file, offset, count, anticipate=anticipate)


async def send_plain(
    transport: asyncio.WriteTransport, file: IO[bytes], offset: int, count: int, anticipate: Anticipate | None
) -> offload.Transfer:
    """Without us: the baseline of the benchmarks."""
    sent = 0
    with offload.hold(file.fileno()) as held:
        while sent < count:
            if held.away:
                await offload.present()
            held.check()
            absences = held.absences
            sent += await asyncio.get_running_loop().sendfile(transport, file, offset + sent, count - sent)
            if held.absences == absences:
                break
    return offload.Transfer(sent, "local", "disabled", "")


@dataclass
class Counts:
    """What `/.streamlift` tells. Requests count when they are answered, bytes are those of files."""

    requests: int = 0
    offloaded: int = 0
    failed: int = 0
    bytes: int = 0
    uploads: int = 0
    connections: int = 0
    local: Counter[str] = field(default_factory=Counter)

    def add(self, transfer: offload.Transfer) -> None:
        """One body was sent, and what the host answered after it."""
        self.requests += len(transfer.answered)
        self.bytes += transfer.sent + sum(one.count for one in transfer.answered)
        if transfer.path == "offloaded":
            self.offloaded += 1 + len(transfer.answered)
        else:
            self.local[transfer.reason or "unknown"] += 1


@dataclass
class Service:
    """What all connections share."""

    root: Root
    send: Send
    log: bool = False
    idle_limit: float = IDLE_LIMIT
    counts: Counts = field(default_factory=Counts)
    connections: set[Connection] = field(default_factory=set)
    stopping: bool = False


class Connection(asyncio.Protocol):
    """One client: collects what it sends, and answers its requests one after the other."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._received = bytearray()
        self._next = NextSegments(service.root)
        self._eof = False
        self._waiting: asyncio.Future[None] | None = None
        self._crowded: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport
        self.task: asyncio.Task[None]
        self.idle = True

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._socket: socket.socket = transport.get_extra_info("socket")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._service.connections.add(self)
        self._service.counts.connections += 1
        self.task = self._loop.create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) > HIGH_WATER:
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self._eof = True
        self._wake()
        return True  # the answer may still go out

    def connection_lost(self, exc: Exception | None) -> None:
        self._service.connections.discard(self)
        self._eof = True
        self._wake()
        self.resume_writing()

    def pause_writing(self) -> None:
        self._crowded = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._crowded is not None and not self._crowded.done():
            self._crowded.set_result(None)
        self._crowded = None

    async def _room(self) -> None:
        """Wait for a client that asks but does not read."""
        if self._crowded is not None:
            await self._crowded

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    # What requests read.

    async def _more(self) -> bool:
        """Wait for more data; False at the end. Raises TimeoutError for a client that is silent for too long."""
        if self._eof:
            return False
        if not self.transport.is_reading():
            self.transport.resume_reading()
        self._waiting = self._loop.create_future()
        timer = self._loop.call_later(self._service.idle_limit, self._time_out, self._waiting)
        try:
            await self._waiting
        finally:
            timer.cancel()
            self._waiting = None
        return not self._eof or bool(self._received)

    @staticmethod
    def _time_out(waiting: asyncio.Future[None]) -> None:
        if not waiting.done():
            waiting.set_exception(TimeoutError("the client is silent"))

    async def _read_head(self) -> Request | None:
        """The next request; None when there will be none."""
        while not (size := find_head(self._received)):
            self.idle = not self._received
            if self._service.stopping or not await self._more():
                return None
        self.idle = False
        head = bytes(self._received[:size])
        del self._received[:size]
        while head.startswith(b"\r\n") and len(head) > 4:  # RFC 9112, 2.2: tolerate empty lines before
            head = head[2:]
        request = parse_head(head)
        self._next.heard(head, request)
        return request

    async def _read(self, count: int) -> AsyncIterator[bytes]:
        """`count` bytes of body, in pieces."""
        while count:
            if not self._received and not await self._more():
                raise ConnectionResetError("the body ended early")
            piece = bytes(self._received[:count])
            del self._received[: len(piece)]
            count -= len(piece)
            yield piece

    async def _read_line(self) -> bytes:
        while (end := self._received.find(b"\r\n", 0, MAX_LINE)) < 0:
            if len(self._received) >= MAX_LINE:
                raise HttpError(400, "a line in a chunked body is too long")
            if not await self._more():
                raise ConnectionResetError("the body ended early")
        line = bytes(self._received[:end])
        del self._received[: end + 2]
        return line

    async def read_body(self, request: Request) -> tuple[int, str]:
        """Consume the body; its length and SHA-256. Raises HttpError."""
        if request.length is not None and request.length > MAX_UPLOAD:
            raise HttpError(413, f"uploads have at most {MAX_UPLOAD} bytes")
        if request.expects_continue and not self._received:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        digest, total = hashlib.sha256(), 0
        async for piece in self._read(request.length) if request.length is not None else self._read_chunks():
            digest.update(piece)
            total += len(piece)
        return total, digest.hexdigest()

    async def _read_chunks(self) -> AsyncIterator[bytes]:
        total = 0
        while size := parse_chunk_size(await self._read_line()):
            total += size
            if total > MAX_UPLOAD:
                raise HttpError(413, f"uploads have at most {MAX_UPLOAD} bytes")
            async for piece in self._read(size):
                yield piece
            if await self._read_line():
                raise HttpError(400, "a chunk is longer than it says")
        trailers = 0
        while await self._read_line():
            trailers += 1
            if trailers > MAX_LINE:
                raise HttpError(431, "too many trailers")

    # What requests write.

    async def _serve(self) -> None:
        try:
            while await self._serve_one():
                pass
        except (OSError, TimeoutError, RuntimeError) as error:
            if self._service.log and not self.idle:
                print(f"{self._peer()} ended: {error}", file=sys.stderr)
        finally:
            self.transport.close()

    async def _serve_one(self) -> bool:
        """Answer one request; whether another may follow."""
        try:
            request = await self._read_head()
            if request is None:
                return False
            answer = await _answer(self, self._service, request)
        except HttpError as error:
            answer, request = refusal(error), None
        keep_alive = answer.keep_alive and not self._service.stopping
        self._service.counts.requests += 1
        try:
            await self._send(answer, keep_alive, with_body=request is None or request.method != "HEAD")
        finally:
            answer.close()
            if self._service.log:
                line = f"{request.method} {request.target}" if request else "-"
                print(f'{self._peer()} "{line}" {answer.status} {answer.length}', file=sys.stderr)
        return keep_alive

    async def _send(self, answer: Answer, keep_alive: bool, *, with_body: bool) -> None:
        head = answer.head(keep_alive=keep_alive)
        if answer.media is None or not answer.parts or not with_body:
            self.transport.write(head + answer.body if with_body else head)
            await self._room()
            return
        # Head and body share packets: the head waits for the body, and goes with it to the host.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        self.transport.write(head)
        for prefix, offset, count in answer.parts:
            if prefix:
                self.transport.write(prefix)
            await self._send_file(answer.media, offset, count, self._ahead if keep_alive and self._next.is_likely else None)
        if answer.epilogue:
            self.transport.write(answer.epilogue)
        if not self.transport.is_closing():
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)

    def _ahead(self) -> Iterable[offload.Anticipated]:
        """What has come here already is answered here, and before anything else."""
        return () if self._received else self._next.anticipate()

    async def _send_file(self, media: MediaFile, offset: int, count: int, anticipate: Anticipate | None) -> None:
        try:
            transfer = await self._service.send(self.transport, media.file, offset, count, anticipate)
        except OSError:
            self._service.counts.failed += 1
            raise
        self._service.counts.add(transfer)
        if transfer.answered:
            self._next.answered(transfer.answered[-1])
            if self._service.log:
                print(f"{self._peer()} {len(transfer.answered)} more requests were answered by the host", file=sys.stderr)
        if transfer.sent != count:
            raise ConnectionAbortedError("the file became shorter than the Content-Length that was promised")

    def _peer(self) -> str:
        peer = self.transport.get_extra_info("peername")
        return f"{peer[0]}:{peer[1]}" if peer else "?"


async def _answer(connection: Connection, service: Service, request: Request) -> Answer:
    """What to say to one request. Raises HttpError."""
    if request.method in ("POST", "PUT"):
        size, digest = await connection.read_body(request)
        service.counts.uploads += 1
        answer = json_answer({"bytes": size, "sha256": digest})
    elif request.method in ("GET", "HEAD"):
        if request.length != 0:
            await connection.read_body(request)
        answer = await _get(service, request)
    else:
        raise HttpError(405, f"{request.method} is not possible here")
    answer.keep_alive = answer.keep_alive and request.keep_alive
    return answer


async def _get(service: Service, request: Request) -> Answer:
    path = request.path
    if path == b".streamlift":
        return json_answer(_report(service))
    try:
        media = await service.root.open(path)
    except PermissionError:
        return refusal(HttpError(403, "no permission", keep_alive=True))
    except OSError:
        return refusal(HttpError(404, "no such file", keep_alive=True))
    try:
        answer = answer_file(request, media.facts)
    except BaseException:
        media.close()
        raise
    answer.media = media
    return answer


def _report(service: Service) -> dict[str, object]:
    counts = service.counts
    return {
        "requests": counts.requests,
        "offloaded": counts.offloaded,
        "local": dict(counts.local),
        "failed": counts.failed,
        "bytes": counts.bytes,
        "uploads": counts.uploads,
        "connections": counts.connections,
        "open_connections": len(service.connections),
    }


# Starting and stopping.


def listen(host: str, port: int) -> socket.socket:
    """`host` empty: IPv6 and IPv4 on one dual-stack socket, IPv4 alone where there is no IPv6."""
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def _explain(error: OSError, arguments: argparse.Namespace) -> str:
    """The cause, and the next command."""
    if error.errno == errno.EADDRINUSE:
        return f"port {arguments.port} is taken\n  see by whom: ss -ltnp 'sport = :{arguments.port}'; or choose another: --port"
    if error.errno == errno.EACCES and 0 < arguments.port < 1024:
        return f"port {arguments.port} is for root\n  choose one above 1023: --port 8080"
    return str(error)


async def run(listener: socket.socket, service: Service, stop: asyncio.Event) -> None:
    """Serve until `stop`; then idle connections close at once, and answers under way are finished."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(service), sock=listener, backlog=BACKLOG)
    try:
        await stop.wait()
    finally:
        service.stopping = True
        server.close()
        await _finish(service)


async def _finish(service: Service) -> None:
    offload.anticipate_nothing()
    for connection in list(service.connections):
        if connection.idle:
            connection.transport.close()
    tasks = [connection.task for connection in service.connections]
    if tasks:
        await asyncio.wait(tasks, timeout=SHUTDOWN_LIMIT)
    for connection in list(service.connections):
        connection.transport.abort()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="media_server", description="A media server for DASH and HLS.")
    parser.add_argument("--root", required=True, help="the directory that is served; best on a share of the host")
    parser.add_argument("--port", type=int, default=8080, help="0: any free one, printed")
    parser.add_argument("--host", default="", help="address to listen on (default: all, IPv6 and IPv4)")
    parser.add_argument("--no-offload", action="store_true", help="plain sendfile, for comparisons")
    parser.add_argument("--log", action="store_true", help="one line a request on standard error")
    return parser.parse_args(argv)


async def _main(arguments: argparse.Namespace) -> None:
    service = Service(Root(arguments.root), send_plain if arguments.no_offload else send_offloaded, arguments.log)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    offload.attend()
    listener = listen(arguments.host, arguments.port)
    host, port = listener.getsockname()[:2]
    print(f"serving {arguments.root} at {f'[{host}]' if ':' in host else host}:{port}", flush=True)
    await run(listener, service, stop)
    offload.close()


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    try:
        asyncio.run(_main(arguments))
    except OSError as error:
        print(f"media_server: {_explain(error, arguments)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
