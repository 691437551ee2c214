# SPDX-License-Identifier: Apache-2.0
"""`streamlift leave` and `streamlift migrate` as people and programs see them: progress, results, and how Ctrl-C cancels."""

from __future__ import annotations

import json
import signal
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hypervisor_svc.attach import find_domain
from hypervisor_svc.control import call
from hypervisor_svc.errors import OperatorError, as_typed
from hypervisor_svc.migrate import LEAVE_PATIENCE, MigrateError, Plan, Step
from hypervisor_svc.migrate import migrate as run


def leave(control: str, domain: str, *, deadline: float, late: str, as_json: bool) -> None:
    """Cancelled, the VM comes back."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        left = call(control, "leave", patience=LEAVE_PATIENCE, machine=domain, deadline=deadline, late=late)
    except KeyboardInterrupt:
        call(control, "return", machine=domain)
        raise OperatorError("cancelled; the VM works with this host again", as_typed(f"leave {domain}")) from None
    told = f"{domain} is away: {_told(left)}\n  next: migrate or save it, or: {as_typed(f'return {domain}')}"
    typer.echo(json.dumps(left) if as_json else told)


def _told(left: Step) -> str:
    share = f"the share was unmounted after {left['share_ms']:g} ms more"
    words = {"finished": "are finished from here", "reset": "were reset"}
    late = "".join(f", {left[what]} {word}" for what, word in words.items() if left[what])
    passed = f", {left['passed']} go to the next host" if left["passed"] else ""
    return f"{left['home']} of {left['connections']} connections came home{passed} in {left['drain_ms']:g} ms{late}; {share}"


def migrate(connection: Any, domain: str, plan: Plan, *, as_json: bool) -> None:
    """SIGTERM cancels as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found = find_domain(connection, domain)
    try:
        if as_json:
            done = run(found, plan, on_step=lambda step: typer.echo(json.dumps(step)))
        else:
            with _Shown(domain) as shown:
                done = run(found, plan, on_step=shown.step)
    except MigrateError as error:
        if as_json:
            failure = {"step": "failed", "moved": False, "error": str(error), "hint": error.hint, "returned": error.returned}
            typer.echo(json.dumps(failure))
            raise typer.Exit(1) from None
        stuck = "" if error.returned else "; it is not back yet, its agent goes on trying"
        raise OperatorError(f"{domain} did not move: {error}{stuck}", error.hint) from None
    typer.echo(json.dumps(done) if as_json else _summary(domain, done))


def _summary(domain: str, done: Step) -> str:
    return f"{domain} has moved in {done['total_ms'] / 1000:.1f} s"


class _Shown:
    """The steps on a terminal."""

    def __init__(self, domain: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task: TaskID | None = None
        self._domain = domain

    def __enter__(self) -> _Shown:
        self._progress.start()
        self._progress.console.print(f"{self._domain}: letting go of its share")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, step: Step) -> None:
        """One of `migrate.py`'s."""
        if step["step"] == "let_go":
            self._progress.console.print(f"{self._domain}: the share was unmounted after {step['share_ms']:g} ms; all goes on")
        elif step["step"] == "leave":
            self._progress.console.print(f"{self._domain}: {_told(step)}")
        elif step["step"] == "precopy":
            self._copy(step)
        elif step["step"] == "meet":
            self._progress.console.print(f"{self._domain}: {step.get('error') or 'its agent has met the service there'}")

    def _copy(self, step: Step) -> None:
        if self._task is None:
            self._task = self._progress.add_task("memory")
        self._progress.update(self._task, total=step["total"] or None, completed=step["total"] - step["remaining"])
