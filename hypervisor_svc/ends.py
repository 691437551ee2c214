# SPDX-License-Identifier: Apache-2.0
"""How the host's time with a connection ends::

    finished()      it is sent, or stopped: it goes home (`hand_back.py`)
    restored()      the guest has it
    pass_on()       the VM moves: the next host is given it (`pass_on.py`)
    keep()          the VM has left: this host sends the rest, and closes
    end()           nobody can take it back: it is closed as the kernel does for a process that dies

What became of those that are over is remembered, for an agent that was restarted and asks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Callable

from guest_agent.handoff.errors import HandoffError, Reason
from guest_agent.handoff.one_by_one import OneByOne
from guest_agent.handoff.recent import Recent
from guest_agent.handoff.state import Host
from guest_agent.handoff.wire import Header
from hypervisor_svc.connection import Connection, Durations, Guest
from hypervisor_svc.hand_back import HandBack
from hypervisor_svc.held_packets import HeldPackets
from hypervisor_svc.pass_on import Row, can_be_passed, is_whole, write_row
from hypervisor_svc.policy import RelayJob

log = logging.getLogger("streamlift.guests")

RETURN_LIMIT = 30.0
"""Seconds that a frozen copy waits for the guest to restore it before the host ends the connection."""
STAND_BY_LIMIT = 0.2
"""Seconds that a finished transfer waits for the guest's place-holder; it then goes home the longer way."""
LINGER = 60.0
"""Seconds that the redirect of a connection which the host closed stays at most, while its last packets pass."""
LINGER_INTERVAL = 0.5
HOMEWARD = 8
"""Connections of relays that are sent home between two looks at everything else."""
REMEMBERED = 8192
"""Connections that are over, for an agent that was restarted and asks."""


