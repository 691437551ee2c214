# SPDX-License-Identifier: Apache-2.0
"""The agent's door for applications: a SOCK_SEQPACKET Unix socket. A request is one JSON message with the socket and the
file as descriptors (SCM_RIGHTS); the application itself needs no privilege, but must be one of those that may ask
(SO_PEERCRED against the allowed users and groups). `guest_agent/offload.py` is the other end."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import grp
import json
import logging
import os
import pwd
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from guest_agent.hand_out import Outcome, Transfer
from guest_agent.handoff import kernel
from guest_agent.handoff.anticipated import Anticipated, read_anticipated
from guest_agent.handoff.errors import HandoffError, NotMovable, Reason
from guest_agent.handoff.presence import HANDING_OUT, Presence
from guest_agent.look import Looks
from guest_agent.relays import RING_FIELDS, SINK_FIELDS, Relays, RelayTransfer
from guest_agent.share import NO_FILE, SharedFile, beneath_share, locate
from guest_agent.transfers import Transfers

log = logging.getLogger("streamlift.agent")

MAX_REQUEST = 1 << 16
REQUESTS = 16
"""Of one application, between two looks at everything else."""
REPLY_BUFFER = 16 << 20
"""Bytes of replies that an application may leave unread: tens of thousands."""
_TOKEN = re.compile(r"[0-9a-f]{32}")
_PRIORITIES = ("low", "normal", "high")
_RELAY_OPERATIONS = ("publish", "add_sink", "add_udp", "remove_sink", "relay_status", "close_relay")
_OTHER_OPERATIONS = ("anticipate", "attend", "let_go_of", "look", *_RELAY_OPERATIONS)
_ANCILLARY = socket.CMSG_SPACE(2 * array.array("i").itemsize)


class Applications:
    """Listens at `path`; `hello` gives what a new connection is told, `shares` the mount points now; `is_up`: the host can
    be asked."""

    def __init__(
        self,
        path: str,
        transfers: Transfers,
        relays: Relays,
        looks: Looks,
        *,
        allowed: frozenset[str],
        hello: Callable[[], dict[str, Any]],
        status: Callable[[], dict[str, Any]],
        shares: Callable[[], tuple[str, ...]],
        is_up: Callable[[], bool],
    ) -> None:
        self._path, self._transfers, self._relays, self._allowed = path, transfers, relays, allowed
        self._looks = looks
        self._hello, self._status, self._shares, self._is_up = hello, status, shares, is_up
        self._deaf = False
        self._clients: set[_Client] = set()
        self._presence, self._let_go = Presence.HERE, False
        self._asked: dict[_Client, asyncio.Future[None]] = {}
        self._loop = asyncio.get_running_loop()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def start(self) -> None:
        """Bind and listen. The file is for everybody: who may ask is decided by credentials, with a reason."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        self._listener.bind(self._path)
        os.chmod(self._path, 0o666)
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)

    def stop(self) -> None:
        """Close the door and all connections."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        for client in list(self._clients):
            client.close(forget=True)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, kernel.SO_SNDBUFFORCE, REPLY_BUFFER)
            pid, uid, gid = struct.unpack("=3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if not may_ask(uid, gid, self._allowed):
                log.warning("refused process %d of user %d: not among %s", pid, uid, sorted(self._allowed))
                message = f"user {uid} may not use the agent (allowed: {', '.join(sorted(self._allowed))})"
                connection.send(json.dumps({"v": 1, "error": message}).encode())
                connection.close()
                return
            connection.send(json.dumps({"v": 1, "hello": self._hello()}).encode())
            self._clients.add(_Client(connection, self, pid, root=uid == 0))

    # The guest leaves its host, and comes back. What applications do: `offload_move.py`.

    @property
    def away(self) -> bool:
        """Whether nothing goes out."""
        return self._presence is not Presence.HERE

    def leaving(self, by: Presence, *, let_go: bool) -> None:
        """Tell everybody; with `let_go`, those that attend are asked to let go of their files. Who does not attend cannot be asked:
        the host gives back what he has out."""
        self._presence, self._let_go = by, let_go
        for client in list(self._clients):
            if client.attends:
                self._tell(client)
            else:
                for token in client.transfers:
                    self._transfers.recall(token)

    def returning(self) -> None:
        """There is a host again that has the files, and takes connections."""
        self._presence, self._let_go = Presence.RETURNING, False
        self._asked.clear()
        self._tell_all()

    def here(self) -> None:
        """Everybody may go on."""
        self._presence = Presence.HERE
        self._asked.clear()
        self._looks.clear()
        self._tell_all()

    def host_up(self) -> None:
        """What is told to everybody may be another now: the threshold is the host's."""
        if not self.away:
            self.here()
        elif self._deaf:
            self._tell_all()

    def host_down(self) -> None:
        """Nobody can be asked for files; it may be on the way to another host."""
        if self.away:
            self._tell_all()

    def silent(self) -> list[str]:
        """Who was asked to let go and has not answered, for people."""
        return [f"process {client.pid} does not let go of its files" for client, answer in self._asked.items() if not answer.done()]

    async def all_let_go(self) -> None:
        """Until everybody has answered, those too that came meanwhile."""
        while waiting := [answer for answer in self._asked.values() if not answer.done()]:
            await asyncio.wait(waiting)

    def _tell_all(self) -> None:
        self._deaf = not self._is_up()
        for client in list(self._clients):
            if client.attends:
                self._tell(client)

    def _tell(self, client: _Client) -> None:
        asked = self.away and self._let_go
        if asked:
            asked = not self._asked.setdefault(client, self._loop.create_future()).done()
        word = Presence.LEAVING if self.away else Presence.HERE
        look = self.away and self._presence in HANDING_OUT and self._is_up()
        client.send({"v": 1, "presence": word.value, "let_go": asked, "look": look, "hello": self._hello()})

    def _attend(self, client: _Client, request: dict[str, Any], fds: list[int]) -> None:
        client.attends = True
        self._tell(client)

    def _let_go_of(self, client: _Client, request: dict[str, Any], fds: list[int]) -> None:
        self._answered(client)

    def _answered(self, client: _Client) -> None:
        answer = self._asked.get(client)
        if answer is not None and not answer.done():
            answer.set_result(None)

    def _look(self, client: _Client, request: dict[str, Any], fds: list[int]) -> None:
        """A file of the share by its path, while the share is not mounted; the answer may have a descriptor with it."""
        number = request["id"]

        def answer(error: int, fd: int | None = None) -> None:
            client.send({"v": 1, "id": number, "looked": error}, *(() if fd is None else (fd,)))

        if self.away and self._presence in HANDING_OUT:
            self._looks.ask(request["path"], self._shares(), everything=client.root, answer=answer)
        else:
            answer(errno.EAGAIN)

    def _anticipate(self, client: _Client, request: dict[str, Any], fds: list[int]) -> None:
        """What the client of a transfer may ask next, and how it is to be answered; paths as this guest sees them."""
        token = _token(request["token"])
        if token not in client.transfers:
            return
        first, more = _number(request["first"], 0), request["more"] is True
        told: tuple[Anticipated, ...] = ()
        try:
            told = tuple(self._on_share(one) for one in read_anticipated(request["anticipated"]))
        except HandoffError as error:
            log.warning("process %d anticipates nothing that can be used: %s", client.pid, error)
            more = False
        self._transfers.anticipate(token, told, first=first, more=more, everything=client.root)

    def _on_share(self, told: Anticipated) -> Anticipated:
        """The same, with the path as the host knows it. Raises NotMovable."""
        return replace(told, path=beneath_share(told.path, self._shares()))

    # Called by _Client.

    def request(self, client: _Client, data: bytes, fds: list[int]) -> None:
        """Serve one request; descriptors that nobody took are closed."""
        number: object = None
        try:
            request = json.loads(data)
            number = request["id"]
            self._dispatch(client, request, fds)
        except HandoffError as error:
            client.answer(number, Outcome("local", 0, error.reason, str(error)))
        except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            client.answer(number, Outcome("local", 0, Reason.BAD_REQUEST, f"request: {error!r}"))
        finally:
            for fd in fds:
                os.close(fd)

    def _dispatch(self, client: _Client, request: dict[str, Any], fds: list[int]) -> None:
        operation = request["op"]
        if operation == "status":
            client.send({"v": 1, "id": request["id"], "status": self._status()})
        elif operation == "sendfile":
            self._transfers.begin(client.adopt(self._transfer(client, request, fds)))
        elif operation == "reclaim":
            self._transfers.reclaim(client.adopt(self._reclaimed(client, request, fds)), age=_seconds(request["age"]))
        elif operation in _OTHER_OPERATIONS:
            getattr(self, f"_{operation}")(client, request, fds)
        else:
            known = ("sendfile", "reclaim", "status", *_OTHER_OPERATIONS)
            raise ValueError(f"op {operation!r} is none of {', '.join(known)}")

    # Relays. `offload_wire.py` has the words.

    def _publish(self, client: _Client, request: dict[str, Any], fds: list[int]) -> None:
        token, number, source = _token(request["token"]), request["id"], request["source"]
        options = {name: request[name] for name in RING_FIELDS}
        transfer = None
        if source in ("file", "ring"):
            file = locate(fds[0], self._shares())
            plan = {"source": source, "path": file.path, "inode": file.inode, "offset": _number(request["offset"], 0)}
        elif source == "udp":
            plan = {"source": source, "port": _number(request["port"], 1)}
        elif source == "connection":
            plan = {"source": source}
            sink = {"join": "latest", "on_lag": "head_drop", "lag_soft": 0, "lag_hard_ms": 0, "begin": None}
            transfer = self._joining(client, request, fds, token, "source", {"priority": request["priority"], **sink})
        else:
            raise ValueError(f"source {source!r} is none of file, ring, udp, connection")
        answer, finish = client.answers(number)
        try:
            self._relays.publish(token, plan, options, owner=client, answer=answer, finish=finish)
        except BaseException:
            if transfer is not None:
                transfer.sock.close()
            raise
        if transfer is not None:
            self._transfers.begin(client.adopt(transfer))

    def _add_sink(self, client: _Client, request: dict[str, Any], fds: list[int]) -> None:
        options = {name: request[name] for name in SINK_FIELDS}
        self._transfers.begin(client.adopt(self._joining(client, request, fds, _token(request["relay"]), "sink", options)))

    def _add_udp(self, client: _Client, request: dict[str, Any], fds: list[int]) -> None:
        answer, finish = client.answers(request["id"])
        options = {name: request[name] for name in SINK_FIELDS}
        with _socket_of(fds) as sock:
            token, relay = _token(request["token"]), _token(request["relay"])
            self._relays.add_udp(token, relay, sock, options, owner=client, answer=answer, finish=finish)

    def _joining(
        self, client: _Client, request: dict[str, Any], fds: list[int], relay: str, role: str, options: dict[str, Any]
    ) -> RelayTransfer:
        number, token = request["id"], _token(request["source_token" if role == "source" else "token"])
        answer, _ = client.answers(number)

        def reply(outcome: Outcome) -> None:
            client.answer(number, self._relays.source_over(relay, outcome) if role == "source" else outcome, token)

        return RelayTransfer(
            token=token,
            sock=_socket_of(fds),
            file=NO_FILE,
            offset=0,
            count=0,
            priority=request["priority"],
            reply=reply,
            relay=relay,
            role=role,
            options=options,
            told=lambda: answer({"taken": True}),
        )

    def _remove_sink(self, client: _Client, request: dict[str, Any], fds: list[int]) -> None:
        token = _token(request["token"])
        if not self._relays.remove_udp(_token(request["relay"]), token):
            self._transfers.call_home(token)

    def _relay_status(self, client: _Client, request: dict[str, Any], fds: list[int]) -> None:
        self._relays.status(_token(request["relay"]), client.answers(request["id"])[0])

    def _close_relay(self, client: _Client, request: dict[str, Any], fds: list[int]) -> None:
        self._relays.close(_token(request["relay"]))

    def _transfer(self, client: _Client, request: dict[str, Any], fds: list[int]) -> Transfer:
        if len(fds) != 2:
            raise ValueError(f"sendfile needs a socket and a file, {len(fds)} descriptors came")
        offset, count = _number(request["offset"], 0), _number(request["count"], 1)
        if request.get("priority", "normal") not in _PRIORITIES:
            raise ValueError(f"priority is none of {_PRIORITIES}")
        if self.away and not client.attends:
            raise NotMovable(Reason.DRAINING, "this VM is leaving its host")
        file = self._looks.find(fds[1]) or locate(fds[1], self._shares())
        return self._make(client, request, fds, file, offset, count)

    def _reclaimed(self, client: _Client, request: dict[str, Any], fds: list[int]) -> Transfer:
        if len(fds) != 1:
            raise ValueError(f"reclaim needs a socket, {len(fds)} descriptors came")
        return self._make(client, request, fds, NO_FILE, 0, 0)

    def _make(
        self, client: _Client, request: dict[str, Any], fds: list[int], file: SharedFile, offset: int, count: int
    ) -> Transfer:
        number = request["id"]
        transfer = Transfer(
            token=_token(request["token"]),
            sock=_socket_of(fds),
            file=file,
            offset=offset,
            count=count,
            priority=request.get("priority", "normal"),
            reply=lambda outcome: client.answer(number, outcome, transfer.token),
            waits=request.get("on_move") == "wait",
            to_be_told=request.get("anticipates") is True and file is not NO_FILE,
            carried=lambda: client.carried(number, transfer),
            sent_before=_number(request.get("sent", 0), 0),
        )
        return transfer

    def gone(self, client: _Client) -> None:
        """A connection ended; so do its transfers."""
        self._clients.discard(client)
        self._answered(client)
        self._asked.pop(client, None)
        self._relays.owner_gone(client)
        for transfer in client.transfers.values():
            self._transfers.application_gone(transfer)


