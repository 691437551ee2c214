# SPDX-License-Identifier: Apache-2.0
"""Step 6b: relay. One source, many sinks; the connections come by the same handoff as those of files, and go home the same way.

A relay belongs to the VM that opened it, and is known by the token that its application chose. Its source is a connection that
the guest hands over (an encoder that connected to it), a file in the share that grows, a ring there (`handoff/ring_file.py`), or a
UDP port of the host's. Its sinks are connections that the guest hands over one by one, after it has said to each client whatever it
has to say, and UDP destinations. The bytes are an engine's work (`splice_user.py`, `splice_omss.py`)::

    relay_open ──▶ open()          relay_join (source) ──▶ take()        relay_join (sink) ──▶ take()
    relay_close ─▶ close()         the source ends: the sinks get the rest and go home
    hand_back ◀── release()        a client is gone: `failed`, as with files

While the guest's agent is away a relay goes on. Its next life calls the connections home, for nobody there knows any more whose
relay it was, and so the relay ends; when the VM is gone it ends too."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from guest_agent.handoff import kernel
from guest_agent.handoff.errors import GuestError, HostError, Reason
from guest_agent.handoff.ring_file import RingReader
from hypervisor_svc.connection import Connection, Guest
from hypervisor_svc.policy import RelayJob, RelayPlan, UdpJob, open_file
from hypervisor_svc.splice import MAX_ENTRY_BYTES, Counts, Engine, FileSource, Left, Parting, RingSource, Session, Source
from hypervisor_svc.splice_omss import OmssEngine
from hypervisor_svc.splice_user import UserEngine

log = logging.getLogger("streamlift.relay")

_GONE = {Left.PEER_GONE: Reason.PEER_GONE, Left.LAGGED: Reason.LAGGED}


def choose(wanted: str, user: UserEngine) -> UserEngine | OmssEngine:
    """The engine that the configuration asks for; "auto": the kernel module, if it is loaded. Raises OSError if it must be, and is
    not."""
    if wanted == "user":
        user.why = "the configuration asks for it"
        return user
    try:
        return OmssEngine()
    except OSError as error:
        if wanted == "omss":
            raise
        user.why = f"{error.strerror}; 'streamlift module build', then 'streamlift module load'"
        return user


@dataclass(frozen=True)
class RelayLimits:
    """What one VM may have: relays, and bytes that their rings may keep. `udp_ports`: of the host's, for sources."""

    max_relays: int
    max_ring_bytes: int
    udp_ports: tuple[int, int] | None


@dataclass(eq=False, repr=False)
class Relay:
    """One relay of a VM. `port`: a source that is a UDP port; `udp`: sinks that are no connections, by token."""

    guest: Guest
    plan: RelayPlan
    engine: Engine | None = None
    session: Session | None = None
    source: Connection | None = None
    port: socket.socket | None = None
    sinks: dict[int, Connection] = field(default_factory=dict)
    udp: dict[str, tuple[int, socket.socket]] = field(default_factory=dict)
    ended: str = ""
    before: tuple[float, Counts, int] | None = None
    opened: float = field(default_factory=time.monotonic)

    @property
    def token(self) -> str:
        """Its name."""
        return self.plan.token

    @property
    def ring_bytes(self) -> int:
        """The most that its ring may keep: a file's bytes are in the page cache, and a datagram has the size that it has."""
        options = self.plan.options
        largest = {"file": 0, "udp": MAX_ENTRY_BYTES}.get(self.plan.source, options.entry_bytes)
        return options.ring_entries * largest


