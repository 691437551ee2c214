# SPDX-License-Identifier: Apache-2.0
"""One connection that the host has taken over, and the VM that it came from. Nouns only; the steps are in their files."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guest_agent.handoff import fault
from guest_agent.handoff.errors import Reason
from guest_agent.handoff.presence import Presence
from guest_agent.handoff.snapshot import Endpoint
from guest_agent.handoff.state import Host, move_host
from guest_agent.handoff.wire import Header
from hypervisor_svc.channel import Channel
from hypervisor_svc.domains import Machine
from hypervisor_svc.policy import Job
from hypervisor_svc.redirect import Flow
from hypervisor_svc.schedule import PRIORITIES

if TYPE_CHECKING:
    from hypervisor_svc.anticipate import Anticipation
    from hypervisor_svc.relay import Relay


@dataclass(eq=False, repr=False)
class Guest:
    """A VM with a channel: what it is, what it has out, what was counted (`refused`, `lost`: by reason). Bytes and numbers since
    the service's start. `presence` is what its agent says; `call` counts how often it was asked to leave, `answers`: it has heard
    the last one; `asked`: what it was asked, until then."""

    machine: Machine
    channel: Channel | None = None
    hello: Header = field(default_factory=dict)
    connections: dict[str, Connection] = field(default_factory=dict)
    passed: dict[str, Connection] = field(default_factory=dict)
    """Frozen here, or not even taken, for the host that it moves to (`passing.py`)."""
    passing: bool = False
    parked: list[Header] = field(default_factory=list)
    """What that host has not been told yet of what it was offered since."""
    relays: dict[str, Relay] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    bytes_sent: int = 0
    bytes_per_second: float = 0.0
    _measured: tuple[float, int] = (0.0, 0)
    draining: bool = False
    paused_until: float = 0.0
    """time.monotonic(); until then nothing more goes out, for a measurement."""
    gone: bool = False
    paused: bool = False
    presence: Presence = Presence.HERE
    presence_message: str = ""
    call: int = 0
    answers: bool = False
    asked: Header | None = None
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def stays(self) -> bool:
        """Whether its agent has heard the last call to leave, and is not leaving (any more)."""
        return self.answers and self.presence in (Presence.HERE, Presence.RETURNING)

    async def news(self, seconds: float | None) -> bool:
        """Until something of it changes: its presence, its channel, what it has out. False: not within so many seconds."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        done, _ = await asyncio.wait((future,), timeout=seconds)
        return bool(done)

    def changed(self) -> None:
        """Whoever waits for news goes on."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    @property
    def hears(self) -> bool:
        """Whether its agent answers, and can be told something."""
        return self.channel is not None and self.channel.state == "hello"

    @property
    def backend(self) -> str:
        """How its agent moves sockets (`guest_agent/handoff/backend.py`)."""
        backends = self.hello.get("backends")
        return str(backends[0]) if isinstance(backends, list) and backends else "tcp_repair"

    @property
    def features(self) -> frozenset[str]:
        """What its agent knows beyond the first release."""
        features = self.hello.get("features")
        return frozenset(filter(lambda one: isinstance(one, str), features)) if isinstance(features, list) else frozenset()

    @property
    def level(self) -> int:
        """The VM's class (`schedule.py`)."""
        return PRIORITIES.index(self.machine.priority)

    def send(self, header: Header, body: bytes = b"") -> bool:
        """Send to the guest; False if its channel is down."""
        return self.channel is not None and self.channel.send(header, body)

    def measure(self, now: float) -> None:
        """Bytes a second since the last call; `now` in seconds of any clock."""
        before, sent = self._measured
        self.bytes_per_second = (self.bytes_sent - sent) / (now - before) if before else 0.0
        self._measured = now, self.bytes_sent