class Ends:
    """Of all connections. `stop` sends nothing more through one; `alone`: its guest cannot hear now that it is finished."""

    def __init__(
        self,
        hand_back: HandBack,
        held: HeldPackets,
        durations: Durations,
        *,
        stop: Callable[[Connection], None],
        alone: Callable[[Guest], None],
    ) -> None:
        self._hand_back, self._held, self._durations = hand_back, held, durations
        self._stop, self._alone = stop, alone
        self._loop = asyncio.get_running_loop()
        self._homeward = OneByOne(self.finished, at_once=HOMEWARD)
        self._kept: set[Connection] = set()
        self.over: Recent[str, Header] = Recent(REMEMBERED)

    def close(self) -> None:
        """What is still kept here is ended."""
        for connection in list(self._kept):
            self.end(connection)

    # Home.

    def finished(self, connection: Connection) -> None:
        """Sent and acknowledged, or stopped: it goes home, if there is a home."""
        guest = connection.guest
        if connection.state is not Host.SERVING:
            return
        if connection.kept:
            self._close(connection)
            return
        if not guest.hears:
            self._alone(guest)
            connection.finished = True
            return
        if connection.ready is None and connection.reason is None and not connection.answered:
            self._wait_for_guest(connection)
            return
        try:
            self._hand_back.hand_back(connection)
        except (HandoffError, OSError) as error:
            log.info("%s: %s cannot go home: %s", guest.machine.name, connection.flow.client, error)
            self.client_gone(connection, error.errno or errno.ECONNRESET)
            return
        self._await_guest(connection)

    def _await_guest(self, connection: Connection) -> None:
        """It has RETURN_LIMIT to restore what was sent home."""
        if connection.timer is not None:
            connection.timer.cancel()
        connection.timer = self._loop.call_later(RETURN_LIMIT, self._never_came_home, connection)

    def go_home(self, connection: Connection) -> None:
        """Soon: a relay's end sends thousands home, and others want to be served meanwhile."""
        self._homeward.add(connection)

    def _wait_for_guest(self, connection: Connection) -> None:
        """Its place-holder is about to stand by: that takes less time than the longer way home."""
        if connection.waits_for_guest:
            return
        connection.waits_for_guest = True
        connection.timer = self._loop.call_later(STAND_BY_LIMIT, self._waited_enough, connection)

    def _waited_enough(self, connection: Connection) -> None:
        if connection.state is Host.SERVING and connection.ready is None:
            connection.ready = False
            self.finished(connection)

    def recall(self, connection: Connection) -> None:
        """Best effort: where the redirect fails, the connection is the guest's alone."""
        with contextlib.suppress(OSError, HandoffError):
            self._hand_back.recall(connection)

    def _never_came_home(self, connection: Connection) -> None:
        if connection.guest.paused:
            connection.timer = self._loop.call_later(RETURN_LIMIT, self._never_came_home, connection)
        elif connection.state is Host.RETURNING:
            log.warning("%s: %s was never taken back", connection.guest.machine.name, connection.token)
            connection.guest.refused[Reason.TIMED_OUT.value] += 1
            connection.reason = Reason.TIMED_OUT
            self.end(connection)

    def restored(self, connection: Connection) -> None:
        """The guest has it. Raises HandoffError, OSError."""
        if not connection.direct:
            self._hand_back.unredirect(connection)
        self._held.collect()  # after the last packet that can have come to our copy
        self._forget(connection)
        self.over[connection.token] = self._hand_back.release(connection)
        connection.guest.counters["handed_back"] += 1
        if connection.anticipation is None:  # of others it is the client's time
            self._durations.add("whole", self._loop.time() - connection.started)

    # To the next host.

    def pass_on(self, connection: Connection) -> Row | None:
        """What the next host is told, for one that it can go on with; any other goes home."""
        if not can_be_passed(connection):
            return None
        self._stop(connection)
        try:
            snapshot = self._hand_back.freeze(connection)
            if not is_whole(connection, snapshot):
                if connection.sent < connection.job.count:
                    connection.reason, connection.message = Reason.DRAINING, "the host gives the connection back"
                self._hand_back.send_home(connection, snapshot)
                self._await_guest(connection)
                return None
        except (HandoffError, OSError) as error:
            self.client_gone(connection, error.errno or errno.ECONNRESET)
            return None
        connection.told = 0
        connection.move(Host.PASSED)
        connection.guest.passed[connection.token] = connection.guest.connections.pop(connection.token)
        return write_row(connection, snapshot)

    def take_again(self, connection: Connection) -> bool:
        """One that was passed on: its VM has not moved. Whether it can be served on."""
        guest = connection.guest
        guest.connections[connection.token] = guest.passed.pop(connection.token)
        try:
            self._hand_back.take_again(connection)
        except (HandoffError, OSError) as error:
            self.client_gone(connection, error.errno or errno.ECONNRESET)
            return False
        guest.send({"type": "taken", "token": connection.token})
        return True

    def let_pass(self, connection: Connection) -> None:
        """Its VM is gone, and with it the connection: the frozen copy closes silently."""
        connection.guest.passed.pop(connection.token, None)
        self._hand_back.forget(connection)
        self._forget(connection)
        connection.close()
        connection.move(Host.GONE)

    # Here.

    def keep(self, connection: Connection) -> bool:
        """The rest of a file is sent from here, whoever was to have the connection; False if that is not to be."""
        if isinstance(connection.job, RelayJob) or connection.direct:
            return False
        if connection.state is Host.RETURNING:
            try:
                self._hand_back.take_again(connection)
            except (HandoffError, OSError):
                return False
        self.tell_failed(connection, errno.ECONNABORTED, Reason.KEPT, "the host that the VM left sends the rest and closes")
        connection.kept = True
        if connection.anticipation is not None:
            connection.anticipation.end()  # what its client asks next nobody wants to know here
        connection.guest.counters["kept"] += 1
        connection.guest.connections.pop(connection.token, None)
        self._kept.add(connection)
        self._homeward.remove(connection)
        if connection.timer is not None:
            connection.timer.cancel()
        return True

    def end_late(self, connection: Connection) -> None:
        """One that did not come home in time."""
        self.recall(connection)
        self.end(connection)
        self.tell_failed(connection, errno.ECONNRESET, Reason.TIMED_OUT, "the connection did not come home before the VM left")

    def client_gone(self, connection: Connection, number: int) -> None:
        """The connection is dead (reset, timed out), or beyond our help: then the kernel closes it as for a dead process."""
        self.recall(connection)
        connection.reason = Reason.PEER_GONE
        self._close(connection)
        connection.guest.counters["failed"] += 1
        self.tell_failed(connection, number)

    def lagged(self, connection: Connection) -> None:
        """It fell too far behind its relay, and is ended: its client has a hole in its stream otherwise."""
        connection.reason, connection.message = Reason.LAGGED, "the client did not keep up with the stream"
        self.end(connection)
        self.tell_failed(connection, errno.ETIMEDOUT)

    def tell_failed(self, connection: Connection, number: int, reason: Reason | None = None, message: str = "") -> None:
        """The guest hears why it will not come home; `number` is of errno(3)."""
        if connection.kept:
            return  # it was told
        failure = {
            "type": "failed",
            "token": connection.token,
            "errno": number,
            "reason": (reason or connection.reason or Reason.PEER_GONE).value,
            "message": message or connection.message or "the client is gone",
            "sent": connection.sent_before + connection.sent,
        }
        self.over[connection.token] = failure
        connection.guest.send(failure)

    def end(self, connection: Connection) -> None:
        """Nobody can take it back."""
        connection.guest.counters["ended"] += 1
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        """As the kernel does for a process that dies; the redirect goes when the last packet has passed."""
        connection.guest.lost[(connection.reason or Reason.APPLICATION_GONE).value] += 1
        self._stop(connection)
        self._forget(connection)
        with contextlib.suppress(OSError, HandoffError):
            self._hand_back.end(connection)
        connection.close()
        self._linger(connection, self._loop.time() + LINGER)

    def _linger(self, connection: Connection, until: float) -> None:
        """Keep the redirect until the kernel has closed the connection with the client."""
        if self._hand_back.is_closing(connection) and self._loop.time() < until:
            self._loop.call_later(LINGER_INTERVAL, self._linger, connection, until)
        else:
            self._hand_back.forget(connection)

    def _forget(self, connection: Connection) -> None:
        connection.guest.connections.pop(connection.token, None)
        connection.guest.changed()
        self._kept.discard(connection)
        self._held.remove(connection)
        if connection.timer is not None:
            connection.timer.cancel()