class Relays:
    """All relays: those of files, which are sent from the page cache, by the engine `files`, others by `engine`.
    `on_home(connection)`: it left the relay and can go home; `on_gone(connection, errno)`: its client is dead;
    `on_lagged(connection)`: it fell too far behind, and its application wanted that to be the end."""

    def __init__(
        self,
        engine: Engine,
        files: Engine,
        limits: RelayLimits,
        *,
        on_home: Callable[[Connection], None],
        on_gone: Callable[[Connection, int], None],
        on_lagged: Callable[[Connection], None],
    ) -> None:
        self._engine, self._files, self._limits = engine, files, limits
        self._on_home, self._on_gone, self._on_lagged = on_home, on_gone, on_lagged
        self._loop = asyncio.get_running_loop()

    @property
    def engine(self) -> dict[str, str]:
        """Which engine, and why."""
        return {"name": self._engine.name, "why": self._engine.why}

    # Relays open and close.

    def open(self, guest: Guest, plan: RelayPlan) -> None:
        """Raises HandoffError."""
        if plan.token in guest.relays:
            raise GuestError(Reason.DUPLICATE, "a relay with this token is open")
        relay = Relay(guest, plan)
        self._check_limits(guest, relay)
        guest.relays[plan.token] = relay
        try:
            if plan.source == "file":
                self._begin(relay, FileSource(self._open_file(guest, plan), plan.offset))
            elif plan.source == "ring":
                self._begin(relay, RingSource(self._open_ring(guest, plan), plan.offset))
            elif plan.source == "udp":
                relay.port = self._bind(plan.port)
                self._begin(relay, relay.port)
        except BaseException:
            self._forget(relay)
            raise
        guest.counters["relays"] += 1

    def _check_limits(self, guest: Guest, relay: Relay) -> None:
        if len(guest.relays) >= self._limits.max_relays:
            raise HostError(Reason.TABLE_FULL, f"{self._limits.max_relays} relays of this VM are open")
        kept = sum(other.ring_bytes for other in guest.relays.values()) + relay.ring_bytes
        if kept > self._limits.max_ring_bytes:
            raise HostError(Reason.TABLE_FULL, f"the rings of this VM's relays may keep {self._limits.max_ring_bytes} bytes")

    def _open_file(self, guest: Guest, plan: RelayPlan) -> int:
        if guest.machine.share is None:
            raise HostError(Reason.NOT_ON_SHARE, "this VM has no share on the host")
        try:
            return open_file(guest.machine.share, plan)
        except OSError as error:
            raise HostError(Reason.NO_SUCH_FILE, f"the share: {error.strerror}", errno=error.errno or 0) from None

    def _open_ring(self, guest: Guest, plan: RelayPlan) -> int:
        file = self._open_file(guest, plan)
        try:
            head = RingReader().header(file).head
            if plan.offset > head:
                raise GuestError(Reason.FILE_CHANGED, f"the ring {plan.path!r} ends at {head}, before {plan.offset}")
        except BaseException as error:
            os.close(file)
            if isinstance(error, OSError):
                raise GuestError(Reason.BAD_REQUEST, f"{plan.path!r}: {error.strerror}", errno=error.errno or 0) from None
            raise
        return file

    def _bind(self, port: int) -> socket.socket:
        ports = self._limits.udp_ports
        if ports is None or not ports[0] <= port <= ports[1]:
            allowed = f"{ports[0]} to {ports[1]}" if ports else "none; see relay.udp_ports in the service's configuration"
            raise HostError(Reason.FOREIGN_ADDRESS, f"UDP port {port} is not for VMs (allowed: {allowed})")
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        try:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(("::", port))
        except OSError as error:
            sock.close()
            raise HostError(Reason.RESTORE_FAILED, f"UDP port {port}: {error.strerror}", errno=error.errno or 0) from None
        return sock

    def _begin(self, relay: Relay, source: Source) -> None:
        for engine in (self._files,) if isinstance(source, FileSource) else (self._engine, self._files):
            try:
                relay.session = engine.begin(
                    source,
                    relay.plan.options,
                    owner=relay.guest,
                    level=relay.guest.level,
                    on_end=partial(self._source_ended, relay),
                )
                relay.engine = engine
                return
            except OSError as error:
                failure = error
                log.warning("%s: engine %s: %s", relay.guest.machine.name, engine.name, error)
        raise HostError(Reason.RESTORE_FAILED, f"the source: {failure.strerror}", errno=failure.errno or 0)

    def close(self, relay: Relay) -> None:
        """Its connections go home where they stand."""
        for connection in list(relay.sinks.values()):
            self.release(connection)
            self._on_home(connection)
        source = relay.source
        self._forget(relay)
        if source is not None:
            self._on_home(source)

    def leave(self, relay: Relay) -> None:
        """The same for a VM that leaves this host: the guest is told where everybody stands, to go on from there."""
        if relay.session is None:
            self.close(relay)
            return
        relay.session.halt()
        for token, (number, sock) in list(relay.udp.items()):
            self._leave_udp(relay, token, number, sock)
        connections = list(relay.sinks.values())
        for connection in connections:
            self.release(connection)
        if not relay.ended:
            position, rest = relay.session.standing()
            relay.guest.send({"type": "relay_left", "relay": relay.token, "cursor": position, "rest": rest.hex()})
        if relay.source is not None:
            connections.append(relay.source)
        self._forget(relay)
        for connection in connections:
            connection.reason, connection.message = Reason.DRAINING, "the VM leaves its host"
            self._on_home(connection)

    def _leave_udp(self, relay: Relay, token: str, number: int, sock: socket.socket) -> None:
        assert relay.session is not None
        del relay.udp[token]
        with contextlib.suppress(KeyError):
            parting = relay.session.remove_sink(number)
            said = {"type": "relay_udp_left", "relay": relay.token, "token": token, "cursor": parting.cursor}
            relay.guest.send({**said, "reason": Reason.DRAINING.value, "message": "the VM leaves its host"})
        sock.close()

    def guest_gone(self, guest: Guest) -> None:
        """The VM is gone; its connections are ended by whoever ends all of them."""
        for relay in list(guest.relays.values()):
            self._forget(relay)

    def _forget(self, relay: Relay) -> None:
        if relay.guest.relays.get(relay.token) is relay:
            del relay.guest.relays[relay.token]
        if relay.session is not None:
            relay.session.close()
        for _, sock in relay.udp.values():
            sock.close()
        if relay.port is not None:
            relay.port.close()
        for connection in [*relay.sinks.values(), *([relay.source] if relay.source else [])]:
            connection.relay = None
        relay.sinks.clear()
        relay.udp.clear()
        relay.source = relay.session = relay.port = None

    # Connections come and go.

    def check(self, guest: Guest, job: RelayJob | UdpJob) -> Relay:
        """Before a connection is taken: whether its relay wants it. Raises HandoffError."""
        relay = guest.relays.get(job.relay)
        if relay is None:
            raise GuestError(Reason.UNKNOWN_RELAY, "the host has no such relay")
        if relay.ended:
            raise GuestError(Reason.RELAY_ENDED, f"the relay has ended: {relay.ended}")
        if isinstance(job, RelayJob) and job.role == "source":
            if relay.plan.source != "connection" or relay.source is not None:
                raise GuestError(Reason.DUPLICATE, "the relay has its source")
        elif relay.session is None:
            raise GuestError(Reason.UNKNOWN_RELAY, "the relay has no source yet")
        return relay

    def take(self, connection: Connection) -> None:
        """A connection that is the host's now. Raises HandoffError if the relay has ended meanwhile."""
        job = connection.job
        assert isinstance(job, RelayJob) and connection.sock is not None
        relay = self.check(connection.guest, job)
        if job.role == "source":
            self._begin(relay, connection.sock)
            relay.source, connection.relay = connection, relay
            return
        assert relay.session is not None
        try:
            connection.sink = relay.session.add_sink(connection.sock, job.options, partial(self._left, relay))
        except (ValueError, OverflowError) as error:
            raise _not_a_sink(error) from None
        relay.sinks[connection.sink], connection.relay = connection, relay

    def release(self, connection: Connection) -> None:
        """Out of its relay, at an entry's end; idempotent. What it got is `Connection.sent`. A source leaves its relay ended."""
        relay, connection.relay = connection.relay, None
        if relay is None:
            return
        if relay.source is connection:
            relay.source = None
            if relay.session is not None and not relay.ended:
                relay.session.end("its source went home")
            return
        if relay.sinks.pop(connection.sink, None) is not None and relay.session is not None:
            with contextlib.suppress(KeyError):
                _note(connection, relay.session.remove_sink(connection.sink))
            self._forget_if_over(relay)

    def add_udp(self, guest: Guest, job: UdpJob) -> None:
        """Datagrams leave with the VM's own address. Raises HandoffError."""
        relay = self.check(guest, job)
        assert relay.session is not None
        if job.local.address not in guest.machine.addresses:
            raise GuestError(Reason.FOREIGN_ADDRESS, f"{job.local.address} does not belong to this VM")
        if job.token in relay.udp:
            raise GuestError(Reason.DUPLICATE, "a sink with this token is there")
        try:
            sock = _as_guest(job)
        except OSError as error:
            raise HostError(Reason.RESTORE_FAILED, f"{job.local} to {job.peer}: {error.strerror}", errno=error.errno or 0) from None
        try:
            number = relay.session.add_sink(sock, job.options, partial(self._udp_left, relay, job.token))
        except (ValueError, OverflowError) as error:
            sock.close()
            raise _not_a_sink(error) from None
        relay.udp[job.token] = number, sock

    def remove_udp(self, relay: Relay, token: str) -> None:
        """Raises HandoffError."""
        found = relay.udp.pop(token, None)
        if found is None:
            raise GuestError(Reason.UNKNOWN_TRANSFER, "the relay has no such sink")
        number, sock = found
        if relay.session is not None:
            with contextlib.suppress(KeyError):
                relay.session.remove_sink(number)
        sock.close()

    # What the engine says.

    def _left(self, relay: Relay, sink: int, why: Left, number: int, parting: Parting) -> None:
        connection = relay.sinks.pop(sink, None)
        if connection is None:
            return
        connection.relay = None
        _note(connection, parting)
        self._forget_if_over(relay)
        if why is Left.SOURCE_ENDED:
            self._on_home(connection)
        elif why is Left.LAGGED:
            self._on_lagged(connection)
        else:
            self._on_gone(connection, number)

    def _udp_left(self, relay: Relay, token: str, sink: int, why: Left, number: int, parting: Parting) -> None:
        found = relay.udp.pop(token, None)
        if found is None:
            return
        found[1].close()
        self._forget_if_over(relay)
        reason = _GONE.get(why, Reason.RELAY_ENDED)
        message = f"{why.value}: {os.strerror(number)}" if number else why.value
        said = {"type": "relay_udp_left", "relay": relay.token, "token": token}
        relay.guest.send({**said, "cursor": None, "reason": reason.value, "message": message})

    def _source_ended(self, relay: Relay, why: str) -> None:
        if relay.ended:
            return
        relay.ended = why
        log.info("%s: relay %s: %s", relay.guest.machine.name, relay.token[:8], why)
        relay.guest.send({"type": "relay_ended", "relay": relay.token, "message": why})
        source = relay.source
        if source is not None:
            source.relay = relay.source = None
            self._on_home(source)
        self._forget_if_over(relay)

    def _forget_if_over(self, relay: Relay) -> None:
        """Its source has ended, and nobody waits for the rest."""
        if relay.ended and not relay.sinks and not relay.udp:
            self._loop.call_soon(self._forget, relay)  # not from within the session

    # What is told.

    def rows(self, guests: Iterator[Guest]) -> list[dict[str, Any]]:
        """Every relay, for `streamlift relays`."""
        return [self.row(relay) for guest in guests for relay in guest.relays.values()]

    def row(self, relay: Relay, *, sinks: bool = True) -> dict[str, Any]:
        """One relay: bytes and entries since it began, rates since it was last asked."""
        row: dict[str, Any] = {
            "machine": relay.guest.machine.name,
            "relay": relay.token,
            "source": relay.plan.path or relay.plan.source,
            "class": relay.guest.machine.priority,
            "engine": relay.engine.name if relay.engine else None,
            "why": relay.engine.why if relay.engine else "it has no source yet",
            "budget_ms": relay.plan.options.budget_ms,
            "ended": relay.ended,
            "age_seconds": round(time.monotonic() - relay.opened, 1),
        }
        if relay.session is None:
            return {**row, "sinks": []}
        status = relay.session.status()
        row |= {"head": status.head, "tail": status.tail, "bytes_in": status.bytes_in, "source_dropped": status.source_dropped}
        row |= {"sink_count": status.sinks, "out": asdict(status.counts), **_rates(relay, status.counts, status.bytes_in)}
        if sinks:
            row["sinks"] = [_sink_row(relay, asdict(one)) for one in relay.session.sinks()]
        return row


