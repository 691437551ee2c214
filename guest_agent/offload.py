# SPDX-License-Identifier: Apache-2.0
"""What applications call: send a file on a TCP connection, by the host if it can, by ourselves if it cannot.

    from guest_agent import offload
    transfer = offload.sendfile(sock, file)                     # blocking sockets, any thread
    transfer = await offload.sendfile_async(writer, file)       # asyncio: non-blocking socket, transport, StreamWriter
    relay = await offload.publish(source)                       # one source, many clients: offload_relay.py
    ring = offload.Ring(path, size=16 << 20)                    # a source in the share that is written over: ring.py

Afterwards the same socket works on. While a call is under way nobody else may read, write or configure that socket: it
may be at the host. Never worse than without us: whatever stands in the way (no agent, a small file, a file elsewhere...)
means that the bytes are sent from here, and `Transfer.reason` says why. A client that goes away raises what the kernel
would have raised.

The way of a request: decide without a system call to anybody where possible -> one message with two descriptors to the
agent -> one reply. If the agent goes away meanwhile, its next life gets the socket again ("reclaim")."""

from __future__ import annotations

import asyncio
import errno as errnos
import os
import socket
import stat
import threading
from collections import Counter
from dataclasses import dataclass
from typing import IO, Any

from guest_agent import local, offload_asyncio
from guest_agent.offload_blocking import BlockingAgent
from guest_agent.offload_relay import publish
from guest_agent.offload_wire import Reply, agent_path, here, unsuitable
from guest_agent.ring import Ring

__all__ = ["PRIORITIES", "Ring", "Transfer", "close", "publish", "sendfile", "sendfile_async", "status"]

PRIORITIES = ("low", "normal", "high")

Target = socket.socket | asyncio.WriteTransport | asyncio.StreamWriter


@dataclass(frozen=True)
class Transfer:
    """What became of a call: bytes sent (fewer than asked only if the file ended), by whom, and why not by the host."""

    sent: int
    path: str
    reason: str | None
    message: str


def sendfile(
    sock: socket.socket, file: IO[bytes], offset: int = 0, count: int | None = None, *, priority: str = "normal"
) -> Transfer:
    """Send `count` bytes (None: all) of `file` from `offset` on a blocking socket; thread-safe.

    The socket's timeout bounds each wait of a local transfer; the host's transfers end when TCP says so. The file's
    position is not used. Raises OSError as sendfile(2) would, ConnectionResetError if the connection was lost with its
    owner, ValueError for a non-blocking socket or a bad argument."""
    if sock.gettimeout() == 0:
        raise ValueError("the socket is non-blocking: use sendfile_async, or give it a timeout")
    count = _bytes_to_send(file, offset, count, priority)
    reason = _unsuitable(sock, count) or _blocking.refusal(file.fileno(), count)
    reply = here(reason) if reason else _blocking.request(sock, file.fileno(), offset, count, priority)
    if reply.outcome != "local":
        return _conclude(reply)
    sent = local.send(sock, file, offset + reply.sent, count - reply.sent) if count > reply.sent else 0
    return _sent_here(reply, sent)


async def sendfile_async(
    target: Target, file: IO[bytes], offset: int = 0, count: int | None = None, *, priority: str = "normal"
) -> Transfer:
    """The same for asyncio. A transport or StreamWriter first sends what was written to it; its reading is paused
    during the transfer. If the call is cancelled the host may send on: close the connection, as after any cancelled
    send. Its reading resumes when the socket is back."""
    if isinstance(target, socket.socket):
        if target.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")
        return await _send_on_socket(target, file, offset, _bytes_to_send(file, offset, count, priority), priority)
    transport = target.transport if isinstance(target, asyncio.StreamWriter) else target
    if transport.is_closing():
        raise ConnectionResetError(errnos.ECONNRESET, "the transport is closing")
    return await _send_on_transport(transport, file, offset, _bytes_to_send(file, offset, count, priority), priority)


