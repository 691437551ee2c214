# SPDX-License-Identifier: Apache-2.0
"""The control socket: private, and no request, however wrong, ends it."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypervisor_svc.control import ControlError, ControlServer, call


def fail(request: dict[str, Any]) -> dict[str, Any]:
    raise RuntimeError("secret detail")


HANDLERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "echo": lambda request: {"said": request["word"]},
    "fail": fail,
}


async def exchange(path: str, *lines: bytes) -> list[dict[str, Any]]:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"\n".join(lines) + b"\n")
    replies = [json.loads(await reader.readline()) for _ in lines]
    writer.close()
    await writer.wait_closed()
    return replies


def served(path: str, *lines: bytes) -> list[dict[str, Any]]:
    async def main() -> list[dict[str, Any]]:
        async with ControlServer(path, HANDLERS):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            return await exchange(path, *lines)

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"not json", "one JSON object"),
        (b"\xff\xfe", "one JSON object"),
        (b"[" * 60000, "one JSON object"),
        (b"[1, 2]", "command"),
        (b"{}", "command"),
        (b'{"command": ["echo"]}', "command"),
        (b'{"command": "dance"}', "no command 'dance'"),
        (b'{"command": "echo"}', "no 'word'"),
        (b'{"command": "fail"}', "failed to answer"),
    ],
)
def test_a_wrong_request_is_refused_and_the_next_one_served(tmp_path: Path, line: bytes, error: str) -> None:
    refused, answered = served(str(tmp_path / "c.sock"), line, b'{"command": "echo", "word": "still here"}')
    assert refused["ok"] is False
    assert error in refused["error"]
    assert "secret" not in refused["error"]
    assert answered == {"ok": True, "result": {"said": "still here"}}


def test_a_socket_that_an_earlier_run_left_is_replaced_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    path.touch()
    assert served(str(path), b'{"command": "echo", "word": 1}')[0]["ok"]
    assert not path.exists()


def test_a_client_learns_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="does not answer") as error:
        call(str(tmp_path / "nobody.sock"), "status")
    assert error.value.hint.startswith("start it: systemctl start streamlift")
