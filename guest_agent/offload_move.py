# SPDX-License-Identifier: Apache-2.0
"""What an application does when its VM leaves the host, and when it is back, as one event loop sees it.

    agent -> application  {"v":1,"presence":"leaving","let_go":true,"look":true,"hello":{...}}  also to one that connects meanwhile
    application -> agent  {"v":1,"op":"let_go_of","id":N}                                       then the share may be unmounted
    agent -> application  {"v":1,"presence":"leaving","let_go":false,"look":false,"hello":{...}}
    agent -> application  {"v":1,"presence":"leaving","let_go":false,"look":true,"hello":{...}}  there is a host again
    agent -> application  {"v":1,"presence":"here","let_go":false,"look":false,"hello":{...}}

As long as `look` holds the host goes on with what it has, and takes more: it reads the files that this process cannot
(`offload_open.py`). Other transfers stop at a byte boundary and wait, and so does whoever asks `present` before he opens a file.
Files that are held (`held_files.py`) need not be closed; others the application closes in its own `on_leave`."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable

from guest_agent import held_files
from guest_agent.held_files import HeldFile
from guest_agent.offload_wire import Message

log = logging.getLogger("streamlift.offload")

Notice = Callable[[], Awaitable[None]]


class Attendance:
    """`answer` tells the agent that everything is let go of. `may_look`: the host can be asked for files meanwhile."""

    def __init__(self, *, answer: Callable[[], None]) -> None:
        self._answer = answer
        self._here = asyncio.Event()
        self._here.set()
        self._complete = asyncio.Event()
        self._complete.set()
        self._askable = asyncio.Event()
        self._askable.set()
        self.may_look = False
        self._prefixes: tuple[str, ...] = ()
        self._notices: list[tuple[Notice | None, Notice | None]] = []
        self._task: asyncio.Task[None] | None = None
        self._taking_up: asyncio.Task[None] | None = None
        self._returning: set[asyncio.Task[None]] = set()

    @property
    def away(self) -> bool:
        """Whether nothing may be opened on the share now."""
        return not self._here.is_set()

    def misses(self, path: str) -> bool:
        """Whether that one lies where nothing can be opened now."""
        return self.away and path.startswith(self._prefixes)

    async def present(self) -> None:
        """Until it may, and all that is held is open again."""
        while self.away or not self._complete.is_set():
            await self._complete.wait()

    async def askable(self) -> None:
        """Until the host can be asked for a file of the share, or it is here."""
        await self._askable.wait()

    async def another(self, error: OSError) -> None:
        """The host did not answer for a file: until the next one can be asked, if this one is being left, or was not asked at all
        (EAGAIN); else until the share is here."""
        if self.may_look and error.errno != errno.EAGAIN:
            await self.present()
        else:
            await self.askable()

    def lost(self) -> None:
        """Nobody can be asked before the agent's next life says so."""
        if self.away:
            self.may_look = False
            self._askable.clear()

    def notify(self, on_leave: Notice | None, on_return: Notice | None) -> None:
        """Have both called from now on."""
        self._notices.append((on_leave, on_return))

    def hear(self, message: Message, prefixes: tuple[str, ...]) -> None:
        """What the agent says; `prefixes`: where the shares are."""
        if message["presence"] == "here":
            self.come_back()
            return
        self._here.clear()
        self._complete.clear()
        if self._taking_up is not None:
            self._taking_up.cancel()
        self.may_look = message.get("look") is True
        if self.may_look:
            self._askable.set()
        else:
            self._askable.clear()
        self._prefixes = prefixes or self._prefixes
        if message["let_go"] and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._let_go())

    def come_back(self) -> None:
        """The share is here, or nobody is left who could say so. Idempotent."""
        if self._here.is_set():
            return
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self.may_look = False
        self._here.set()
        self._askable.set()
        self._taking_up = asyncio.get_running_loop().create_task(self._take_up())

    async def _take_up(self) -> None:
        """One file between two looks at everything else; whoever wants to go on with one opens it himself (`take_up`)."""
        while held_files.take_up_one():
            await asyncio.sleep(0)
        self._complete.set()
        for _, on_return in self._notices:
            if on_return is not None:
                task = asyncio.get_running_loop().create_task(_heed(on_return))
                self._returning.add(task)
                task.add_done_callback(self._returning.discard)

    async def _let_go(self) -> None:
        for on_leave, _ in self._notices:
            if on_leave is not None:
                await _heed(on_leave)
        self.let_go()
        self._task = None
        self._answer()

    def let_go(self) -> None:
        """Of what is held."""
        if self.away:
            held_files.let_go(self._prefixes)

    def take_up(self, hold: HeldFile) -> None:
        """One that is needed now, if the share is here."""
        if hold.away and not self.away:
            held_files.take_up(hold)

    def let_go_of(self, hold: HeldFile) -> None:
        """Of one that was held a moment too late."""
        if self.away:
            held_files.let_go_of(hold, self._prefixes)


async def _heed(notice: Notice) -> None:
    """An application's mistake must not keep the VM here for ever without a word."""
    try:
        await notice()
    except Exception:
        log.exception("the application's notice failed")
