# SPDX-License-Identifier: Apache-2.0
"""A live migration, in its order. It runs in the process of whoever asks for it, and talks to both services and to libvirt::

    expect     the destination's service, if it can be reached from here, is alive and looks for the VM
    let_go     the guest unmounts its share (`leave.py`), which QEMU wants; the source's service goes on serving
    precopy    libvirt migrates, live, peer to peer (virDomainMigrateToURI3); the source's libvirtd speaks with the destination's.
               QEMU is held (`hold_migration.py`) as soon as it would stop the VM
    leave      the source's service brings everything home, or passes it to the destination's (`pass_on.py`); then QEMU may
    meet       the destination's service takes what was passed; the guest's agent meets it, mounts the share, and hands out the rest

A VM whose agent cannot let go without leaving leaves first; one whose migration cannot be held leaves as soon as that is known.

Cancelled or failed at any of them, the VM runs on the source and works with its host again. `return` is safe even if libvirt has
not given up yet: QEMU refuses the mount as long as it migrates, and the guest tries again."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

import libvirt

from guest_agent.handoff.presence import Presence
from hypervisor_svc.control import ControlError, call
from hypervisor_svc.domains import DEFAULT_URI, open_connection
from hypervisor_svc.errors import as_typed
from hypervisor_svc.hold_migration import (
    BRAKE_AT,
    HOLD_SPEED,
    LEAVES,
    STOP_LIMIT,
    TICK,
    MigrationHold,
    Tick,
    copies,
    seconds_left,
)
from hypervisor_svc.leave import DEADLINE, Late, Left

PROGRESS_INTERVAL = 0.1
LOOK_INTERVAL = 0.025
"""Seconds between two looks at how much is left to copy."""
MEET_SECONDS = 30.0
TICK_INTERVAL = 0.005
"""The same, at a migration that is held."""
LATE_INTERVAL = 0.01
"""Seconds that what came to the last host a moment too late waits there at most."""
HEIR_PIECE = 8 << 20
"""Bytes in one request."""
LEAVE_PATIENCE = 3600.0
"""Seconds that a leave may take: with `Late.WAIT` as long as the slowest client takes."""

Step = dict[str, Any]
OnStep = Callable[[Step], None]


class MigrateError(ControlError):
    """The VM did not move. `returned`: it works with its host again."""

    returned = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where to, and how. `control`: the source service's control socket, `destination_control` the other's, if it can be reached;
    `source`: this host's libvirt; `migrate_uri`: where QEMU itself connects to; `bandwidth` in MiB/s (0: libvirt's default)."""

    destination: str
    control: str
    source: str = DEFAULT_URI
    destination_control: str | None = None
    deadline: float = DEADLINE
    late: Late = Late.FINISH
    migrate_uri: str | None = None
    copy_storage: bool = False
    unsafe: bool = False
    bandwidth: int = 0

    def flags(self, *, persistent: bool) -> int:
        """Of virDomainMigrateToURI3."""
        flags: int = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER
        if persistent:
            flags |= libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
        if self.copy_storage:
            flags |= libvirt.VIR_MIGRATE_NON_SHARED_INC
        if self.unsafe:
            flags |= libvirt.VIR_MIGRATE_UNSAFE
        return flags

    def parameters(self) -> dict[str, Any]:
        """Of virDomainMigrateToURI3."""
        given: dict[str, Any] = {}
        if self.migrate_uri:
            given[libvirt.VIR_MIGRATE_PARAM_URI] = self.migrate_uri
        if self.bandwidth:
            given[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] = self.bandwidth
        return given


