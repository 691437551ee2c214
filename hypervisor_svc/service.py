# SPDX-License-Identifier: Apache-2.0
"""`streamlift serve`: starts the service's parts in order and undoes them in reverse. What they do is in their own files.

The service runs as a child of a small supervisor. If the child is killed, its redirects are stale: the supervisor's next
child flushes them before it answers any guest, so a guest that meets a new service knows that its packets are its own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import platform
import signal
import sys
import time
from functools import partial
from typing import Any

from guest_agent.handoff.backend import Backend, choose
from guest_agent.handoff.errors import HandoffError, Reason
from guest_agent.handoff.hold import Hold
from hypervisor_svc import __version__, leave
from hypervisor_svc.bridge import BridgedRedirect
from hypervisor_svc.config import Config
from hypervisor_svc.connection import Connection, Guest
from hypervisor_svc.control import ControlError, ControlServer, Handler
from hypervisor_svc.domains import Domains, Machine
from hypervisor_svc.errors import as_typed
from hypervisor_svc.foreign_moves import ForeignMoves
from hypervisor_svc.guests import Guests, Limits
from hypervisor_svc.inject import Injector
from hypervisor_svc.monitor import Monitor
from hypervisor_svc.redirect import NatRedirect, Redirect
from hypervisor_svc.relay import RelayLimits
from hypervisor_svc.transparent import TransparentRedirect

log = logging.getLogger("streamlift.service")

DRAIN_LIMIT = 2.0
LONGEST_PAUSE = 600.0


class Service:
    """The parts of one running service; `async with` starts and stops them."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stack = contextlib.AsyncExitStack()
        self._started = time.monotonic()
        self._lossless = False
        self._guests: Guests
        self._moves: ForeignMoves
        self._redirect: BridgedRedirect
        self._backend: Backend
        self._domains: Domains | None = None
        self._askers: set[asyncio.Task[None]] = set()
        """Each waits for the end of a process that had a VM leave."""

    async def __aenter__(self) -> Service:
        async with contextlib.AsyncExitStack() as stack:
            redirect = self._redirect = stack.enter_context(make_redirect(self._config))
            stale = redirect.flush()
            if stale:
                log.warning("%d redirects of an earlier service were removed", stale)
            self._backend = choose(self._config.service.backend)
            log.info("backend %s: %s", self._backend.name, self._backend.why)
            injector = stack.enter_context(Injector())
            keep = self._open_hold(stack)
            self._guests = Guests(
                about=self._about(),
                backend=self._backend,
                redirect=redirect,
                keep=keep,
                injector=injector,
                quantum=self._config.serve.quantum_bytes,
                limits=self._limits(),
                relay_limits=self._relay_limits(),
                relay_engine=self._config.relay.engine,
            )
            stack.callback(self._guests.close)
            stack.push_async_callback(self._drain)
            control = ControlServer(self._config.control_socket, self._commands())
            await stack.enter_async_context(control)
            self._moves = ForeignMoves(self._guests)
            stack.callback(self._moves.close)
            stack.callback(lambda: [task.cancel() for task in self._askers])
            self._find_machines(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()

    def _open_hold(self, stack: contextlib.AsyncExitStack) -> Hold | None:
        try:
            keep = stack.enter_context(Hold())
        except OSError as error:
            log.warning("packets that arrive during a handoff will be lost and retransmitted: %s", error)
            return None
        self._lossless = True
        return keep

    def _about(self) -> dict[str, Any]:
        return {
            "side": "host",
            "service_version": __version__,
            "instance": os.urandom(8).hex(),
            "backends": [self._backend.name],
            "kernel": platform.release(),
            "features": ["anticipate"] if self._config.serve.next_request_seconds else [],
        }

    def _limits(self) -> Limits:
        policy = self._config.policy
        return Limits(
            max_connections=policy.max_connections_per_vm,
            max_queue_bytes=policy.max_queue_bytes,
            max_frames_per_second=policy.max_frames_per_second,
            orphan_timeout=self._config.serve.orphan_timeout_seconds,
            next_request=self._config.serve.next_request_seconds,
            threshold=policy.threshold_bytes,
        )

    def _relay_limits(self) -> RelayLimits:
        relay = self._config.relay
        return RelayLimits(
            max_relays=relay.max_relays_per_vm, max_ring_bytes=relay.max_ring_bytes_per_vm, udp_ports=relay.udp_ports
        )

    def _find_machines(self, stack: contextlib.AsyncExitStack) -> None:
        """VMs of the configuration file at once, those of libvirt as they come and go."""
        for vm in self._config.vm:
            machine = Machine(
                name=vm.name,
                uuid=f"static-{vm.name}",
                channel_path=str(vm.channel),
                share=str(vm.share),
                addresses=tuple(str(address) for address in vm.addresses),
                bridge=vm.bridge,
            )
            self._machine_up(machine)
            if vm.qmp is not None:
                self._watch(machine.uuid, vm.qmp, stack)
        if self._config.libvirt.enabled:
            self._domains = Domains(
                self._config.libvirt.uri,
                on_up=self._machine_up,
                on_down=self._machine_down,
                on_migrating=self._moves.begins,
                on_stays=self._moves.ends,
                on_paused=self._paused,
            )
            self._domains.start()
            stack.callback(self._domains.stop)

    def _watch(self, uuid: str, path: str, stack: contextlib.AsyncExitStack) -> None:
        monitor = Monitor(
            path,
            on_migrating=partial(self._moves.begins, uuid),
            on_stays=partial(self._moves.ends, uuid),
            on_paused=partial(self._paused, uuid),
        )
        monitor.start()
        stack.push_async_callback(monitor.stop)

    def _machine_down(self, uuid: str) -> None:
        self._moves.gone(uuid)
        self._guests.machine_down(uuid)

    def _paused(self, uuid: str, paused: bool) -> None:
        self._guests.pause(uuid, paused=paused)

    def _machine_up(self, machine: Machine) -> None:
        priority = self._config.policy.vm_priority.get(machine.name, machine.priority)
        self._redirect.place(machine.addresses, machine.bridge)
        if self._guests.machine_up(dataclasses.replace(machine, priority=priority)) and machine.share is not None:
            ways = as_typed(f"leave {machine.name}"), as_typed(f"migrate {machine.name} DESTINATION")
            log.info("%s: QEMU neither moves nor saves it while its share is mounted: '%s' before, or '%s'", machine.name, *ways)

    async def _drain(self) -> None:
        """Before the end: everything that is out goes home, within DRAIN_LIMIT."""
        for guest in self._guests:
            guest.draining = True
            self._guests.hand_back_all(guest, Reason.DRAINING)
        deadline = time.monotonic() + DRAIN_LIMIT
        while any(guest.connections for guest in self._guests) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    # The control socket's commands.

    def _commands(self) -> dict[str, Handler]:
        return {
            "status": self._status,
            "connections": self._connections,
            "relays": self._relays,
            "hand_back": self._hand_back,
            "pause": self._pause,
            "leave": self._leave,
            "return": self._return,
            "expect": self._expect,
            "more": self._more,
            "bring": self._bring,
            "meet": self._meet,
        }

    def _status(self, request: dict[str, Any]) -> dict[str, Any]:
        machines = [_machine_status(guest) for guest in self._guests]
        return {
            "version": __version__,
            "pid": os.getpid(),
            "memory_bytes": _resident_bytes(),
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "backend": {"name": self._backend.name, "why": self._backend.why},
            "relay_engine": self._guests.relays.engine,
            "redirect": self._config.redirect.mode,
            "lossless_freeze": self._lossless,
            "libvirt": self._libvirt(),
            "limits": self._quotas(),
            "durations": self._guests.durations.summary(request.get("samples")),
            "machines": machines,
            "totals": {
                key: sum(machine[key] for machine in machines)
                for key in (
                    *("connections_out", "handed_out", "handed_back", "answered", "failed", "ended"),
                    *("bytes_sent", "bytes_per_second"),
                )
            },
        }

    def _libvirt(self) -> dict[str, Any] | None:
        """Where VMs are looked for, and those that run without our channel; None: nowhere."""
        if self._domains is None:
            return None
        found = self._domains
        return {"uri": found.uri, "connected": found.connected, "without_channel": list(found.without_channel)}

    def _quotas(self) -> dict[str, Any]:
        """What each VM may have, by the names under which its status tells what it has."""
        policy, relay = self._config.policy, self._config.relay
        return {
            "connections_out": policy.max_connections_per_vm,
            "relays": relay.max_relays_per_vm,
            "ring_bytes": relay.max_ring_bytes_per_vm,
            "frames_per_second": policy.max_frames_per_second,
        }

    def _connections(self, request: dict[str, Any]) -> dict[str, Any]:
        found = [c for guest in self._guests for c in (*guest.connections.values(), *guest.passed.values())]
        return {"connections": [_connection_status(connection) for connection in found]}

    def _relays(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"relays": self._guests.relays.rows(iter(self._guests))}

    def _hand_back(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"handed_back": self._guests.hand_back_all(self._guest(request), Reason.OPERATOR, request.get("token"))}

    def _pause(self, request: dict[str, Any]) -> dict[str, Any]:
        """For so many seconds nothing more of a VM goes out; 0 ends it. What is out stays out."""
        seconds = float(request["seconds"])
        if not 0 <= seconds <= LONGEST_PAUSE:
            raise ValueError(f"a pause is 0 to {LONGEST_PAUSE:g} seconds long, not {seconds:g}")
        self._guest(request).paused_until = time.monotonic() + seconds
        return {"seconds": seconds}

    def _guest(self, request: dict[str, Any]) -> Guest:
        """The VM that a request names. Raises ControlError."""
        name = request.get("machine")
        found: list[Guest] = [guest for guest in self._guests if guest.machine.name == name]
        if not found:
            known = ", ".join(guest.machine.name for guest in self._guests) or "none"
            hint = f"sudo {as_typed(f'attach {name} --share FOLDER --address ADDRESS')}"
            raise ControlError(f"no VM named {name!r} has a channel here (known: {known})", hint)
        return found[0]

    async def _leave(self, request: dict[str, Any]) -> dict[str, Any]:
        deadline, late = float(request.get("deadline", leave.DEADLINE)), leave.Late(request.get("late", leave.Late.FINISH))
        if deadline < 0:
            raise ValueError("deadline must not be negative")
        guest, process = self._guest(request), request.get("process")
        if request.get("only") == "share":
            left = await leave.let_go(self._guests, guest, deadline=deadline, late=late)
        else:
            left = await leave.leave(self._guests, guest, deadline=deadline, late=late, passes=request.get("pass_on") is True)
        if process is not None:
            give_up = partial(self._give_up, guest, int(request.get("speed", 0)))
            task = asyncio.get_running_loop().create_task(leave.while_runs(self._guests, guest, int(process), give_up=give_up))
            self._askers.add(task)
            task.add_done_callback(self._askers.discard)
        return left

    async def _give_up(self, guest: Guest, speed: int) -> None:
        if self._domains is not None:
            await self._domains.give_up(guest.machine.uuid, speed)

    async def _return(self, request: dict[str, Any]) -> dict[str, Any]:
        return await leave.come_back(self._guests, self._guest(request))

    def _expect(self, request: dict[str, Any]) -> dict[str, Any]:
        """A VM is about to come (libvirt's hook says so): look at once."""
        log.info("%s is expected", request.get("machine"))
        if self._domains is not None:
            self._domains.refresh()
        machines = [guest.machine.name for guest in self._guests]
        return {"version": __version__, "machines": machines, "features": ["pass_on"]}

    def _more(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the next host of a VM is to be told beyond what `leave` said, and the last answer to this."""
        return self._guests.passing.more(self._guest(request))

    def _bring(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a VM that is about to come, or has just come, has out at its last host (`pass_on.py`)."""
        machine, rows, late = str(request["machine"]), request.get("rows", []), request.get("late", [])
        if not isinstance(rows, list) or not isinstance(late, list):
            raise ValueError("rows and late are lists")
        here = next((guest for guest in self._guests if guest.machine.name == machine), None)
        kept = self._guests.passing.expect(machine, here, rows, first=request.get("first") is True)
        return {"kept": kept, "late": self._guests.passing.put_late(machine, here, late)}

    async def _meet(self, request: dict[str, Any]) -> dict[str, Any]:
        """Until the VM has come and works with this host."""
        until = time.monotonic() + float(request.get("seconds", leave.RETURN_LIMIT))
        while not any(guest.machine.name == request.get("machine") for guest in self._guests):
            if time.monotonic() >= until:
                self._guest(request)
            await asyncio.sleep(0.02)
        guest = self._guest(request)
        self._guests.passing.inherit(guest)
        return await leave.meet(guest, seconds=max(0.0, until - time.monotonic()))


def _resident_bytes() -> int:
    """Memory of this process (proc(5), statm)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _machine_status(guest: Guest) -> dict[str, Any]:
    return {
        "name": guest.machine.name,
        "uuid": guest.machine.uuid,
        "channel": guest.channel.state if guest.channel else "down",
        "presence": guest.presence.value,
        "agent_version": guest.hello.get("agent_version"),
        "kernel": guest.hello.get("kernel"),
        "backend": guest.backend,
        "addresses": list(guest.machine.addresses),
        "share": guest.machine.share,
        "priority": guest.machine.priority,
        "relays": len(guest.relays),
        "ring_bytes": sum(relay.ring_bytes for relay in guest.relays.values()),
        "frames_per_second": guest.channel.frames_per_second if guest.channel else 0,
        "connections_out": len(guest.connections),
        "handed_out": guest.counters["handed_out"],
        "handed_back": guest.counters["handed_back"],
        "answered": guest.counters["answered"],
        "failed": guest.counters["failed"],
        "ended": guest.counters["ended"],
        "lost": dict(guest.lost),
        "held_packets": guest.counters["held_packets"],
        "late_packets": guest.counters["late_packets"],
        "refused": dict(guest.refused),
        "bytes_sent": guest.bytes_sent,
        "bytes_per_second": round(guest.bytes_per_second),
    }


def _connection_status(connection: Connection) -> dict[str, Any]:
    return {
        "token": connection.token,
        "machine": connection.guest.machine.name,
        "client": str(connection.flow.client),
        "server": str(connection.flow.server),
        "state": connection.state.value,
        "file": connection.job.path,
        "priority": connection.job.priority,
        "offset": connection.job.offset,
        "count": connection.job.count,
        "sent": connection.sent,
        "answered": len(connection.answered),
        "age_seconds": round(time.monotonic() - connection.started, 3),
    }


def make_redirect(config: Config) -> BridgedRedirect:
    """The redirection that the configuration asks for, in the wrapper that bridged VMs need."""
    inner: Redirect
    if config.redirect.mode == "transparent":
        inner = TransparentRedirect()
    else:
        inner = NatRedirect(
            ports=config.redirect.port_range, address4=config.redirect.address4, address6=config.redirect.address6
        )
    return BridgedRedirect(inner)


async def _serve(config: Config) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with Service(config):
        log.info("ready")
        await stopped.wait()


def run(config: Config) -> int:
    """Run until SIGTERM or SIGINT; a child that is killed is started again. The exit status."""
    logging.basicConfig(level=config.service.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    os.makedirs(config.service.runtime_dir, mode=0o755, exist_ok=True)
    supervisor = _Supervisor(config)
    return supervisor.run()


class _Supervisor:
    """Starts the service in a child process and starts it again when it dies. Nothing here can fail at run time."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._child = 0
        self._stopping = False

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        while True:
            self._child = os.fork()
            if self._child == 0:
                os._exit(self._serve())
            _, status = os.waitpid(self._child, 0)
            if self._stopping or os.WIFEXITED(status):
                return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1
            log.error("the service was killed by signal %d; starting it again", os.WTERMSIG(status))
            time.sleep(0.05)

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, number)

    def _serve(self) -> int:
        _die_with_parent()
        try:
            asyncio.run(_serve(self._config))
        except (OSError, RuntimeError, HandoffError) as error:
            log.critical("%s", error, exc_info=log.isEnabledFor(logging.DEBUG))
            return 1
        finally:
            sys.stderr.flush()
        return 0


def _die_with_parent() -> None:
    """prctl(PR_SET_PDEATHSIG, SIGTERM): a service without its supervisor drains and ends."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
