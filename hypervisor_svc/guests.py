# SPDX-License-Identifier: Apache-2.0
"""What a guest says, and what the service does about it: one method per message. The only file that ties the steps to the
channel; every refusal is counted per VM with its reason."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable
from typing import Any

from guest_agent.handoff.backend import Backend
from guest_agent.handoff.errors import GuestError, HandoffError, HostError, Reason
from guest_agent.handoff.hold import Hold
from guest_agent.handoff.presence import Presence
from guest_agent.handoff.recent import Recent
from guest_agent.handoff.state import Host
from guest_agent.handoff.wire import Established, Event, Header, Message, Violation
from hypervisor_svc.anticipate import AnticipateWords
from hypervisor_svc.ask_client import ask
from hypervisor_svc.channel import Channel
from hypervisor_svc.connection import Connection, Durations, Guest
from hypervisor_svc.domains import Machine
from hypervisor_svc.ends import REMEMBERED, Ends
from hypervisor_svc.hand_back import HandBack
from hypervisor_svc.handoff import Handoff
from hypervisor_svc.held_packets import HeldPackets
from hypervisor_svc.inject import Injector
from hypervisor_svc.look import LookWords
from hypervisor_svc.passing import Passing
from hypervisor_svc.policy import (
    Job,
    RelayJob,
    check_flow,
    read_job,
    read_relay_job,
    read_token,
)
from hypervisor_svc.redirect import Flow, Redirect
from hypervisor_svc.relay import RelayLimits, Relays, choose
from hypervisor_svc.relay_words import RelayWords
from hypervisor_svc.schedule import Schedule
from hypervisor_svc.serve import Server
from hypervisor_svc.splice_user import UserEngine

log = logging.getLogger("streamlift.guests")

MEASURE_INTERVAL = 1.0
"""Seconds over which a VM's rate is measured."""


class Limits:
    """What one VM may have: connections at once, queue bytes per snapshot, frames a second, seconds unclaimed, and seconds between
    two requests of a client."""

    def __init__(
        self,
        *,
        max_connections: int,
        max_queue_bytes: int,
        max_frames_per_second: int,
        orphan_timeout: float,
        next_request: float,
        threshold: int,
    ) -> None:
        self.max_connections, self.max_queue_bytes = max_connections, max_queue_bytes
        self.max_frames_per_second, self.orphan_timeout = max_frames_per_second, orphan_timeout
        self.next_request, self.threshold = next_request, threshold


