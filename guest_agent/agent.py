# SPDX-License-Identifier: Apache-2.0
"""The agent: starts its parts in order and stops them in reverse. What they do is in their own files."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import signal
from dataclasses import dataclass, field
from typing import Any

from guest_agent import __version__, mute
from guest_agent.applications import Applications
from guest_agent.channel import Channel
from guest_agent.handoff.backend import choose
from guest_agent.handoff.hold import Hold
from guest_agent.handoff.presence import HANDING_OUT, Presence
from guest_agent.handoff.wire import Established, Event, Message, Violation
from guest_agent.leave import Departure
from guest_agent.look import Looks
from guest_agent.relays import Relays
from guest_agent.share import find_shares
from guest_agent.transfers import Transfers

log = logging.getLogger("streamlift.agent")

DEFAULT_PORT = "/dev/virtio-ports/org.streamlift.offload.0"
DEFAULT_SOCKET = "/run/streamlift/agent.sock"
DEFAULT_THRESHOLD = 65536


@dataclass(frozen=True)
class Settings:
    """What the command line says. `shares` empty: the 9p file systems that are mounted. Threshold in bytes."""

    port: str = DEFAULT_PORT
    socket: str = DEFAULT_SOCKET
    shares: tuple[str, ...] = ()
    allowed: frozenset[str] = field(default_factory=lambda: frozenset({"@streamlift"}))
    threshold: int = DEFAULT_THRESHOLD
    backend: str = "auto"


class Agent:
    """Its parts: hold, channel, transfers, relays, looks, applications, departure."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keep = _open_hold()
        self._backend = choose(settings.backend)
        log.info("backend %s: %s", self._backend.name, self._backend.why)
        mute.install()
        about = {
            "side": "guest",
            "agent_version": __version__,
            "instance": os.urandom(8).hex(),
            "boot": _boot(),
            "backends": [self._backend.name],
            "kernel": platform.release(),
            "lossless_freeze": self._keep is not None,
            "features": ["let_go", "pass_on"],
        }
        self._channel = Channel(settings.port, about, on_event=self._event, on_down=self._down)
        self._transfers = Transfers(
            backend=self._backend,
            keep=self._keep,
            send=self._channel.send,
            is_up=lambda: self._channel.up,
            is_here=lambda: self._departure.presence in HANDING_OUT,
            moves=lambda: self._departure.moves,
            is_leaving=lambda: self._departure.presence not in (Presence.HERE, Presence.LETTING_GO),
        )
        self._relays = Relays(
            send=self._channel.send,
            is_up=lambda: self._channel.up,
            is_here=lambda: self._departure.presence in HANDING_OUT,
        )
        self._looks = Looks(send=self._channel.send)
        self._host: dict[str, Any] = {}
        self._applications = Applications(
            settings.socket,
            self._transfers,
            self._relays,
            self._looks,
            allowed=settings.allowed,
            hello=self._hello,
            status=self._status,
            shares=self._shares,
            is_up=lambda: self._channel.up,
        )
        self._departure = Departure(
            self._applications,
            all_home=self._all_home,
            take_up=self._transfers.take_up,
            send=self._channel.send,
            shares=self._shares,
            record=os.path.join(os.path.dirname(settings.socket), "unmounted.json"),
        )

    def start(self) -> None:
        """Channel first: an application that finds the door open should find the host behind it."""
        self._channel.start()
        self._applications.start()
        self._departure.start()

    def stop(self) -> None:
        """The reverse of `start`."""
        self._departure.stop()
        self._applications.stop()
        self._channel.stop()
        if self._keep:
            asyncio.get_running_loop().remove_reader(self._keep)
            self._keep.close()

    def _event(self, event: Event) -> None:
        if isinstance(event, Message):
            self._message(event)
        elif isinstance(event, Established):
            same = event.hello.get("instance") == self._host.get("instance")
            self._host = event.hello
            log.info("the host's service %s answers", event.hello.get("service_version", "?"))
            self._transfers.host_up(event.hello)
            self._relays.host_up(same=same)
            self._departure.host_up(same=same)
            self._applications.host_up()
        elif isinstance(event, Violation):
            log.warning("channel: %s: %s", event.reason.value, event.message)

    def _message(self, event: Message) -> None:
        kind = event.header["type"]
        if kind == "ping":
            self._channel.send({"type": "pong"})
        elif kind == "let_go":
            self._departure.let_go(event.header)
        elif kind == "leave":
            self._departure.leave(event.header)
        elif kind == "return":
            self._departure.come_back()
        elif kind == "seen":
            self._looks.message(event.header)
        elif kind.startswith("relay_"):
            self._relays.message(event.header, event.body)
        elif kind != "pong":
            self._transfers.message(event.header, event.body)

    def _down(self) -> None:
        log.warning("the host's service is away")
        self._applications.host_down()
        self._transfers.host_down()
        self._looks.host_down()
        self._departure.host_down()

    async def _all_home(self, files: bool) -> None:
        await self._relays.all_closed()
        if files:
            await self._transfers.all_home()

    def _shares(self) -> tuple[str, ...]:
        """Those too that are only unmounted for a move."""
        return self._settings.shares or tuple(dict.fromkeys((*find_shares(), *self._departure.unmounted)))

    def _hello(self) -> dict[str, Any]:
        return {
            "agent_version": __version__,
            "threshold": self._threshold(),
            "shares": list(self._shares()),
            "host": "up" if self._channel.up else "down",
            "presence": self._departure.presence.value,
            "backend": self._backend.name,
            "backend_why": self._backend.why,
            "anticipates": "anticipate" in (self._host.get("features") or ()),
        }

    def _threshold(self) -> int:
        told = self._host.get("threshold")
        return told if isinstance(told, int) else self._settings.threshold

    def _status(self) -> dict[str, Any]:
        return {
            **self._hello(),
            "lossless_freeze": self._keep is not None,
            "transfers": len(self._transfers),
            "counters": dict(self._transfers.counters),
            "service_version": self._host.get("service_version"),
        }


def _open_hold() -> Hold | None:
    try:
        return Hold()
    except OSError as error:
        log.warning("packets that arrive during a handoff will be lost and retransmitted: %s", error)
        return None


def _boot() -> str:
    """Another one after each start of the kernel (random(4), boot_id): nobody is left of the life before."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    agent = Agent(settings)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    agent.start()
    try:
        await stopped.wait()
    finally:
        agent.stop()
