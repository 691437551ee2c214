# SPDX-License-Identifier: Apache-2.0
"""The words between an application and the agent: SOCK_SEQPACKET, one JSON object a message, descriptors beside it.

    agent -> application  {"v":1,"hello":{"threshold":65536,"shares":["/srv/share"],...}} or {"v":1,"error":"..."}
    application -> agent  {"v":1,"op":"sendfile","id":7,"token":"<32 hex>","offset":0,"count":N,"priority":"normal"}
                          with [socket, file]; {"v":1,"op":"reclaim","id":8,"token":"..."} with [socket];
                          {"v":1,"op":"status","id":9}; after a sendfile with "anticipates":true, always
                          {"v":1,"op":"anticipate","id":8,"token":"...","first":0,"more":true,"anticipated":[...]}, and more
                          of them (`handoff/anticipated.py`)
    agent -> application  {"v":1,"id":7,"outcome":"offloaded"|"local"|"failed","sent":N,"reason":...,"message":"...",
                          "errno":...,"cursor":...,"answered":[...],"away":...} or {"v":1,"id":9,"status":{...}}

Of the VM that leaves its host and comes back: {"v":1,"op":"attend","id":8}; the rest is in `offload_move.py`, and of files
that are asked for meanwhile in `look.py`.

Of relays (all fields: `guest_agent/relays.py`):

    application -> agent  {"v":1,"op":"publish","id":10,"token":"...","source":"connection","source_token":"...",...} with
                          [socket]; "source":"file" or "ring","offset":0 with [file]; "source":"udp","port":N
                          {"v":1,"op":"add_sink","id":11,"token":"...","relay":"...","priority":...} with [socket];
                          {"v":1,"op":"add_udp",...} with [connected UDP socket]
                          {"v":1,"op":"remove_sink","id":12,"token":"...","relay":"..."}, "close_relay", "relay_status"
    agent -> application  {"v":1,"id":11,"taken":true} when the host has it, and the usual reply when it is over;
                          {"v":1,"id":13,"relay_status":{...}}

`guest_agent/applications.py` is the other end."""

from __future__ import annotations

import errno as errnos
import json
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count as counting
from typing import Any, TypeVar

from guest_agent.handoff.anticipated import Anticipated, write_anticipated

AGENT = "/run/streamlift/agent.sock"
MAX_MESSAGE = 1 << 16
RETRY_INTERVAL = 1.0
"""Seconds for which an absent agent is not looked for again."""
REFRESH_INTERVAL = 5.0
"""Seconds after which a refusal is asked for again: a share may have been mounted meanwhile, or a host have come."""
HELLO_LIMIT = 1.0
RECLAIM_LIMIT = 5.0
RECLAIM_PAUSE = 0.05
CROWDED = (errnos.ETOOMANYREFS, errnos.ENOBUFS, errnos.ENOMEM)
"""What the kernel says when too many descriptors or messages are in flight."""

IPPROTO_MPTCP = 262
_PROTOCOLS: dict[int, str | None] = {0: None, socket.IPPROTO_TCP: None, IPPROTO_MPTCP: "mptcp"}

Message = dict[str, Any]
T = TypeVar("T")
next_number: Callable[[], int] = counting(1).__next__

EXPLANATIONS = {
    "no_agent": "no agent answers at its socket",
    "not_allowed": "the agent does not serve this user",
    "too_small": "sending it from here is quicker than a handoff",
    "not_on_share": "the file is not on a share of the host",
    "not_tcp": "only TCP connections can be handed to the host",
    "mptcp": "a Multipath TCP connection cannot be moved",
    "upper_layer_protocol": "TLS is spoken in this process",
    "agent_busy": "too many requests are on their way to the agent",
}


class Refused(Exception):
    """The agent does not serve this process."""


@dataclass(frozen=True)
class Reply:
    """How a request ended; `sent` bytes were delivered by the host. `cursor`: of a relay's sink, the position where it would have
    gone on, of its source where that stands; `rest`: what has come of the next entry, in hexadecimal digits; `away`: the VM is
    leaving its host; `answered`: numbers of the anticipated requests that the host answered: `sent` is of the last of them."""

    outcome: str
    sent: int
    reason: str | None
    message: str
    errno: int | None = None
    cursor: int | None = None
    away: bool = False
    rest: str = ""
    answered: tuple[int, ...] = ()


def here(reason: str) -> Reply:
    """The reply that we give ourselves: send it from here, because."""
    return Reply("local", 0, reason, EXPLANATIONS.get(reason, reason))


@dataclass(frozen=True)
class Hello:
    """What the agent takes: at least `threshold` bytes, of files whose path begins with one of `prefixes`; `anticipates`: the
    host answers what clients ask next, too."""

    threshold: int
    prefixes: tuple[str, ...]
    at: float
    anticipates: bool = False

    def refusal(self, file_fd: int, count: int) -> str | None:
        """Why this file is ours to send; one readlink at most."""
        if count < self.threshold:
            return "too_small"
        path = os.readlink(f"/proc/self/fd/{file_fd}")
        return None if path.startswith(self.prefixes) else "not_on_share"

    def stale(self) -> bool:
        """Whether shares may have come since."""
        return time.monotonic() - self.at > REFRESH_INTERVAL


