# SPDX-License-Identifier: Apache-2.0
"""Asking the agent from threads: each request has a connection of its own while it is under way, from a pool."""

from __future__ import annotations

import contextlib
import socket
import time

from guest_agent import held_files
from guest_agent.offload_wire import (
    CROWDED,
    HELLO_LIMIT,
    MAX_MESSAGE,
    RECLAIM_LIMIT,
    RECLAIM_PAUSE,
    RETRY_INTERVAL,
    Hello,
    Message,
    Refused,
    Reply,
    connect,
    decode,
    encode_attend,
    encode_let_go_of,
    encode_reclaim,
    encode_sendfile,
    encode_status,
    here,
    lost,
    new_token,
    next_number,
    read_greeting,
    read_hello,
    read_reply,
    send_message,
)


class BlockingAgent:
    """Thread-safe: the pool's list changes only by append and pop."""

    def __init__(self) -> None:
        self._idle: list[socket.socket] = []
        self._hello: Hello | None = None
        self._absent = "no_agent"
        self._retry_at = 0.0

    def close(self) -> None:
        """Close idle connections."""
        self._hello = None
        while self._idle:
            self._idle.pop().close()

    def refusal(self, file_fd: int, count: int) -> str | None:
        """Why the file is not for the host, mostly without asking anybody."""
        hello = self._hello or self._meet()
        if hello is None:
            return self._absent
        reason = hello.refusal(file_fd, count)
        if reason is not None and hello.stale() and self.status() and self._hello:
            return self._hello.refusal(file_fd, count)
        return reason

    def request(self, sock: socket.socket, file_fd: int, offset: int, count: int, priority: str) -> Reply:
        """Ask the agent and wait. Raises ConnectionResetError if it goes away with the connection for good."""
        number, token, begun = next_number(), new_token(), time.monotonic()
        message = encode_sendfile(number, token, offset, count, priority)
        try:
            connection = self._send(message, sock.fileno(), file_fd)
        except OSError as error:
            if error.errno in CROWDED:
                return here("agent_busy")
            raise
        if connection is None:
            return here(self._absent)
        try:
            return read_reply(self._answer(connection, number))
        except ConnectionError as error:
            return self._reclaim(sock, token, begun, error)

    def wait_until_here(self) -> None:
        """The VM is leaving its host: let go of what this process holds, and wait until it works with one again. An agent that goes
        away meanwhile and does not come back has nothing more to say."""
        until: float | None = None
        while until is None or time.monotonic() < until:
            try:
                self._attend()
                break
            except (OSError, Refused):
                until = until or time.monotonic() + RECLAIM_LIMIT
                time.sleep(RECLAIM_PAUSE)
        held_files.take_up()

    def _attend(self) -> None:
        """On a connection of its own: one that is not read from must not be asked anything."""
        with self._open() as connection:
            connection.settimeout(None)
            send_message(connection, encode_attend(next_number()))
            while True:
                message = decode(connection.recv(MAX_MESSAGE), lambda message: message)
                if message.get("presence") == "here":
                    self._hello = read_hello(message["hello"])
                    return
                held_files.let_go(self._hello.prefixes if self._hello is not None else ())
                if message.get("let_go"):
                    send_message(connection, encode_let_go_of(next_number()))

    def status(self) -> Message | None:
        """The agent's status, which also says which shares there are now; None while it is absent."""
        number = next_number()
        try:
            connection = self._send(encode_status(number))
            if connection is None:
                return None
            told: Message = self._answer(connection, number)["status"]
            self._hello = read_hello(told)
        except (OSError, KeyError, TypeError, ValueError):
            return None
        return told

    def _meet(self) -> Hello | None:
        connection = self._take()
        if connection is not None:
            self._idle.append(connection)
        return self._hello

    def _take(self) -> socket.socket | None:
        """A connection whose hello was read, or None while the agent is absent."""
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        if time.monotonic() < self._retry_at:
            return None
        try:
            return self._open()
        except (OSError, Refused) as error:
            self._absent = "not_allowed" if isinstance(error, Refused) else "no_agent"
            self._retry_at = time.monotonic() + RETRY_INTERVAL
            return None

    def _open(self) -> socket.socket:
        connection = connect()
        try:
            connection.settimeout(HELLO_LIMIT)
            self._hello = decode(connection.recv(MAX_MESSAGE), read_greeting)
            connection.settimeout(None)
        except BaseException:
            connection.close()
            raise
        return connection

    def _send(self, message: bytes, *fds: int) -> socket.socket | None:
        """Send on a connection that works: an idle one may have died with an earlier life of the agent."""
        while True:
            connection = self._take()
            if connection is None:
                self._hello = None
                return None
            try:
                send_message(connection, message, *fds)
            except ConnectionError:
                connection.close()
            except BaseException:
                connection.close()
                raise
            else:
                return connection

    def _answer(self, connection: socket.socket, number: int) -> Message:
        """Read the reply and put the connection back. Raises ConnectionError if the agent is gone or talks nonsense.

        Who interrupts us here (Ctrl-C) ends the transfer: the agent sees its connection close."""

        def ours(message: Message) -> Message:
            if message["id"] != number:
                raise ValueError(f"reply {message['id']} to request {number}")
            if "status" not in message:
                read_reply(message)
            return message

        try:
            message = decode(connection.recv(MAX_MESSAGE), ours)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return message

    def _reclaim(self, sock: socket.socket, token: str, begun: float, why: Exception) -> Reply:
        """Give the socket to the agent's next life and wait for what that says."""
        self.close()
        until = time.monotonic() + RECLAIM_LIMIT
        while time.monotonic() < until:
            try:
                return self._reclaim_once(sock, token, begun)
            except (OSError, Refused) as error:
                why = error
                time.sleep(RECLAIM_PAUSE)
        raise lost(why)

    def _reclaim_once(self, sock: socket.socket, token: str, begun: float) -> Reply:
        connection, number = self._open(), next_number()
        try:
            send_message(connection, encode_reclaim(number, token, begun), sock.fileno())
        except BaseException:
            connection.close()
            raise
        return read_reply(self._answer(connection, number))
