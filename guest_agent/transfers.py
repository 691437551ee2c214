# SPDX-License-Identifier: Apache-2.0
"""The transfers of this guest that are out at the host, and what each message of the host does to them."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from guest_agent import carry, hand_out, take_back
from guest_agent.hand_out import Outcome, Send, Transfer
from guest_agent.handoff import kernel
from guest_agent.handoff.anticipated import Anticipated, write_anticipated
from guest_agent.handoff.backend import Backend
from guest_agent.handoff.errors import GuestError, HandoffError, NotMovable, Reason
from guest_agent.handoff.freeze import is_frozen
from guest_agent.handoff.hold import Hold
from guest_agent.handoff.one_by_one import OneByOne
from guest_agent.handoff.recent import Recent
from guest_agent.handoff.segment import is_intact, is_stale
from guest_agent.handoff.state import Guest, move_guest
from guest_agent.handoff.wire import Header
from guest_agent.reset import provoke

log = logging.getLogger("streamlift.agent")

DOUBT_LIMIT = 12.0
"""Seconds that a transfer waits for a lost host: longer than the host keeps what nobody claims (`orphan_timeout`)."""
OFFER_LIMIT = 5.0
"""Seconds until an unanswered offer is asked for again."""
ASK_AFTER = 1.0
"""Seconds after the arrival at another host until it is asked for what was passed to it."""
_REMEMBERED = 8192
"""How many transfers that came home are remembered, for a host that did not hear of it."""


class Transfers:
    """All transfers by token. `send` is the channel's; it raises ConnectionError while the host is away. `moves`: what comes home
    now goes on to another host; `is_leaving`: another host that answers may be the next."""

    def __init__(
        self,
        *,
        backend: Backend,
        keep: Hold | None,
        send: Send,
        is_up: Callable[[], bool],
        is_here: Callable[[], bool],
        moves: Callable[[], bool],
        is_leaving: Callable[[], bool],
    ) -> None:
        self._backend, self._keep, self._send = backend, keep, send
        self._is_up, self._is_here, self._moves, self._is_leaving = is_up, is_here, moves, is_leaving
        self._home = asyncio.Event()
        self._home.set()
        self._by_token: dict[str, Transfer] = {}
        self._by_cookie: dict[int, Transfer] = {}
        self._carried: dict[str, Transfer] = {}
        # Who wants to go out does not wait for those that are.
        self._to_stand_by = OneByOne(self._stand_by)
        self._to_ask = OneByOne(self._ask, after=ASK_AFTER)
        self._came_home: Recent[str, None] = Recent(_REMEMBERED)
        self._host_instance = ""
        self._doubt: asyncio.TimerHandle | None = None
        self.counters: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()
        if keep is not None:
            self._loop.add_reader(keep, self.collect_held)

    def __len__(self) -> int:
        return len(self._by_token)

    async def all_home(self) -> None:
        """Until nothing is out."""
        await self._home.wait()

    # From applications.

    def begin(self, transfer: Transfer) -> None:
        """Hand one connection out; the reply comes later. Whatever goes wrong is a local transfer."""
        try:
            if transfer.token in self._by_token:
                raise GuestError(Reason.DUPLICATE, "a transfer with this token is under way")
            if not self._is_up():
                raise NotMovable(Reason.HOST_AWAY, "the host's service does not answer")
            if not self._is_here():
                raise NotMovable(Reason.DRAINING, "this VM is leaving its host")
            hand_out.begin(transfer, self._backend, self._keep, self._send)
        except HandoffError as error:
            self._finish(transfer, Outcome("local", 0, error.reason, str(error)))
        except OSError as error:
            self._finish(transfer, Outcome("local", 0, Reason.NOT_ESTABLISHED, str(error), error.errno or 0))
        else:
            self._offered(transfer)

    def _offered(self, transfer: Transfer) -> None:
        self._add(transfer)
        self._by_cookie[transfer.cookie] = transfer
        self.counters["handed_out"] += 1
        self._set_timer(transfer, OFFER_LIMIT, self._ask_again)

    def reclaim(self, transfer: Transfer, *, age: float) -> None:
        """An application comes back with the socket of a transfer that another life of this agent began, `age` seconds ago."""
        transfer.state, transfer.begun = Guest.OFFERED, time.monotonic() - age
        self._add(transfer)
        self.counters["reclaimed"] += 1
        if self._is_up():
            self._resume(transfer)
        else:
            self._start_doubt()

    def call_home(self, token: str) -> None:
        """An application wants the socket of a relay back."""
        if token in self._by_token and self._is_up():
            self._send({"type": "relay_remove", "token": token}, b"")

    def recall(self, token: str) -> None:
        """The file of a transfer is wanted back."""
        if token in self._by_token and self._is_up():
            self._send({"type": "recall", "token": token}, b"")

    def anticipate(
        self, token: str, anticipated: Sequence[Anticipated], *, first: int, more: bool, everything: bool
    ) -> None:
        """Its application says what the client may ask next, from number `first` on, or later: nothing more. The host hears it
        before our place-holder stands by: then it may send the connection home."""
        transfer = self._by_token.get(token)
        if transfer is None:
            return
        if self._is_up() and (anticipated or not transfer.to_be_told):
            told = json.dumps(write_anticipated(anticipated)).encode()
            words = {"type": "anticipate", "token": token, "first": first, "more": more, "everything": everything}
            self._send(words, told)
        was_awaited, transfer.to_be_told = transfer.to_be_told, False
        if was_awaited and transfer.state is Guest.OUT:
            self._to_stand_by.add(transfer)

    def application_gone(self, transfer: Transfer) -> None:
        """The process died or closed: the connection ends as the kernel would end it, at its present owner."""
        transfer.application_gone = True
        if transfer.token in self._carried:
            self._put_down(transfer)
        elif transfer.token in self._by_token and self._is_up():
            self._send({"type": "abort", "token": transfer.token}, b"")

    # From the channel.

    def host_up(self, hello: Header) -> None:
        """The host's service answers; `instance` tells whether it is the one that took our sockets."""
        instance = str(hello.get("instance", ""))
        same = instance == self._host_instance
        self._host_instance = instance
        if self._doubt:
            self._doubt.cancel()
            self._doubt = None
        for transfer in list(self._by_token.values()):
            if same or transfer.snapshot is None:
                self._resume(transfer)
            elif self._is_leaving() and transfer.any_host and transfer.state in (Guest.OFFERED, Guest.OUT):
                self._meet(transfer)
            else:
                self._host_lost(transfer)

    def _meet(self, transfer: Transfer) -> None:
        """This may be the host that the VM has moved to, and have it from the last (`hypervisor_svc/passing.py`). What that one was
        offered, and did not answer, is offered to this one."""
        if transfer.state is Guest.OUT:
            self._to_ask.add(transfer)  # if it is there it is served meanwhile, and may even come home
            return
        try:
            hand_out.offer(transfer, self._send, type="hand_out_again")
        except HandoffError as error:
            self._undo(transfer, error.reason, str(error))

    def _ask(self, transfer: Transfer) -> None:
        if transfer.token in self._by_token and self._is_up():
            self._resume(transfer)

    def host_down(self) -> None:
        """The channel ended: transfers wait for it to come back, within DOUBT_LIMIT."""
        self._start_doubt()

    def take_up(self) -> None:
        """The VM has arrived, or stays where it was: what it carried goes out again, if somebody is there."""
        if self._is_up():
            for transfer in list(self._carried.values()):
                self._hand_on(transfer)

    def message(self, header: Header, body: bytes) -> None:
        """Dispatch one message. Unknown types and tokens are ignored and counted: a newer host may say more."""
        token = header.get("token", "")
        transfer = self._by_token.get(token)
        if header["type"] == "hand_back" and token in self._came_home:
            self._send({"type": "restored", "token": token}, b"")
            return
        handler: Callable[[Transfer, Header, bytes], None] | None = getattr(self, f"_on_{header['type']}", None)
        if transfer is None or handler is None:
            self.counters["ignored_messages"] += 1
            return
        handler(transfer, header, body)

    def _on_taken(self, transfer: Transfer, header: Header, body: bytes) -> None:
        if transfer.application_gone:
            self._send({"type": "abort", "token": transfer.token}, b"")
        if transfer.state is not Guest.OFFERED:
            return  # the next host has it, or the last one again
        transfer.move(Guest.OUT)
        if transfer.timer is not None:
            transfer.timer.cancel()
        if not transfer.to_be_told:
            self._to_stand_by.add(transfer)
        transfer.taken()
        self.collect_held()
        self._send_held(transfer)

    def _stand_by(self, transfer: Transfer) -> None:
        """Tell the host whether the connection may come home directly."""
        if transfer.state is not Guest.OUT or not self._is_up():
            return
        if transfer.snapshot is not None:
            try:
                hand_out.stand_by(transfer, self._backend)
            except (HandoffError, OSError) as error:
                log.warning("%s: the place-holder is not rebuilt: %s", transfer.token, error)
        self._send({"type": "standing_by", "token": transfer.token, "ready": transfer.standing_by}, b"")

    def _on_refused(self, transfer: Transfer, header: Header, body: bytes) -> None:
        reason = _reason(header)
        if transfer.state is not Guest.OFFERED or (transfer.snapshot is None and reason is Reason.HOST_LOST):
            self._host_lost(transfer)
            return
        self._undo(transfer, reason, str(header.get("message", "")))

    def _on_hand_back(self, transfer: Transfer, header: Header, body: bytes) -> None:
        if transfer.state in (Guest.OUT, Guest.OFFERED):
            self.collect_held()
            try:
                take_back.restore(transfer, self._backend, header, body)
            except (HandoffError, OSError) as error:
                self._not_restored(transfer, error)
                return
            transfer.outcome = _returned(header)
        if transfer.state is not Guest.RETURNING:
            return
        if header.get("direct") is True:
            self._come_home(transfer)
        self._send({"type": "restored", "token": transfer.token}, b"")

    def _on_home(self, transfer: Transfer, header: Header, body: bytes) -> None:
        """The host has let go before: our last word, or the host's, was lost."""
        if transfer.state is Guest.RETURNING:
            self._come_home(transfer)
        elif is_frozen(transfer.sock) and header.get("unsent") is not False:
            message = "the agent was restarted while it took the connection back"
            self._bury(transfer, Outcome("failed", _sent(header), Reason.RESTORE_FAILED, message, errno.ECONNRESET))
        else:
            if is_frozen(transfer.sock):
                self._backend.thaw(transfer.sock)
            transfer.move(Guest.HOME)
            self._forget(transfer)
            self._finish(transfer, _returned(header))

    def _not_restored(self, transfer: Transfer, error: HandoffError | OSError) -> None:
        log.warning("%s could not come home: %s", transfer.token, error)
        self._send({"type": "restore_failed", "token": transfer.token, "message": str(error)}, b"")
        self._bury(transfer, Outcome("failed", 0, Reason.RESTORE_FAILED, str(error), errno.ECONNRESET))

    def _on_released(self, transfer: Transfer, header: Header, body: bytes) -> None:
        if transfer.state is not Guest.RETURNING:
            return
        if self._moves() and carry.can_be_carried(transfer):
            self._carry(transfer)
        else:
            self._come_home(transfer)

    def _on_failed(self, transfer: Transfer, header: Header, body: bytes) -> None:
        number = header.get("errno")
        failure = number if isinstance(number, int) and number > 0 else errno.ECONNRESET
        self._bury(transfer, Outcome("failed", _sent(header), _reason(header), str(header.get("message", "")), failure))

    # What happens to a transfer.

    def _come_home(self, transfer: Transfer) -> None:
        """The host let go."""
        if self._thaw(transfer):
            self._remember_home(transfer)
            self._give_back(transfer)

    def _thaw(self, transfer: Transfer) -> bool:
        """Whether it lives on here."""
        try:
            take_back.thaw(transfer, self._backend)
        except (HandoffError, OSError) as error:
            self._bury(transfer, Outcome("failed", 0, Reason.RESTORE_FAILED, str(error), errno.ECONNRESET))
            return False
        return True

    def _give_back(self, transfer: Transfer) -> None:
        """It is thawed. What came while it was frozen is sent after it; then it is the application's."""
        self.collect_held()
        self._forget(transfer)
        self._send_held(transfer)
        if transfer.closed:
            take_back.await_fin(self._loop, transfer.sock, lambda: self._finish(transfer, transfer.outcome))
        else:
            self._finish(transfer, transfer.outcome)

    def _remember_home(self, transfer: Transfer) -> None:
        self.counters["handed_back"] += 1
        self._came_home[transfer.token] = None

    def _carry(self, transfer: Transfer) -> None:
        """Home, and on its way to the next host (`carry.py`)."""
        self._forget(transfer)
        self._remember_home(transfer)
        carry.pack(transfer)
        self.counters["carried"] += 1
        self._carried[transfer.token] = self._by_cookie[transfer.cookie] = transfer
        transfer.carried()
        self._set_timer(transfer, carry.CARRY_LIMIT, self._put_down)

    def _hand_on(self, transfer: Transfer) -> None:
        try:
            carry.hand_on(transfer, self._send)
        except (HandoffError, OSError) as error:
            log.warning("%s cannot be handed on: %s", transfer.token, error)
            self._put_down(transfer)
        else:
            del self._carried[transfer.token]
            self._offered(transfer)

    def _put_down(self, transfer: Transfer) -> None:
        """The application goes on with it. That it came home was said when it was packed."""
        del self._carried[transfer.token]
        if self._thaw(transfer):
            self._give_back(transfer)

    def _undo(self, transfer: Transfer, reason: Reason, message: str) -> None:
        self.collect_held()
        hand_out.undo(transfer, self._backend)
        self.collect_held()
        self._forget(transfer)
        self._send_held(transfer)
        self._finish(transfer, Outcome("local", 0, reason, message))

    def _bury(self, transfer: Transfer, outcome: Outcome) -> None:
        """The connection is over: our place-holder closes silently, with nothing left to send."""
        transfer.state = move_guest(transfer.state, Guest.DEAD)
        self._forget(transfer)
        try:
            kernel.disconnect(transfer.sock.fileno())
            self._backend.thaw(transfer.sock)
        except OSError as error:
            log.warning("%s: the place-holder did not close: %s", transfer.token, error)
        self._finish(transfer, outcome)

    def _host_lost(self, transfer: Transfer) -> None:
        """The service that had the socket is dead, and with it whatever it had. An offer that it did not answer it did not
        take, for it answers before it sends; what is restored here is ours; anything else is lost."""
        if transfer.state is Guest.RETURNING:
            self._come_home(transfer)
        elif transfer.state is Guest.OFFERED and transfer.snapshot is not None:
            self._undo(transfer, Reason.HOST_LOST, "the host's service went away before it took the connection")
        else:
            self._lose(transfer, "the host's service went away with the connection")
            self._tell_client(transfer)

    def _tell_client(self, transfer: Transfer) -> None:
        """The service's redirects are gone as well: what the client answers comes to us."""
        if transfer.snapshot is not None:
            try:
                provoke(transfer.snapshot, time.monotonic() - transfer.begun)
            except OSError as error:
                log.warning("%s: the client is not told: %s", transfer.token, error)

    def _lose(self, transfer: Transfer, message: str) -> None:
        self._bury(transfer, Outcome("failed", 0, Reason.HOST_LOST, message, errno.ECONNRESET))

    def _resume(self, transfer: Transfer) -> None:
        told = {
            "type": "resume",
            "token": transfer.token,
            "standing_by": transfer.standing_by,
            "frozen": is_frozen(transfer.sock),
            "age": time.monotonic() - transfer.begun,
        }
        self._send(told, b"")

    def _ask_again(self, transfer: Transfer) -> None:
        if transfer.state is Guest.OFFERED and transfer.token in self._by_token:
            if self._is_up():
                self._resume(transfer)
            self._set_timer(transfer, OFFER_LIMIT, self._ask_again)

    def _set_timer(self, transfer: Transfer, delay: float, action: Callable[[Transfer], None]) -> None:
        if transfer.timer is not None:
            transfer.timer.cancel()
        transfer.timer = self._loop.call_later(delay, action, transfer)

    def _start_doubt(self) -> None:
        if self._doubt is None and self._by_token:
            self._doubt = self._loop.call_later(DOUBT_LIMIT, self._end_doubt)

    def _end_doubt(self) -> None:
        """Nothing was heard for too long. The host may be alive and the owner, so nothing thaws: two owners are worse than
        none."""
        self._doubt = None
        for transfer in list(self._by_token.values()):
            self._lose(transfer, f"the host's service did not answer for {DOUBT_LIMIT:g} s")

    def _add(self, transfer: Transfer) -> None:
        self._by_token[transfer.token] = transfer
        self._home.clear()

    def _forget(self, transfer: Transfer) -> None:
        self._by_token.pop(transfer.token, None)
        if not self._by_token:
            self._home.set()
        self._by_cookie.pop(transfer.cookie, None)
        if transfer.timer is not None:
            transfer.timer.cancel()

    def _finish(self, transfer: Transfer, outcome: Outcome) -> None:
        if outcome.outcome != "offloaded":
            self.counters[f"{outcome.outcome}_{outcome.reason.value if outcome.reason else 'unknown'}"] += 1
        transfer.sock.close()
        outcome.sent += 0 if outcome.answered else transfer.sent_before
        if not transfer.application_gone:
            transfer.reply(outcome)

    # Packets that frozen sockets did not take.

    def collect_held(self) -> None:
        """Sort what the hold kept by transfer; what belongs to a connection that is out goes after it at once."""
        if self._keep is None:
            return
        for cookie, segment in self._keep.drain():
            transfer = self._by_cookie.get(cookie)
            if transfer is None:
                continue
            if transfer.snapshot and not is_intact(segment, transfer.snapshot.peer.address, transfer.snapshot.local.address):
                self.counters["damaged_packets"] += 1
                continue
            transfer.held.append(segment)
            if transfer.state is Guest.OUT:
                self._loop.call_soon(self._send_held, transfer)

    def _send_held(self, transfer: Transfer) -> None:
        """Ask the host to put what our frozen socket did not take back on the road."""
        if not transfer.held or not self._is_up():
            return
        segments, transfer.held = transfer.held, []
        if transfer.snapshot is not None:
            segments = [one for one in segments if not is_stale(one, transfer.snapshot.send_sequence)]
        if not segments:
            return
        self.counters["held_packets"] += len(segments)
        lengths = b"".join(struct.pack(">I", len(segment)) + segment for segment in segments)
        self._send({"type": "late", "token": transfer.token}, lengths)


def _sent(header: dict[str, Any]) -> int:
    sent = header.get("sent")
    return sent if isinstance(sent, int) and sent >= 0 else 0


def _reason(header: dict[str, Any]) -> Reason:
    try:
        return Reason(header.get("reason"))
    except ValueError:
        return Reason.BAD_REQUEST


def _returned(header: dict[str, Any]) -> Outcome:
    """How a transfer ended whose socket is home."""
    sent, word, message = _sent(header), header.get("reason"), str(header.get("message", ""))
    cursor = header.get("cursor")
    cursor = cursor if type(cursor) is int and cursor >= 0 else None
    answered = tuple(one for one in header.get("answered") or () if type(one) is int and one >= 0)
    if word is None:
        return Outcome("offloaded", sent, cursor=cursor, answered=answered)
    reason = _reason(header)
    if reason is Reason.FILE_SHORT:
        return Outcome("offloaded", sent, reason, message, answered=answered)
    if reason is Reason.READ_ERROR:
        return Outcome("failed", sent, reason, message, int(header.get("errno") or errno.EIO))
    return Outcome("local", sent, reason, message, cursor=cursor, answered=answered)