async def _send_on_socket(sock: socket.socket, file: IO[bytes], offset: int, count: int, priority: str) -> Transfer:
    link = offload_asyncio.link()
    reason = _unsuitable(sock, count) or await link.refusal(file.fileno(), count)
    reply = here(reason) if reason else await link.request(sock, file.fileno(), offset, count, priority)
    if reply.outcome != "local":
        return _conclude(reply)
    left = count - reply.sent
    return _sent_here(reply, await local.send_on_socket(sock, file, offset + reply.sent, left) if left > 0 else 0)


async def _send_on_transport(
    transport: asyncio.WriteTransport, file: IO[bytes], offset: int, count: int, priority: str
) -> Transfer:
    link, sock = offload_asyncio.link(), transport.get_extra_info("socket")
    reason = _unsuitable_transport(transport, sock, count) or await link.refusal(file.fileno(), count)
    if reason:
        reply = here(reason)
    else:
        await local.drain(transport)
        resume = local.pause_reading(transport)
        reply = await link.request(sock, file.fileno(), offset, count, priority, when_over=resume)
    if reply.outcome != "local":
        return _conclude(reply)
    left = count - reply.sent
    return _sent_here(
        reply, await local.send_on_transport(transport, file, offset + reply.sent, left) if left > 0 else 0
    )


def status() -> dict[str, Any]:
    """This process's counters, and the agent's own status (None: it does not answer)."""
    with _counting:
        counted = {
            "offloaded": _counters["offloaded"],
            "failed": _counters["failed"],
            "bytes_offloaded": _counters["bytes_offloaded"],
            "bytes_local": _counters["bytes_local"],
            "local": dict(_local_reasons),
        }
    return {"agent_socket": agent_path(), "agent": _blocking.status(), **counted}


def close() -> None:
    """Close idle connections to the agent. Later calls open new ones."""
    _blocking.close()
    offload_asyncio.close_idle()


def _bytes_to_send(file: IO[bytes], offset: int, count: int | None, priority: str) -> int:
    if priority not in PRIORITIES:
        raise ValueError(f"priority {priority!r} is none of {', '.join(PRIORITIES)}")
    if offset < 0 or (count is not None and count < 0):
        raise ValueError("offset and count must not be negative")
    facts = os.fstat(file.fileno())
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("only regular files can be sent")
    available = max(facts.st_size - offset, 0)
    return available if count is None else min(count, available)


def _unsuitable(sock: Any, count: int) -> str | None:
    return unsuitable(sock) if count else "too_small"


def _unsuitable_transport(transport: asyncio.WriteTransport, sock: Any, count: int) -> str | None:
    if transport.get_extra_info("sslcontext") is not None:
        return "upper_layer_protocol"
    return _unsuitable(sock, count)


_counting = threading.Lock()
_counters: Counter[str] = Counter()
_local_reasons: Counter[str] = Counter()


def _sent_here(reply: Reply, sent: int) -> Transfer:
    with _counting:
        _local_reasons[reply.reason or "unknown"] += 1
        _counters["bytes_local"] += sent
        _counters["bytes_offloaded"] += reply.sent
    return Transfer(reply.sent + sent, "local", reply.reason, reply.message)


def _conclude(reply: Reply) -> Transfer:
    """The host did it, or the connection is over."""
    with _counting:
        _counters[reply.outcome] += 1
        _counters["bytes_offloaded"] += reply.sent
    if reply.outcome == "offloaded":
        return Transfer(reply.sent, "offloaded", reply.reason, reply.message)
    number = reply.errno or errnos.EIO
    why = reply.message or reply.reason or "no reason given"
    raise OSError(number, f"{os.strerror(number)} after {reply.sent} bytes: {why}. The connection must be closed")


_blocking = BlockingAgent()


def _after_fork() -> None:
    """A child shares none of its parent's connections: two readers of one connection would steal each other's replies."""
    global _blocking, _counting
    _counting = threading.Lock()
    _blocking.close()
    _blocking = BlockingAgent()
    offload_asyncio.abandon_all()


os.register_at_fork(after_in_child=_after_fork)
