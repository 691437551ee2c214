# SPDX-License-Identifier: Apache-2.0
"""QEMU's own events, for VMs that libvirt does not manage: its monitor (QMP) says when one migrates, stands still or ends.

The socket must be one of QEMU's that nobody else uses (`-qmp unix:PATH,server=on,wait=off`). The words are those of QEMU's
qapi/migration.json and qapi/run-state.json."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from qemu.qmp import EventListener, QMPClient, QMPError

log = logging.getLogger("streamlift.monitor")

CONNECT_INTERVAL = 1.0
_BEGINS = frozenset({"setup", "active"})
_STAYS = frozenset({"failed", "cancelled"})
_EVENTS = ("MIGRATION", "STOP", "RESUME")


class Monitor:
    """One VM's. `on_migrating()`, `on_stays()`: a migration begins, or has come to nothing; `on_paused(bool)`: its processors."""

    def __init__(
        self,
        path: str,
        *,
        on_migrating: Callable[[], None],
        on_stays: Callable[[], None],
        on_paused: Callable[[bool], None],
    ) -> None:
        self._path = path
        self._on_migrating, self._on_stays, self._on_paused = on_migrating, on_stays, on_paused
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watch, and connect again whenever the monitor is lost."""
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _watch(self) -> None:
        while True:
            try:
                await self._listen()
            except (QMPError, OSError, EOFError) as error:
                log.debug("%s: %s", self._path, error)
            await asyncio.sleep(CONNECT_INTERVAL)

    async def _listen(self) -> None:
        monitor, events = QMPClient("streamlift"), EventListener(names=set(_EVENTS))
        with monitor.listen(events):
            await monitor.connect(self._path)
            try:
                await monitor.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
                status = await monitor.execute("query-status")
                self._on_paused(not status["running"])  # type: ignore[index]
                async for event in events:
                    self._hear(str(event["event"]), event.get("data"))
            finally:
                with contextlib.suppress(QMPError, OSError, EOFError):
                    await monitor.disconnect()

    def _hear(self, name: str, data: object) -> None:
        if name in ("STOP", "RESUME"):
            self._on_paused(name == "STOP")
            return
        status = data.get("status") if isinstance(data, dict) else None
        if status in _BEGINS:
            self._on_migrating()
        elif status in _STAYS:
            self._on_stays()