@dataclass(eq=False, repr=False)
class Connection:
    """A client's connection while the host has it. `sent` counts bytes given to the socket; `ready`: the guest's place-holder
    stands where the connection will arrive (None: it has not said yet); `direct`: it goes home without a second question.
    `sent_before`: bytes that earlier hosts have sent, of which this job knows nothing; `told`: so many of the packets that
    it `held` the next host has; `rolled_back`: bytes of the file that were queued and are not on their way home; `kept`: nobody
    will take it home, it ends here. `relay`: what it is a sink or the source of, `sink` its number there, `cursor` the position
    where it would go on. `anticipation`: what its client may ask next; `before`: bytes that were sent since its snapshot was made,
    and before the first one of what is served now."""

    guest: Guest
    job: Job
    flow: Flow
    state: Host = Host.OFFERED
    sock: socket.socket | None = None
    file: int = -1
    endpoint: Endpoint | None = None
    cookie: int = 0
    sent: int = 0
    finished: bool = False
    reason: Reason | None = None
    message: str = ""
    errno: int = 0
    cold: bool = False
    held: list[bytes] = field(default_factory=list)
    told: int = 0
    started: float = field(default_factory=time.monotonic)
    ready: bool | None = None
    waits_for_guest: bool = False
    direct: bool = False
    parting: tuple[Header, bytes] | None = None
    fin: bytes = b""
    timer: asyncio.TimerHandle | None = None
    rolled_back: int = 0
    sent_before: int = 0
    kept: bool = False
    relay: Relay | None = None
    sink: int = 0
    cursor: int | None = None
    anticipation: Anticipation | None = None
    before: int = 0

    @property
    def answered(self) -> list[int]:
        """Which of the anticipated requests it has answered, the last perhaps in part: `job` and `sent` are of that one."""
        return self.anticipation.answered if self.anticipation is not None else []

    @property
    def goes_on(self) -> bool:
        """Whether its client may ask for more."""
        return self.anticipation is not None and self.anticipation.expects

    def serve_next(self, job: Job, file: int, *, head: int) -> None:
        """Its client has asked for something else, and got `head` bytes of the answer."""
        self.before += self.job.count + head
        if self.file >= 0:
            os.close(self.file)
        self.job, self.file = job, file
        self.sent = self.sent_before = 0
        self.finished = False

    def stop_waiting(self) -> None:
        """For the guest's place-holder."""
        self.waits_for_guest = False
        if self.timer is not None:
            self.timer.cancel()

    @property
    def token(self) -> str:
        """The transfer's identity, chosen by the application."""
        return self.job.token

    def move(self, to: Host) -> None:
        """Go to another state of the table in `guest_agent/handoff/state.py`."""
        self.state = move_host(self.state, to)
        fault.reach(f"host:{to.value}")

    def close(self) -> None:
        """Close socket and file; idempotent. In repair mode the socket closes silently, otherwise as close(2) does."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class Durations:
    """How long each step took: the last 8,192 of each, seconds."""

    def __init__(self) -> None:
        self._steps: dict[str, deque[float]] = {}

    @contextmanager
    def of(self, step: str) -> Iterator[None]:
        """Measure the block as `step`."""
        begin = time.perf_counter()
        yield
        self.add(step, time.perf_counter() - begin)

    def add(self, step: str, seconds: float) -> None:
        """Record one duration."""
        self._steps.setdefault(step, deque(maxlen=8192)).append(seconds)

    def summary(self, samples: int | None = None) -> dict[str, dict[str, float]]:
        """Per step the number of samples, p50 and p99 in microseconds, of all or of the last `samples`. Raises ValueError."""
        if samples is not None and samples < 1:
            raise ValueError(f"samples must be positive, not {samples}")
        first = -samples if samples else None
        return {step: _summary(sorted(list(values)[first:])) for step, values in self._steps.items()}


def _summary(values: list[float]) -> dict[str, float]:
    last = len(values) - 1
    return {
        "samples": len(values),
        "p50_us": round(values[last // 2] * 1e6, 1),
        "p99_us": round(values[int(last * 0.99)] * 1e6, 1),
    }
