# SPDX-License-Identifier: Apache-2.0
"""The service's door for operators: a Unix socket, one JSON object a line each way. Only its owner (root) may open it.

    {"command": "status"}  ->  {"ok": true, "result": {...}}  or  {"ok": false, "error": "...", "hint": "..."}
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from hypervisor_svc.errors import OperatorError, as_root, as_typed

log = logging.getLogger("streamlift.control")

Answer = dict[str, Any]
Handler = Callable[[dict[str, Any]], Answer | Awaitable[Answer]]
MAX_LINE = 16 << 20
"""Bytes of a request: what a VM brings from another host is one (`pass_on.py`)."""
CALL_TIMEOUT = 30.0


class ControlError(OperatorError):
    """The service could not be asked, or said no. A handler raises it to say no with a hint."""


class ControlServer:
    """Serves `handlers` by command name at `path`; an async context manager."""

    def __init__(self, path: str, handlers: Mapping[str, Handler]) -> None:
        self._path, self._handlers = path, handlers
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> ControlServer:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._client, self._path, limit=MAX_LINE)
        finally:
            os.umask(before)
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._server is not None
        self._server.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError, asyncio.LimitOverrunError):
            log.debug("a control connection ended early")
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> Answer:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return _refusal("a request is one JSON object a line")
        command = request.get("command") if isinstance(request, dict) else None
        if not isinstance(command, str):
            return _refusal('a request is one JSON object with a "command"')
        handler = self._handlers.get(command)
        if handler is None:
            return _refusal(f"no command {command!r}", "there are: " + ", ".join(self._handlers))
        return await _run(handler, request)


def _refusal(message: str, hint: str = "") -> dict[str, Any]:
    return {"ok": False, "error": message, "hint": hint}


async def _run(handler: Handler, request: dict[str, Any]) -> Answer:
    try:
        answer = handler(request)
        return {"ok": True, "result": answer if isinstance(answer, dict) else await answer}
    except KeyError as error:
        return _refusal(f"the request has no {error.args[0]!r}")
    except OperatorError as error:
        return _refusal(str(error), error.hint)
    except (ValueError, TypeError) as error:
        return _refusal(str(error))
    except Exception:
        # An operator's question must not cost the service anything; the whole story is for the log.
        log.exception("command %r failed", request["command"])
        return _refusal("the service failed to answer", "its log says why")


def call(path: str, command: str, *, patience: float = CALL_TIMEOUT, **arguments: Any) -> dict[str, Any]:
    """Ask the service and return its result; `patience`: seconds that its answer may take. Raises ControlError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(patience)
            connection.connect(path)
            connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                reply: dict[str, Any] = json.loads(lines.readline() or b"{}")
    except (FileNotFoundError, ConnectionError):
        hint = f"start it: systemctl start streamlift, or without systemd: sudo {as_typed('serve')}"
        raise ControlError(f"the service does not answer at {path}", hint) from None
    except PermissionError:
        raise ControlError(f"you may not open {path}", as_root()) from None
    except (OSError, ValueError) as error:
        raise ControlError(f"the service at {path}: {error}") from None
    if not reply.get("ok"):
        raise ControlError(str(reply.get("error", "no answer")), str(reply.get("hint", "")))
    result: dict[str, Any] = reply["result"]
    return result
