# SPDX-License-Identifier: Apache-2.0
"""A live migration, in its order. It runs in the process of whoever asks for it, and talks to both services and to libvirt::

    expect     the destination's service, if it can be reached from here, is alive and looks for the VM
    leave      the source's service brings everything home; the guest unmounts its share (`leave.py`)
    precopy    libvirt migrates, live, peer to peer (virDomainMigrateToURI3); the source's libvirtd speaks with the destination's
    meet       the guest's agent meets the destination's service, mounts the share, and what was left is handed out there

Cancelled or failed at any of them, the VM runs on the source and works with its host again. `return` is safe even if libvirt has
not given up yet: QEMU refuses the mount as long as it migrates, and the guest tries again."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import libvirt

from hypervisor_svc.control import ControlError, call
from hypervisor_svc.errors import as_typed
from hypervisor_svc.leave import DEADLINE, Late

PROGRESS_INTERVAL = 0.1
MEET_SECONDS = 30.0
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
    `migrate_uri`: where QEMU itself connects to; `bandwidth` in MiB/s (0: libvirt's default)."""

    destination: str
    control: str
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
    if plan.destination_control is not None:
        on_step({"step": "expect", **_expect(name, plan.destination_control)})
    left = _leave(name, plan)
    try:
        on_step({"step": "leave", **left})
        _precopy(domain, plan, on_step)
    except BaseException as error:
        returned = _return(name, plan)
        if not isinstance(error, MigrateError | KeyboardInterrupt):
            raise
        failure = error if isinstance(error, MigrateError) else _cancelled(name, plan)
        failure.returned = returned
        raise failure from None
    met = _meet(name, plan.destination_control, on_step) if plan.destination_control is not None else None
    total = round((time.monotonic() - begin) * 1000)
    return {"step": "done", "moved": True, "leave": left, "total_ms": total, "meet": met}


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


def _leave(name: str, plan: Plan) -> Step:
    try:
        return call(
            plan.control,
            "leave",
            patience=LEAVE_PATIENCE,
            machine=name,
            deadline=plan.deadline,
            late=plan.late.value,
            process=os.getpid(),
        )
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
    """Raises MigrateError. An exception of `on_step` aborts libvirt's job; if that comes too late, the VM has moved."""
    job = _Job(domain, plan)
    job.start()
    try:
        while not job.over.wait(PROGRESS_INTERVAL):
            with contextlib.suppress(libvirt.libvirtError):
                on_step({"step": "precopy", **_progress(domain.jobStats())})
    except BaseException:
        with contextlib.suppress(libvirt.libvirtError):
            domain.abortJob()
        job.over.wait()
        if job.error is not None:
            raise
    if job.error is not None:
        raise MigrateError(*explain(job.error.get_error_code(), str(job.error), domain.name(), plan.destination))


class _Job(threading.Thread):
    """libvirt's call, which lasts as long as the migration. `over` is to be waited for: a `join` that Ctrl-C interrupts takes a
    thread that runs for one that has ended (Python 3.11)."""

    def __init__(self, domain: libvirt.virDomain, plan: Plan) -> None:
        super().__init__(name="migrate", daemon=True)
        self._domain, self._plan = domain, plan
        self._flags = plan.flags(persistent=bool(domain.isPersistent()))
        self.error: libvirt.libvirtError | None = None
        self.over = threading.Event()

    def run(self) -> None:
        try:
            self._domain.migrateToURI3(self._plan.destination, self._plan.parameters(), self._flags)
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
