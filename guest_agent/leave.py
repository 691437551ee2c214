# SPDX-License-Identifier: Apache-2.0
"""The guest leaves its host, and comes back: `handoff/presence.py` has the states.

    let_go       applications let go of their files on the share (`applications.py`); then it is unmounted. The host goes on
                 serving, and takes more: it has the files (`look.py`)
    leave        no connection goes out any more; the host sends home those that are out (`transfers.py`), and the share is
                 unmounted if it is not yet: the VM may migrate or be saved
    come_back    the share is mounted again, applications are told, connections go out again

An application whose file cannot be opened any more would fail, so nothing is unmounted before all have answered; and nobody is
asked where nothing is mounted. What was mounted is written down, for another life of this agent. A guest that is left alone comes
back by itself."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict

from guest_agent.applications import Applications
from guest_agent.handoff.presence import PRESENCE_MOVES, Presence, move_presence
from guest_agent.handoff.wire import Header
from guest_agent.mounts import Mount, holders, mount_again, mounts_at, unmount

log = logging.getLogger("streamlift.agent")

LET_GO_LIMIT = 5.0
"""Seconds that applications have to let go of their files, unless the host says otherwise; counted from the last connection that
came home."""
BUSY_INTERVAL = 0.01
MOUNT_INTERVAL = 0.2
SETTLE = 1.0
"""Seconds after the arrival at another host until the share is mounted, where nobody but clients waits."""
ALONE_LIMIT = 5.0
"""Seconds without a host's service after which a guest that is away comes back: nobody else would call it."""