class Guests:
    """All VMs with a channel, by UUID, and everything they have out."""

    def __init__(
        self,
        *,
        about: Header,
        backend: Backend,
        redirect: Redirect,
        keep: Hold | None,
        injector: Injector,
        quantum: int,
        limits: Limits,
        relay_limits: RelayLimits,
        relay_engine: str,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.durations = Durations()
        self._about, self._limits = about, limits
        self._held = HeldPackets(keep, injector)
        self._handoff = Handoff(backend, redirect, keep, self.durations)
        self._ends = Ends(
            HandBack(backend, redirect, keep, injector, self.durations, collect=self._held.collect),
            self._held,
            self.durations,
            stop=self._stop,
            alone=self._alone,
        )
        self.schedule = Schedule()
        self._server = Server(
            self.schedule,
            quantum=quantum,
            next_request=self._next_request,
            on_finished=self._ends.finished,
            on_gone=self._ends.client_gone,
        )
        self._user_engine = UserEngine(self.schedule)
        self._engine = choose(relay_engine, self._user_engine)
        self.relays = Relays(
            self._engine,
            self._user_engine,
            relay_limits,
            on_home=self._ends.go_home,
            on_gone=self._ends.client_gone,
            on_lagged=self._ends.lagged,
        )
        self._anticipate = AnticipateWords(serve=self._server.add, again=self._server.listen_again)
        self._words = (RelayWords(self.relays, go_home=self._ends.finished), LookWords(), self._anticipate)
        self._by_uuid: dict[str, Guest] = {}
        self._offered_flows: Recent[str, Flow] = Recent(REMEMBERED)
        self.passing = Passing(
            self._ends,
            self._held,
            injector,
            offer=self._offer,
            take=self._handoff.take,
            begin=self._begin,
            take_over=self._take_over,
            serve=self._server.add,
        )
        self._started = self._loop.time()
        self._measure()

    def _measure(self) -> None:
        for guest in self._by_uuid.values():
            guest.measure(self._loop.time())
        self._meter = self._loop.call_later(MEASURE_INTERVAL, self._measure)

    def __iter__(self) -> Any:
        return iter(self._by_uuid.values())

    # VMs come and go.

    def machine_up(self, machine: Machine) -> bool:
        """A VM with our channel runs, or has changed: connect to it, unless its channel is the one that we have (False)."""
        known = self._by_uuid.get(machine.uuid)
        if known is not None and known.machine.channel_path == machine.channel_path:
            known.machine = machine  # what is out stays out
            return False
        self.machine_down(machine.uuid)
        guest = Guest(machine)
        guest.channel = Channel(
            machine.channel_path,
            {**self._about, "threshold": self._limits.threshold},
            max_frames_per_second=self._limits.max_frames_per_second,
            on_event=lambda event: self._event(guest, event),
            on_down=lambda: self._down(guest),
        )
        self._by_uuid[machine.uuid] = guest
        guest.channel.start()
        return True

    def machine_down(self, uuid: str) -> None:
        """The VM is gone, and with it everybody who could take its connections back: they are ended."""
        guest = self._by_uuid.pop(uuid, None)
        if guest is None:
            return
        assert guest.channel is not None
        guest.channel.stop()
        guest.gone = True
        self.relays.guest_gone(guest)
        self._end_all(guest)
        self.passing.let_pass(guest)
        guest.changed()

    def pause(self, uuid: str, *, paused: bool) -> None:
        """A VM's processors stand still, or go on. Files and relays go on as well; who is finished waits to come home, however long
        that takes."""
        guest = self._by_uuid.get(uuid)
        if guest is not None:
            guest.paused = paused
            if not paused and guest.channel is not None:
                guest.channel.greet()
                self.passing.inherit(guest)

    def close(self) -> None:
        """Stop everything; what is still out is ended."""
        for uuid in list(self._by_uuid):
            self.machine_down(uuid)
        self._ends.close()
        self._server.close()
        if self._engine is not self._user_engine:
            self._engine.close()
        self._user_engine.close()
        self.schedule.close()
        self._meter.cancel()
        self._held.close()

    def hand_back_all(self, guest: Guest, reason: Reason, token: str | None = None) -> int:
        """Stop transfers at a byte boundary and send their connections home, soon; the application sends the rest itself."""
        chosen = [c for c in guest.connections.values() if c.state is Host.SERVING and token in (None, c.token)]
        for connection in chosen:
            if connection.reason is None:
                connection.reason, connection.message = reason, "the host gives the connection back"
            self._stop(connection)
            self._ends.go_home(connection)
        return len(chosen)

    # A VM that leaves. The order of its steps is in `leave.py`.

    def call_home(self, guest: Guest) -> None:
        """Everything of a VM that is leaving."""
        for relay in list(guest.relays.values()):
            self.relays.leave(relay)
        self.hand_back_all(guest, Reason.DRAINING)

    def take_again(self, guest: Guest) -> None:
        """It stays after all, or has come back."""
        guest.draining, guest.asked = False, None
        self.passing.serve_again(guest)

    def keep(self, connection: Connection) -> bool:
        """The rest of a file is sent from here, whoever was to have the connection; False if that is not to be."""
        kept = self._ends.keep(connection)
        if kept:
            self._server.add(connection)
        return kept

    def end_late(self, connection: Connection) -> None:
        """One that did not come home in time, and that nobody keeps."""
        self._ends.end_late(connection)

    def _next_request(self, connection: Connection) -> float:
        """Those that wait for one must not keep others from going out."""
        crowded = 2 * len(connection.guest.connections) > self._limits.max_connections
        return 0.0 if crowded else self._limits.next_request

    def _stop(self, connection: Connection) -> None:
        """Send nothing more; idempotent."""
        self._server.remove(connection)
        self.relays.release(connection)

    # What the channel says.

    def _event(self, guest: Guest, event: Event) -> None:
        if isinstance(event, Message):
            self._message(guest, event)
        elif isinstance(event, Established):
            before, guest.hello = guest.hello, event.hello
            same = before.get("instance") == event.hello.get("instance")
            log.info("%s: agent %s answers", guest.machine.name, event.hello.get("agent_version", "?"))
            if same:
                self._say_again(guest)
            else:
                self._another_life(guest, rebooted=before.get("boot") not in (None, event.hello.get("boot")))
            if not before:
                self._finish_inherited(guest)
            guest.changed()
        elif isinstance(event, Violation):
            self._count_refusal(guest, event.reason, event.message)

    def _message(self, guest: Guest, event: Message) -> None:
        kind = event.header["type"]
        found = (getattr(self, f"_on_{kind}", None), *(getattr(words, f"on_{kind}", None) for words in self._words))
        handler: Callable[[Guest, Header, bytes], None] | None = next(filter(None, found), None)
        try:
            if handler is None:
                raise GuestError(Reason.BAD_REQUEST, f"message type {kind!r:.40}")
            handler(guest, event.header, event.body)
        except HandoffError as error:
            self._count_refusal(guest, error.reason, str(error))
        except OSError as error:
            log.exception("%s: %s", guest.machine.name, kind)
            self._count_refusal(guest, Reason.RESTORE_FAILED, str(error))

    def _count_refusal(self, guest: Guest, reason: Reason, message: str) -> None:
        guest.refused[reason.value] += 1
        if guest.refused[reason.value] <= 10:
            log.warning("%s: %s: %s", guest.machine.name, reason.value, message)

    def _down(self, guest: Guest) -> None:
        """The channel is lost. Transfers go on; what nobody claims in time is ended."""
        guest.changed()
        self._alone(guest)

    def _alone(self, guest: Guest) -> None:
        """Soon it has to be back."""
        self._loop.call_later(self._limits.orphan_timeout, self._end_orphans, guest)

    def _end_orphans(self, guest: Guest) -> None:
        if guest.hears:
            return
        if guest.paused:
            self._alone(guest)
            return
        for connection in list(guest.connections.values()):
            if connection.finished or connection.state is Host.RETURNING:
                self._ends.end(connection)
        self.passing.let_pass(guest)

    def _another_life(self, guest: Guest, *, rebooted: bool) -> None:
        """Another life of the agent does not know for whom it opened relays. Their connections go home, to those who ask for them.
        Whether it is here it says itself, and until then it is not (agents of the first release do not say). After a reboot nobody
        is left who could ask."""
        guest.draining, guest.presence_message = False, ""
        guest.presence = Presence.RETURNING if "let_go" in guest.features else Presence.HERE
        for relay in list(guest.relays.values()):
            self.relays.close(relay)
        if rebooted:
            self._end_all(guest)

    def _finish_inherited(self, guest: Guest) -> None:
        """It has arrived: those of its last host's connections that were finished before it could hear it go home."""
        for connection in list(guest.connections.values()):
            self._finish_if_untold(connection)

    def _finish_if_untold(self, connection: Connection) -> None:
        if connection.finished and not self._server.serves(connection):
            self._ends.finished(connection)

    def _end_all(self, guest: Guest) -> None:
        """Nobody is left who could take its connections back."""
        for connection in list(guest.connections.values()):
            self._ends.recall(connection)
            self._ends.end(connection)

    def _say_again(self, guest: Guest) -> None:
        """The channel was cut: whether the guest heard that it is to leave, or that these come home, or we that they did, nobody
        knows."""
        if guest.asked is not None:
            guest.send(guest.asked)
        for connection in guest.connections.values():
            if connection.state is Host.RETURNING and connection.parting is not None:
                guest.send(*connection.parting)

    # Messages of a guest.

    def _on_hand_out(self, guest: Guest, header: Header, body: bytes) -> None:
        self._take(guest, read_token(header), lambda: read_job(header, body), len(body))

    def _on_hand_out_again(self, guest: Guest, header: Header, body: bytes) -> None:
        """It was offered to the last host as well, and that one may have told us."""
        token = read_token(header)
        self.passing.inherit_one(guest, token)
        if any(token in known for known in (guest.connections, guest.passed, self.passing.disclaimed, self._ends.over)):
            self._on_resume(guest, header, body)
        else:
            self._on_hand_out(guest, header, body)

    def _on_relay_join(self, guest: Guest, header: Header, body: bytes) -> None:
        def read() -> Job:
            job = read_relay_job(header, body)
            self.relays.check(guest, job)
            return job

        self._take(guest, read_token(header), read, len(body))

    def _take(self, guest: Guest, token: str, read: Callable[[], Job], queued: int) -> None:
        """Steps 4 to 6; whatever goes wrong before the commit is a refusal."""
        try:
            connection = self._offer(guest, read(), queued)
        except HandoffError as error:
            self._refuse(guest, token, error)
            raise
        if guest.passing:
            self.passing.park(connection)
        else:
            self._take_over(guest, connection)

    def _take_over(self, guest: Guest, connection: Connection) -> None:
        """What was offered, and checked."""
        try:
            self._handoff.take(connection)
        except HandoffError as error:
            failure = error
        except OSError as error:
            failure = HostError(Reason.RESTORE_FAILED, str(error), errno=error.errno or 0)
        else:
            self._serve(guest, connection)
            return
        self._refuse(guest, connection.token, failure)
        self._count_refusal(guest, failure.reason, str(failure))

    def _offer(self, guest: Guest, job: Job, queued: int) -> Connection:
        if job.token in guest.connections:
            raise GuestError(Reason.DUPLICATE, "a transfer with this token is under way")
        check_flow(job.snapshot, guest.machine.addresses)
        flow = Flow(client=job.snapshot.peer, server=job.snapshot.local)
        self._offered_flows[job.token] = flow
        if any(other.flow == flow for other in (*guest.connections.values(), *guest.passed.values())):
            raise GuestError(Reason.DUPLICATE, f"the host has this connection already: {flow.client}")
        leaves = isinstance(job, RelayJob) if guest.passing else guest.draining  # files are passed on, relays are not
        if leaves:
            raise HostError(Reason.DRAINING, "the VM is being drained")
        if time.monotonic() < guest.paused_until:
            raise HostError(Reason.OPERATOR, "the operator measures without the offload")
        if len(guest.connections) + len(guest.passed) >= self._limits.max_connections:
            raise HostError(Reason.TABLE_FULL, f"{self._limits.max_connections} connections of this VM are out")
        if queued > self._limits.max_queue_bytes:
            raise GuestError(Reason.QUEUE_TOO_LARGE, f"{queued} bytes are queued")
        return Connection(guest, job, flow)

    def _refuse(self, guest: Guest, token: str, error: HandoffError) -> None:
        self.passing.refused(token)
        reply = {"type": "refused", "token": token, "reason": error.reason.value, "message": str(error), "errno": error.errno}
        guest.send(reply)

    def _serve(self, guest: Guest, connection: Connection) -> None:
        """The guest is told, and then it is ours."""
        guest.counters["handed_out"] += 1
        guest.send({"type": "taken", "token": connection.token})
        self._begin(guest, connection, 0.0 if guest.presence is Presence.RETURNING else None)

    def _begin(self, guest: Guest, connection: Connection, ask_after: float | None) -> None:
        """While its VM arrived, its client may have spoken to nobody: then it is asked, after so many seconds."""
        guest.connections[connection.token] = connection
        self._held.add(connection)
        try:
            self._handoff.commit(connection)
        except HandoffError as error:
            connection.reason, connection.message = error.reason, str(error)
            self._ends.end(connection)
            self._ends.tell_failed(connection, error.errno or errno.EIO)
            return
        if isinstance(connection.job, RelayJob):
            self._relay(connection)
        else:
            self._server.add(connection)
        self._held.collect()
        if ask_after is not None:
            ask(connection, after=ask_after)

    def _relay(self, connection: Connection) -> None:
        try:
            self.relays.take(connection)
        except HandoffError as error:
            connection.reason, connection.message = error.reason, str(error)
            self._ends.finished(connection)

    def _on_standing_by(self, guest: Guest, header: Header, body: bytes) -> None:
        connection = guest.connections.get(read_token(header))
        if connection is None or connection.state is not Host.SERVING:
            return
        connection.ready = header.get("ready") is True
        if connection.waits_for_guest:
            self._ends.finished(connection)

    def _on_recall(self, guest: Guest, header: Header, body: bytes) -> None:
        """Its application has to let go of the file, and cannot be asked as long as the transfer goes on."""
        self.hand_back_all(guest, Reason.DRAINING, read_token(header))

    def _on_abort(self, guest: Guest, header: Header, body: bytes) -> None:
        connection = guest.connections.get(read_token(header))
        if connection is not None and not connection.direct:
            connection.reason, connection.message = Reason.APPLICATION_GONE, "the application is gone"
            self._ends.end(connection)
            self._ends.tell_failed(connection, errno.ECONNRESET)

    def _on_restored(self, guest: Guest, header: Header, body: bytes) -> None:
        token = read_token(header)
        if token in self.passing.disclaimed:
            del self.passing.disclaimed[token]  # it never was here
            return
        if token in self._ends.over:
            return  # said twice, after the channel was cut
        self._ends.restored(self._returning(guest, header))

    def _on_restore_failed(self, guest: Guest, header: Header, body: bytes) -> None:
        connection = self._returning(guest, header)
        connection.reason, connection.message = Reason.RESTORE_FAILED, str(header.get("message", ""))[:200]
        self._ends.recall(connection)
        self._ends.end(connection)

    def _returning(self, guest: Guest, header: Header) -> Connection:
        connection = guest.connections.get(read_token(header))
        if connection is None or connection.state is not Host.RETURNING:
            raise GuestError(Reason.UNKNOWN_TRANSFER, f"{header['type']} for a transfer that is not on its way home")
        return connection

    def _on_late(self, guest: Guest, header: Header, body: bytes) -> None:
        token = read_token(header)
        connection = guest.connections.get(token)
        flow = connection.flow if connection else self._offered_flows.get(token)
        if flow is None or flow.server.address not in guest.machine.addresses:
            raise GuestError(Reason.UNKNOWN_TRANSFER, "late packets of a transfer that never was")
        self._held.put_back(guest, flow, body)

    def _on_resume(self, guest: Guest, header: Header, body: bytes) -> None:
        """The agent lost the thread: tell it again where this transfer stands."""
        token = read_token(header)
        self.passing.inherit_one(guest, token)
        connection = guest.connections.get(token)
        if connection is None:
            self._tell_of_another(guest, token, header)
            return
        if connection.direct and header.get("frozen") is False:
            self._on_restored(guest, header, body)
            guest.send(self._ends.over[token])
            return
        guest.send({"type": "taken", "token": token})
        if connection.parting is not None:
            if header.get("standing_by") is not True:
                self._ends.recall(connection)
            guest.send(*connection.parting)
        else:
            self._finish_if_untold(connection)
            self._anticipate.no_more(connection)

    def _tell_of_another(self, guest: Guest, token: str, header: Header) -> None:
        """Of one that is not here."""
        if token in guest.passed:
            return  # the next host tells
        if token in self.passing.disclaimed:
            guest.send(*self.passing.disclaimed[token])
        elif token in self._ends.over:
            guest.send(self._ends.over[token])
        else:
            self._refuse(guest, token, self._never_had(header))

    def _never_had(self, header: Header) -> HandoffError:
        """Of a transfer that is older than this service nobody knows what became."""
        age = header.get("age")
        if isinstance(age, int | float) and 0 <= age < self._loop.time() - self._started:
            return GuestError(Reason.UNKNOWN_TRANSFER, "the host does not have this connection")
        return HostError(Reason.HOST_LOST, "the host's service was restarted meanwhile")

    def _on_presence(self, guest: Guest, header: Header, body: bytes) -> None:
        """`leave.py` waits for it; a VM that comes back by itself is as welcome as one that was called."""
        try:
            state = Presence(header.get("state"))
        except ValueError:
            raise GuestError(Reason.BAD_REQUEST, f"presence {header.get('state')!r:.40}") from None
        was_away = guest.presence is Presence.AWAY
        guest.presence, guest.presence_message = state, str(header.get("message", ""))[:500]
        guest.answers = header.get("call") == guest.call
        if guest.answers:
            guest.asked = None
        if guest.stays or (was_away and state is not Presence.AWAY):
            self.take_again(guest)
        elif state is Presence.AWAY and not guest.draining:
            guest.send({"type": "return"})  # it left in a former life, and was restored or moved here; or it has not heard
        guest.changed()