def migrate(domain: libvirt.virDomain, plan: Plan, *, on_step: OnStep = lambda step: None) -> Step:
    """Migrate; returns the last step, {"step": "done", ...}. KeyboardInterrupt (or any other exception that `on_step` raises)
    cancels. Raises MigrateError; then the VM is where it was."""
    begin, name = time.monotonic(), domain.name()
    heir = None
    if plan.destination_control is not None:
        expected = _expect(name, plan.destination_control)
        heir = _Heir(name, plan.destination_control) if "pass_on" in expected.get("features", ()) else None
        on_step({"step": "expect", **expected})
    try:
        hold = MigrationHold(domain, plan.bandwidth)
    except libvirt.libvirtError as error:  # it does not run, for one
        raise MigrateError(*explain(error.get_error_code(), str(error), name, plan.destination)) from None
    first = _leave(name, plan, only="share", process=os.getpid(), speed=hold.usual_speed)
    try:
        if first["presence"] == Presence.LOOSE.value:
            on_step({"step": "let_go", **first})
            left = _Held(domain, plan, hold, heir, on_step).move()
        else:
            left = {**first, "held": False}
            on_step({"step": "leave", **left})
            _precopy(domain, plan, on_step)
    except BaseException as error:
        hold.forget()
        if heir is not None:
            heir.forget()
        returned = _return(name, plan)
        if not isinstance(error, MigrateError | KeyboardInterrupt):
            raise
        failure = error if isinstance(error, MigrateError) else _cancelled(name, plan)
        failure.returned = returned
        raise failure from None
    met = _meet(name, plan.destination_control, on_step) if plan.destination_control is not None else None
    total = round((time.monotonic() - begin) * 1000)
    return {"step": "done", "moved": True, "let_go": first, "leave": left, "total_ms": total, "meet": met}


def _cancelled(name: str, plan: Plan) -> MigrateError:
    return MigrateError("cancelled", as_typed(f"migrate {name} {plan.destination}"))


def _expect(name: str, control: str) -> Step:
    try:
        return call(control, "expect", machine=name)
    except ControlError as error:
        raise MigrateError(
            f"nothing was begun: the destination's service: {error}",
            error.hint or "start it there; without --destination-control it is not asked",
        ) from None


def _leave(name: str, plan: Plan, **more: Any) -> Step:
    late = plan.late.value
    try:
        return call(plan.control, "leave", patience=LEAVE_PATIENCE, machine=name, deadline=plan.deadline, late=late, **more)
    except ControlError as error:
        raise MigrateError(str(error), error.hint) from None
    except KeyboardInterrupt:
        failure = _cancelled(name, plan)
        failure.returned = _return(name, plan)
        raise failure from None


def _return(name: str, plan: Plan) -> bool:
    """Whether it did; if not, its agent goes on trying."""
    try:
        call(plan.control, "return", patience=60.0, machine=name)
    except ControlError:
        return False
    return True


def _precopy(domain: libvirt.virDomain, plan: Plan, on_step: OnStep) -> None:
    """All of it. Raises MigrateError."""
    with _Job(domain, plan) as job:
        _watch(domain, job, on_step)


def _watch(domain: libvirt.virDomain, job: _Job, on_step: OnStep, *, until: Callable[[Step], bool] = lambda stats: False) -> None:
    """To the job's end, or until something is true of its statistics (empty: libvirt has none). Its progress is told."""
    told = 0.0
    while not job.over.wait(LOOK_INTERVAL):
        stats: Step = {}
        with contextlib.suppress(libvirt.libvirtError):
            stats = domain.jobStats()
        if stats and time.monotonic() - told >= PROGRESS_INTERVAL:
            told = time.monotonic()
            on_step({"step": "precopy", **_progress(stats)})
        if until(stats):
            return