def _not_a_sink(error: ValueError | OverflowError) -> GuestError:
    return GuestError(Reason.TABLE_FULL if isinstance(error, OverflowError) else Reason.BAD_REQUEST, str(error))


def _note(connection: Connection, parting: Parting) -> None:
    connection.cursor, connection.sent = parting.cursor, parting.counts.bytes
    connection.guest.bytes_sent += parting.counts.bytes


def _sink_row(relay: Relay, sink: dict[str, Any]) -> dict[str, Any]:
    connection = relay.sinks.get(sink["sink"])
    client = str(connection.flow.client) if connection else "UDP"
    return {**sink, "state": sink["state"].value, "client": client, "token": connection.token if connection else None}


def _rates(relay: Relay, counts: Counts, came: int) -> dict[str, int]:
    now = time.monotonic()
    then, before, bytes_in = relay.before or (relay.opened, Counts(), 0)
    relay.before = now, counts, came
    seconds = max(now - then, 1e-3)
    return {
        "in_per_second": round((came - bytes_in) / seconds),
        "out_per_second": round((counts.bytes - before.bytes) / seconds),
        "lost_per_second": round((counts.lost - before.lost) / seconds),
    }


def _as_guest(job: UdpJob) -> socket.socket:
    """A socket that sends from the VM's address, which is not ours (IP_TRANSPARENT, ip(7))."""
    six = ":" in job.local.address
    sock = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        option = (socket.IPPROTO_IPV6, kernel.IPV6_TRANSPARENT) if six else (socket.IPPROTO_IP, kernel.IP_TRANSPARENT)
        sock.setsockopt(*option, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(tuple(job.local))
        sock.connect(tuple(job.peer))
    except BaseException:
        sock.close()
        raise
    return sock