def _socket_of(fds: list[int]) -> socket.socket:
    try:
        sock = socket.socket(fileno=fds[0])
    except OSError as error:
        raise NotMovable(Reason.NOT_TCP, f"the descriptor is not a socket: {error}") from None
    del fds[0]
    return sock


class _Client:
    """One connection of an application."""

    def __init__(self, connection: socket.socket, door: Applications, pid: int, *, root: bool) -> None:
        self._connection, self._door, self.pid, self.root = connection, door, pid, root
        self.attends = False
        self.transfers: dict[str, Transfer] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._readable)

    def adopt(self, transfer: Transfer) -> Transfer:
        """Remember a transfer until it is answered."""
        self.transfers[transfer.token] = transfer
        return transfer

    def answer(self, number: object, outcome: Outcome, token: str = "") -> None:
        """Send the reply to request `number`."""
        self.transfers.pop(token, None)
        reason = outcome.reason.value if outcome.reason else None
        self.send(
            {
                "v": 1,
                "id": number,
                "outcome": outcome.outcome,
                "sent": outcome.sent,
                "reason": reason,
                "message": outcome.message,
                "errno": outcome.errno or None,
                "cursor": outcome.cursor,
                "rest": outcome.rest,
                "answered": outcome.answered,
                "away": self._door.away,
            }
        )

    def carried(self, number: object, transfer: Transfer) -> None:
        """Request `number` goes on under another token."""
        self.transfers = {one.token: one for one in self.transfers.values()}
        self.send({"v": 1, "id": number, "carried": transfer.sent_before, "token": transfer.token})

    def answers(self, number: object) -> tuple[Callable[[dict[str, Any]], None], Callable[[Outcome], None]]:
        """What tells the asker of request `number` how it goes, and how it went."""
        return lambda note: self.send({"v": 1, "id": number, **note}), lambda outcome: self.answer(number, outcome)

    def send(self, message: dict[str, Any], *fds: int) -> None:
        """One message; an application that does not read its replies loses its connection."""
        try:
            if fds:
                socket.send_fds(self._connection, [json.dumps(message).encode()], list(fds))
            else:
                self._connection.send(json.dumps(message).encode())
        except OSError as error:
            log.warning("an application does not take its reply: %s", error)
            self._loop.call_soon(self.close)

    def close(self, *, forget: bool = False) -> None:
        """Idempotent. With `forget` the agent is what goes: the transfers stay out, and the application reclaims them."""
        if self._connection.fileno() >= 0:
            self._loop.remove_reader(self._connection)
            self._connection.close()
            if not forget:
                self._door.gone(self)

    def _readable(self) -> None:
        """Several at once: when a VM has arrived, all want to go out, and one that waits for its turn is silent."""
        for _ in range(REQUESTS):
            if self._connection.fileno() < 0 or not self._read_one():
                return

    def _read_one(self) -> bool:
        """Whether there may be more."""
        try:
            data, ancillary, flags, _ = self._connection.recvmsg(MAX_REQUEST, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except OSError:
            self.close()
            return False
        fds = _descriptors(ancillary)
        if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            for fd in fds:
                os.close(fd)
            self.close()
            return False
        self._door.request(self, data, fds)
        return True


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def _token(value: object) -> str:
    if type(value) is not str or not _TOKEN.fullmatch(value):
        raise ValueError("token is not 32 hexadecimal digits")
    return value


def _number(value: object, least: int) -> int:
    if type(value) is not int or not least <= value < 1 << 62:
        raise ValueError(f"{value!r} is not a number of bytes")
    return value


def _seconds(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 1 << 32:
        raise ValueError(f"{value!r} is not a number of seconds")
    return float(value)


def may_ask(uid: int, gid: int, allowed: frozenset[str]) -> bool:
    """Whether a process may use the agent: `allowed` holds user names, `@group` names and `*` for everybody."""
    if uid == 0 or "*" in allowed:
        return True
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return False
    if user.pw_name in allowed:
        return True
    groups = {f"@{grp.getgrgid(number).gr_name}" for number in os.getgrouplist(user.pw_name, gid)}
    return bool(groups & allowed)