class _Heir:
    """The destination's service, which can be given what is under way."""

    def __init__(self, name: str, control: str) -> None:
        self._name, self._control = name, control

    def tell(self, rows: list[Step]) -> None:
        """All of it, in pieces that a control socket takes. Raises ControlError."""
        pieces: list[list[Step]] = [[]]
        size = 0
        for row in rows:
            size += len(row["body"])
            if size > HEIR_PIECE:
                pieces.append([])
                size = len(row["body"])
            pieces[-1].append(row)
        for number, piece in enumerate(pieces):
            call(self._control, "bring", machine=self._name, rows=piece, first=number == 0)

    def tell_more(self, control: str, over: threading.Event) -> None:
        """What clients and the guest still say to the service at `control`, which the VM leaves, until it is over. libvirt's calls
        may take long in these moments, so it is a thread's work."""
        moved = False
        while not moved:
            moved = over.wait(LATE_INTERVAL)
            with contextlib.suppress(ControlError):
                more = call(control, "more", machine=self._name)
                if more["rows"] or more["late"]:
                    call(self._control, "bring", machine=self._name, **more)

    def forget(self) -> None:
        """The VM does not come."""
        with contextlib.suppress(ControlError):
            self.tell([])


class _Held:
    """A migration during which the source goes on serving until QEMU is held."""

    def __init__(
        self, domain: libvirt.virDomain, plan: Plan, hold: MigrationHold, heir: _Heir | None, on_step: OnStep
    ) -> None:
        self._domain, self._plan, self._hold, self._heir, self._on_step = domain, plan, hold, heir, on_step

    def move(self) -> Step:
        """How it left. Raises MigrateError."""
        left = {**asdict(Left(self._domain.name())), "held": False}
        with _Job(self._domain, replace(self._plan, bandwidth=HOLD_SPEED)) as job:
            held = self._copy(job)
            if not job.over.is_set():
                left = {**self._leave(), "held": held}
                self._on_step({"step": "leave", **left})
                self._go_on(job)
        return left

    def _leave(self) -> Step:
        """Where there is an heir, it is told before the VM can stop; if it cannot be, all comes home."""
        left = _leave(self._domain.name(), self._plan, pass_on=self._heir is not None)
        rows = left.pop("rows", [])
        if self._heir is not None:
            try:
                self._heir.tell(rows)
            except ControlError:
                home = _leave(self._domain.name(), self._plan)
                left = {**left, "home": left["home"] + home["home"], "passed": 0, "drain_ms": left["drain_ms"] + home["drain_ms"]}
        return left

    def _go_on(self, job: _Job) -> None:
        """To its end."""
        if self._heir is not None:
            threading.Thread(target=self._heir.tell_more, args=(self._plan.control, job.over), name="heir", daemon=True).start()
        job.insist(self._hold.stop)
        limit = time.monotonic() + STOP_LIMIT
        _watch(self._domain, job, self._on_step, until=lambda stats: time.monotonic() > limit)
        job.insist(self._hold.release)
        _watch(self._domain, job, self._on_step)

    def _copy(self, job: _Job) -> bool:
        """Until everything has to come home; whether QEMU is held meanwhile. If the VM was quicker, what was out is lost."""
        _watch(self._domain, job, self._on_step, until=copies)
        if job.over.is_set() or not self._tell(self._hold.begin):
            return False
        _watch(self._domain, job, self._on_step, until=self._brake)
        braked = time.monotonic()
        _watch(self._domain, job, self._on_step, until=lambda stats: self._hold.is_time(stats, time.monotonic() - braked))
        return not job.over.is_set() and self._tell(self._hold.hold) and self._await_tick(job)

    def _await_tick(self, job: _Job) -> bool:
        """Until QEMU will soon look whether it may stop the VM, or half a second has passed. Always held."""
        tick, limit = Tick(), time.monotonic() + 5 * TICK
        while not job.over.wait(TICK_INTERVAL) and time.monotonic() < limit:
            with contextlib.suppress(libvirt.libvirtError):
                if tick.is_now(self._domain.jobStats()):
                    job.over.wait(TICK - LEAVES)
                    break
        return True

    def _brake(self, stats: Step) -> bool:
        """Whether it was time, and is done."""
        return seconds_left(stats) <= BRAKE_AT and self._tell(self._hold.brake, stats)

    @staticmethod
    def _tell(word: Callable[..., None], *given: Any) -> bool:
        """Whether libvirt did so: the migration may be over."""
        try:
            word(*given)
        except libvirt.libvirtError:
            return False
        return True


