# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium that is asked what a page did: the DevTools protocol over its pipe (--remote-debugging-pipe)."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = "/usr/bin/chromium"
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
PATIENCE = 60.0


@dataclass
class Visit:
    """What happened: URLs that were asked for, errors (scripts, console, policy), and whether each picture could be drawn."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    title: str = ""
    pictures: list[bool] = field(default_factory=list)

    @property
    def network_requests(self) -> list[str]:
        """Those that would leave the browser: the page itself is a file, its pictures are inside it."""
        return [url for url in self.requests if not url.startswith(("data:", "file:"))]


def visit(path: Path) -> Visit:
    """Open a file. Raises TimeoutError, OSError."""
    out_read, out_write = os.pipe()
    in_read, in_write = os.pipe()
    # Its children write their profile for a moment after it has ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}", *QUIET)
        # The browser reads commands from descriptor 3 and answers on 4. (bash: dash knows no numbers above 9.)
        shell = f'exec 3<&{out_read} 4>&{in_write}; exec "$@"'
        argv = ["bash", "-c", shell, "bash", CHROMIUM, *flags, "about:blank"]
        with subprocess.Popen(argv, pass_fds=(out_read, in_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            os.close(out_read)
            os.close(in_write)
            try:
                return _Session(in_read, out_write).visit(path.resolve().as_uri())
            finally:
                os.close(out_write)
                os.close(in_read)
                browser.terminate()
                browser.wait(20)


class _Session:
    """One page's session; messages are JSON, ended by NUL."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._buffer = b""
        self._number = 0
        self._session = ""
        self._seen = Visit()
        self._loaded = False
        self._deadline = time.monotonic() + PATIENCE

    def visit(self, url: str) -> Visit:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable")
        self._call("Page.navigate", url=url)
        while not self._loaded:
            self._note(self._next())
        self._seen.title = self._evaluate("document.title")
        self._seen.pictures = self._evaluate("Array.from(document.images, image => image.naturalWidth > 0)")
        return self._seen

    def _evaluate(self, expression: str) -> Any:
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise OSError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _note(self, message: dict[str, Any]) -> None:
        method, told = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self._seen.requests.append(told["request"]["url"])
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self._seen.errors.append(told["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self._seen.errors.append(told["exceptionDetails"]["text"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._reading], [], [], max(0.0, self._deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            piece = os.read(self._reading, 1 << 16)
            if not piece:
                raise OSError("the browser ended")
            self._buffer += piece
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        return message