def unsuitable(sock: Any) -> str | None:
    """Why this socket cannot be offloaded, as far as Python knows; the agent looks closer."""
    if isinstance(sock, ssl.SSLSocket):
        return "upper_layer_protocol"
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return "not_tcp"
    return _PROTOCOLS.get(sock.proto, "not_tcp")


# Requests.


def encode_sendfile(
    number: int, token: str, offset: int, count: int, priority: str, *, on_move: str = "local", anticipates: bool = False
) -> bytes:
    """Formatted by hand: a fifth of what json.dumps takes, and nothing here needs escaping."""
    more = ',"anticipates":true' if anticipates else ""
    return (
        f'{{"v":1,"op":"sendfile","id":{number},"token":"{token}",'
        f'"offset":{offset},"count":{count},"priority":"{priority}","on_move":"{on_move}"{more}}}'
    ).encode()


def encode_anticipate(token: str, first: int, anticipated: Sequence[Anticipated], *, more: bool = False) -> bytes:
    """What the client of that transfer may ask next, beginning with number `first`; goes alone."""
    told = {"token": token, "first": first, "more": more, "anticipated": write_anticipated(anticipated)}
    return json.dumps({"v": 1, "op": "anticipate", "id": next_number(), **told}).encode()


def encode_reclaim(number: int, token: str, begun: float, *, sent: int = 0) -> bytes:
    """Goes with the socket of the transfer `token`, which was asked for at `begun` (time.monotonic()): a host's service that
    is younger cannot know what became of it. `sent`: bytes that are delivered beside what such a service sent."""
    age = time.monotonic() - begun
    return f'{{"v":1,"op":"reclaim","id":{number},"token":"{token}","age":{age:.6f},"sent":{sent}}}'.encode()


def encode_status(number: int) -> bytes:
    """Goes alone."""
    return f'{{"v":1,"op":"status","id":{number}}}'.encode()


def encode_attend(number: int) -> bytes:
    """Wants to hear of the VM's leaving and coming back; goes alone."""
    return f'{{"v":1,"op":"attend","id":{number}}}'.encode()


def encode_let_go_of(number: int) -> bytes:
    """Everything that was open on the share is let go of; goes alone."""
    return f'{{"v":1,"op":"let_go_of","id":{number}}}'.encode()


def encode_look(number: int, path: str) -> bytes:
    """What does the host know of the file at that path? Goes alone."""
    return json.dumps({"v": 1, "op": "look", "id": number, "path": path}).encode()


def encode_relay(operation: str, number: int, **fields: object) -> bytes:
    """Any of the requests that concern relays."""
    return json.dumps({"v": 1, "op": operation, "id": number, **fields}).encode()


def new_token() -> str:
    """A transfer's identity, in this and every later life of the agent."""
    return os.urandom(16).hex()


def send_message(connection: socket.socket, message: bytes, *fds: int) -> None:
    """One message with its descriptors; OSError as sendmsg(2), never SIGPIPE."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    connection.sendmsg([message], rights, socket.MSG_NOSIGNAL)


# Answers. Whatever makes no sense counts as the agent's loss: ConnectionError.


def decode(data: bytes, read: Callable[[Message], T]) -> T:
    """`read` one message. Raises ConnectionError for the end of the connection and for nonsense."""
    if not data:
        raise ConnectionResetError(errnos.ECONNRESET, "the agent closed the connection")
    try:
        return read(json.loads(data))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConnectionResetError(errnos.ECONNRESET, f"the agent's message makes no sense: {error!r}") from None


def read_greeting(message: Message) -> Hello:
    """The first message on a connection. Raises Refused."""
    if "error" in message:
        raise Refused(str(message["error"]))
    return read_hello(message["hello"])


def read_hello(told: Message) -> Hello:
    """From a hello or from a status, which says the same things."""
    prefixes = tuple(share.rstrip("/") + "/" for share in told["shares"])
    return Hello(int(told["threshold"]), prefixes, time.monotonic(), told.get("anticipates") is True)


def read_reply(message: Message) -> Reply:
    """Raises ValueError, KeyError, TypeError for what is none."""
    outcome, sent = message["outcome"], message["sent"]
    if outcome not in ("offloaded", "local", "failed") or type(sent) is not int or sent < 0:
        raise ValueError(f"outcome {outcome!r}, sent {sent!r}")
    reason, words = message.get("reason"), message.get("message") or ""
    more = {name: message[name] for name in ("errno", "cursor", "away", "rest") if name in message}
    return Reply(outcome, sent, reason, words, answered=tuple(message.get("answered") or ()), **more)


# The connection.


def agent_path() -> str:
    """Where the agent listens: the environment's STREAMLIFT_AGENT, else the usual place."""
    return os.environ.get("STREAMLIFT_AGENT", AGENT)


def connect() -> socket.socket:
    """A non-blocking connection; the hello is still to be read. Raises OSError at once if nobody listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.setblocking(False)
        connection.connect(agent_path())
    except BaseException:
        connection.close()
        raise
    return connection


def lost(error: object) -> ConnectionResetError:
    """The end of a transfer whose agent did not come back."""
    return ConnectionResetError(
        errnos.ECONNRESET,
        f"the agent went away while it had the connection, and did not come back within {RECLAIM_LIMIT:g} s ({error}). "
        "The connection must be closed; see `systemctl status streamlift-agent`",
    )