class _Job(threading.Thread):
    """libvirt's call, which lasts as long as the migration: a context manager, at whose end the VM has moved. Raises MigrateError.
    An exception in its block aborts the migration; if that comes too late, the VM has moved.

    It has a connection of its own: a short call beside one that lasts, on one connection, may wait for ever (seen with libvirt 9.0:
    the server never had it). `over` is to be waited for: a `join` that Ctrl-C interrupts takes a thread that runs for one that has
    ended (Python 3.11)."""

    def __init__(self, domain: libvirt.virDomain, plan: Plan) -> None:
        super().__init__(name="migrate", daemon=True)
        self._domain, self._plan = domain, plan
        self._flags = plan.flags(persistent=bool(domain.isPersistent()))
        self.error: libvirt.libvirtError | None = None
        self.over = threading.Event()

    def __enter__(self) -> _Job:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if kind is None:
            if self.error is not None:
                code, message = self.error.get_error_code(), str(self.error)
                raise MigrateError(*explain(code, message, self._domain.name(), self._plan.destination))
            return False
        while not self.over.is_set():  # it may only be about to begin
            self.insist(self._domain.abortJob)
            self.over.wait(LOOK_INTERVAL)
        return self.error is None

    def insist(self, word: Callable[[], object]) -> None:
        """Tell libvirt, again and again until it does so, or all is over: a migration that stays held would last for hours."""
        while not self.over.is_set():
            with contextlib.suppress(libvirt.libvirtError):
                word()
                return
            self.over.wait(LOOK_INTERVAL)

    def run(self) -> None:
        try:
            with contextlib.closing(open_connection(self._plan.source)) as connection:
                domain = connection.lookupByUUID(self._domain.UUID())
                domain.migrateToURI3(self._plan.destination, self._plan.parameters(), self._flags)
        except libvirt.libvirtError as error:
            self.error = error
        finally:
            self.over.set()


def _progress(stats: dict[str, Any]) -> Step:
    """Of virDomainGetJobStats: bytes, and how much of all is done."""
    total, done = stats.get("data_total", 0), stats.get("data_processed", 0)
    left = stats.get("data_remaining", 0)
    percent = round(100 * (total - left) / total, 1) if total else 0.0
    return {"percent": percent, "processed": done, "remaining": left, "total": total, "elapsed_ms": stats.get("time_elapsed", 0)}


def _meet(name: str, control: str, on_step: OnStep) -> Step | None:
    """The VM has moved, whatever its new host's service says."""
    try:
        met = call(control, "meet", patience=MEET_SECONDS + 10, machine=name, seconds=MEET_SECONDS)
    except ControlError as error:
        on_step({"step": "meet", "error": str(error), "hint": error.hint})
        return None
    on_step({"step": "meet", **met})
    return met


def explain(code: int, message: str, name: str, destination: str) -> tuple[str, str]:
    """Whose fault it is that a migration failed, and what to type next; `code` and `message` are libvirt's."""
    words = message.lower()
    if code == libvirt.VIR_ERR_OPERATION_ABORTED:
        return "the migration was cancelled", as_typed(f"migrate {name} {destination}")
    if "virtfs" in words or "mounted in the guest" in words:
        return f"the guest has the share mounted: {message}", as_typed(f"leave {name}")
    if code == libvirt.VIR_ERR_MIGRATE_UNSAFE:
        return message, "the disk must be on storage that both hosts have: --unsafe if it is, --copy-storage if it is not"
    if "fsdev" in words or "9pfs" in words:
        return f"the destination lacks the share: {message}", "make the folder there, with the same files, at the same path"
    if code in (libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_RPC):
        return f"the destination's libvirt at {destination}: {message}", f"virsh -c '{destination}' list"
    return f"libvirt: {message}", "see the logs of libvirtd and of QEMU on both hosts (/var/log/libvirt/qemu)"