class Departure:
    """`all_home` waits until nothing is out (False: no relay), `take_up` hands on what was carried; `send` is the channel's,
    `shares` the mount points; `record`: a file for what is to be mounted again."""

    def __init__(
        self,
        applications: Applications,
        *,
        all_home: Callable[[bool], Awaitable[None]],
        take_up: Callable[[], None],
        send: Callable[[Header, bytes], None],
        shares: Callable[[], tuple[str, ...]],
        record: str,
    ) -> None:
        self._applications, self._all_home, self._take_up = applications, all_home, take_up
        self._send, self._shares, self._record = send, shares, record
        self.presence = Presence.HERE
        self.moves = False
        self._message, self._call = "", 0
        self._mounts: tuple[Mount, ...] = ()
        self._task: asyncio.Task[None] | None = None
        self._alone: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Mount what an earlier life of this agent had unmounted."""
        self._mounts = _read_record(self._record)
        if self._mounts:
            self.presence = Presence.AWAY
            self.come_back("the agent was restarted")

    def stop(self) -> None:
        """The record stays, if there is one."""
        self._cancel()

    @property
    def unmounted(self) -> tuple[str, ...]:
        """Where shares are to be mounted again."""
        return tuple(mount.target for mount in self._mounts)

    def let_go(self, header: Header) -> None:
        """The host asks for the share alone. Whatever goes wrong ends in coming back, with a message that says why."""
        self._begin(header, Presence.LETTING_GO, Presence.LOOSE)

    def leave(self, header: Header) -> None:
        """The host asks for everything; also after `let_go`."""
        self._begin(header, Presence.LEAVING, Presence.AWAY)

    def _begin(self, header: Header, by: Presence, to: Presence) -> None:
        call = header.get("call")
        self._call = call if type(call) is int else 0
        if by not in PRESENCE_MOVES[self.presence]:
            self._say()
            return
        self._cancel()
        self.moves = self.presence is Presence.LOOSE
        if self.presence is Presence.HERE:
            self._mounts = ()
        self._go_to(by)
        seconds = header.get("seconds")
        limit = float(seconds) if isinstance(seconds, int | float) and 0 < seconds <= 600 else LET_GO_LIMIT
        mounts = mounts_at(self._shares())
        # At once: the next message may end a relay, and its application must know that it only moves.
        self._applications.leaving(by, let_go=bool(mounts))
        files = header.get("passes") is not True
        self._task = self._loop.create_task(self._go(to, limit, mounts, files=files))

    async def _go(self, to: Presence, limit: float, mounts: tuple[Mount, ...], *, files: bool) -> None:
        if to is Presence.AWAY:
            await self._all_home(files)
        try:
            async with asyncio.timeout(limit):
                await self._applications.all_let_go()
                for mount in mounts:
                    await self._unmount(mount)
        except TimeoutError:
            self._task = None
            self.come_back(f"the share is in use: {_who(mounts, self._applications.silent())}")
            return
        except OSError as error:
            self._task = None
            self.come_back(f"the share {error.filename} cannot be unmounted: {error.strerror}")
            return
        self._task = None
        self._go_to(to)

    async def _unmount(self, mount: Mount) -> None:
        self._mounts += (mount,)
        _write_record(self._record, self._mounts)
        while True:
            try:
                unmount(mount)
                return
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            await asyncio.sleep(BUSY_INTERVAL)

    def come_back(self, why: str = "", *, after: float = 0.0) -> None:
        """Idempotent. The share is mounted `after` so many seconds."""
        if self.presence in (Presence.HERE, Presence.RETURNING):
            self._say()
            return
        self._cancel()
        log.info("coming back%s", f": {why}" if why else "")
        self.moves = False
        self._go_to(Presence.RETURNING, why)
        self._take_up()
        self._applications.returning()
        self._task = self._loop.create_task(self._come_back(after))

    async def _come_back(self, after: float) -> None:
        """A mount may be refused while a migration is still going on; it is tried until it is not."""
        await asyncio.sleep(after)
        complained = ""
        while self._mounts:
            try:
                self._mount_all()
            except OSError as error:
                if str(error) != complained:
                    complained = str(error)
                    log.warning("the share is not back yet: %s", error)
                await asyncio.sleep(MOUNT_INTERVAL)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._record)
        self._task = None
        self._go_to(Presence.HERE, self._message)
        self._applications.here()

    def _mount_all(self) -> None:
        there = {mount.target for mount in mounts_at(tuple(mount.target for mount in self._mounts))}
        for mount in self._mounts:
            if mount.target not in there:
                mount_again(mount)
            self._mounts = self._mounts[1:]

    # What the channel does.

    def host_up(self, *, same: bool) -> None:
        """A host's service that does not know of our leaving calls nobody back."""
        if self._alone is not None:
            self._alone.cancel()
            self._alone = None
        if not same and self.presence not in (Presence.HERE, Presence.RETURNING):
            self.come_back("another service of the host answers", after=SETTLE if self.presence is Presence.LOOSE else 0.0)
            return
        if self.presence is Presence.RETURNING:
            self._take_up()
        self._say()

    def host_down(self) -> None:
        """It may be on the way to another host, or left alone."""
        if self._alone is None:
            self._alone = self._loop.call_later(ALONE_LIMIT, self._left_alone)

    def _left_alone(self) -> None:
        self._alone = None
        if self.presence not in (Presence.HERE, Presence.RETURNING):
            self.come_back(f"no service of a host answered for {ALONE_LIMIT:g} s")

    def _go_to(self, to: Presence, message: str = "") -> None:
        self.presence, self._message = move_presence(self.presence, to), message
        self._say()

    def _say(self) -> None:
        with contextlib.suppress(ConnectionError):
            told = {"type": "presence", "state": self.presence.value, "message": self._message, "call": self._call}
            self._send(told, b"")

    def _cancel(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()


def _who(mounts: tuple[Mount, ...], silent: list[str]) -> str:
    """Who did not let go, for people."""
    return "; ".join(silent or [holder for mount in mounts for holder in holders(mount)][:5]) or "by nobody who can be seen"


def _read_record(path: str) -> tuple[Mount, ...]:
    try:
        with open(path, encoding="utf-8") as file:
            return tuple(Mount(**row) for row in json.load(file))
    except (OSError, ValueError, TypeError):
        return ()


def _write_record(path: str, mounts: tuple[Mount, ...]) -> None:
    """Whole or not at all: the agent may be killed at any moment."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump([asdict(mount) for mount in mounts], file)
    os.replace(f"{path}.new", path)
