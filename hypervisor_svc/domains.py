# SPDX-License-Identifier: Apache-2.0
"""The VMs with our channel, as libvirt knows them: at the start and while they come and go.

One comparison serves for all: what runs now against what was reported before. It is made at the start, at each
event of libvirt's, and every few seconds, so neither a lost event nor a restart of libvirtd leaves it wrong.
While libvirtd is away nothing is reported: the VMs run on without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import libvirt

from hypervisor_svc.attach import addresses_of, channel_path, share_path

log = logging.getLogger(__name__)

DEFAULT_URI = "qemu:///system"
INTERVAL = 5.0  # seconds between comparisons when no event asks for one
JOB_INTERVAL = 0.2  # seconds between two looks at whether a migration still goes on


@dataclass(frozen=True)
class Machine:
    """A running VM with our channel. `bridge` is the host's bridge that it is a port of, None if it is routed; `priority` its
    class (`schedule.py`)."""

    name: str
    uuid: str
    channel_path: str
    share: str | None
    addresses: tuple[str, ...]
    bridge: str | None = None
    priority: str = "normal"


class Domains:
    """Reports VMs through `on_up(machine)` and `on_down(uuid)`, both called in the asyncio loop of `start()`.

    A VM that changed (restarted, other addresses) is reported as up again.
    """

    def __init__(
        self,
        uri: str = DEFAULT_URI,
        *,
        on_up: Callable[[Machine], None],
        on_down: Callable[[str], None],
        on_migrating: Callable[[str], None] = lambda uuid: None,
        on_stays: Callable[[str], None] = lambda uuid: None,
        on_paused: Callable[[str, bool], None] = lambda uuid, paused: None,
    ) -> None:
        self.uri = uri
        self.connected = False
        self.machines: dict[str, Machine] = {}
        self.without_channel: tuple[str, ...] = ()
        self._on_up = on_up
        self._on_down = on_down
        self._on_migrating, self._on_stays, self._on_paused = on_migrating, on_stays, on_paused
        self._moving: set[str] = set()
        self._connection: libvirt.virConnect | None = None
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._following: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin, in the running asyncio loop. libvirtd may be away: it is tried again."""
        _start_event_loop()
        self._loop = asyncio.get_running_loop()
        self._wanted.set()
        self._task = self._loop.create_task(self._watch())

    def stop(self) -> None:
        """Stop watching; nothing more is reported."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        for task in self._following:
            task.cancel()
        self._disconnect()

    def refresh(self) -> None:
        """Compare soon, without waiting for an event."""
        self._wanted.set()

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), INTERVAL)
            self._wanted.clear()
            try:
                await self._compare()
            except Exception:
                # What goes wrong with one VM must not blind the service to all others.
                log.exception("the VMs could not be compared; this is tried again")

    async def _compare(self) -> None:
        try:
            found = await asyncio.to_thread(self._read)
        except libvirt.libvirtError as error:
            if self.connected:
                log.warning("libvirt at %s is away: %s", self.uri, error)
            self.connected = False
            await asyncio.to_thread(self._disconnect)
            return
        if not self.connected:
            log.info("connected to libvirt at %s", self.uri)
        self.connected = True
        self._report(found)

    def _report(self, found: dict[str, Machine]) -> None:
        for uuid in self.machines.keys() - found.keys():
            del self.machines[uuid]
            self._on_down(uuid)
        for uuid, machine in found.items():
            if self.machines.get(uuid) != machine:
                self.machines[uuid] = machine
                self._on_up(machine)

    # From here on: in a worker thread, for calls into libvirt may block.

    def _read(self) -> dict[str, Machine]:
        if self._connection is None:
            self._connection = self._connect()
        found: dict[str, Machine] = {}
        others = []
        for domain in self._connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            machine = _machine_if_running(self._connection, domain)
            if machine is not None:
                found[machine.uuid] = machine
            else:
                others.append(domain.name())
        self.without_channel = tuple(sorted(others))
        return found

    def _connect(self) -> libvirt.virConnect:
        connection = open_connection(self.uri)
        # A libvirtd that hangs counts as away after 5 * 3 s.
        connection.setKeepAlive(5, 3)
        for event in (
            libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
        ):
            connection.domainEventRegisterAny(None, event, self._event, None)
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION, self._iteration, None)
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lives, None)
        connection.registerCloseCallback(self._event, None)
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(libvirt.libvirtError):
                connection.unregisterCloseCallback()
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()

    def _event(self, *_details: Any) -> None:
        self._tell(self._wanted.set)

    def _iteration(self, _connection: Any, domain: Any, _iteration: int, _opaque: Any) -> None:
        """Memory is being copied: a migration has begun (the first of them comes with its start), or goes on."""
        uuid = domain.UUIDString()
        self._tell(self._migrates, uuid)

    def _lives(self, _connection: Any, domain: Any, event: int, _detail: int, _opaque: Any) -> None:
        """It came, went, was paused or resumed. libvirt takes one callback of ours for each kind of event."""
        self._event()
        if event in (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_RESUMED):
            self._tell(self._on_paused, domain.UUIDString(), event == libvirt.VIR_DOMAIN_EVENT_SUSPENDED)

    def _tell(self, what: Callable[..., object], *arguments: object) -> None:
        """From libvirt's thread to the loop's."""
        with contextlib.suppress(RuntimeError):  # the asyncio loop has ended
            self._loop.call_soon_threadsafe(what, *arguments)

    # A migration that somebody started. libvirt tells of its beginning and of its success, but not that it came to nothing.

    def _migrates(self, uuid: str) -> None:
        if uuid in self.machines and uuid not in self._moving:
            self._moving.add(uuid)
            self._on_migrating(uuid)
            task = self._loop.create_task(self._follow(uuid))
            self._following.add(task)
            task.add_done_callback(self._following.discard)

    async def _follow(self, uuid: str) -> None:
        while uuid in self.machines:
            await asyncio.sleep(JOB_INTERVAL)
            if not await asyncio.to_thread(self._has_job, uuid):
                if uuid in self.machines:
                    self._on_stays(uuid)
                break
        self._moving.discard(uuid)

    def _has_job(self, uuid: str) -> bool:
        """Whether libvirt still works on it; True too if that cannot be told: then it is gone, or libvirt is."""
        try:
            assert self._connection is not None
            return bool(self._connection.lookupByUUIDString(uuid).jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE)
        except (libvirt.libvirtError, AssertionError):
            return True

    async def give_up(self, uuid: str, speed: int) -> None:
        """Cancel a VM's migration, whoever asked for it; the next one may copy `speed` MiB a second (0: as before)."""
        with contextlib.suppress(libvirt.libvirtError):  # there is none, or libvirt is away
            await asyncio.to_thread(self._give_up, uuid, speed)

    def _give_up(self, uuid: str, speed: int) -> None:
        if self._connection is None:
            return
        domain = self._connection.lookupByUUIDString(uuid)
        if speed:
            domain.migrateSetMaxSpeed(speed)
        domain.abortJob()


def open_connection(uri: str = DEFAULT_URI) -> libvirt.virConnect:
    """A connection to libvirt; `libvirt.libvirtError` if it is away."""
    # libvirt prints every error to stderr by itself otherwise; ours are raised and logged.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    return libvirt.open(uri)


def read_machine(connection: libvirt.virConnect, domain: libvirt.virDomain) -> Machine | None:
    """What the service needs to know of a running domain; None if it has no channel of ours."""
    definition = ET.fromstring(domain.XMLDesc())
    channel = channel_path(definition)
    if channel is None:
        return None
    share = share_path(definition)
    return Machine(
        name=domain.name(),
        uuid=domain.UUIDString(),
        channel_path=str(channel),
        share=str(share) if share else None,
        addresses=addresses_of(definition) or _leases(domain),
        bridge=_host_bridge(connection, definition),
    )


def _machine_if_running(connection: libvirt.virConnect, domain: libvirt.virDomain) -> Machine | None:
    """None too for a domain that ended while it was looked at; a lost connection stays an error."""
    try:
        return read_machine(connection, domain)
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
            return None
        raise


def _leases(domain: libvirt.virDomain) -> tuple[str, ...]:
    """The addresses that libvirt's own DHCP server gave out, for VMs without our metadata."""
    try:
        found = domain.interfaceAddresses(libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE)
    except libvirt.libvirtError:
        return ()
    addresses = {entry["addr"] for card in found.values() for entry in card.get("addrs") or ()}
    return tuple(sorted(addresses))


def _host_bridge(connection: libvirt.virConnect, definition: ET.Element) -> str | None:
    """The first bridge of the host's administrator that has one of the VM's cards as a port."""
    bridges = (_bridge_of(connection, interface) for interface in definition.iterfind("devices/interface"))
    return next((bridge for bridge in bridges if bridge), None)


def _bridge_of(connection: libvirt.virConnect, interface: ET.Element) -> str | None:
    source = interface.find("source")
    if source is None:
        return None
    if interface.get("type") == "bridge":
        return source.get("bridge")
    network = source.get("network")
    if interface.get("type") != "network" or network is None:
        return None
    try:
        forward = ET.fromstring(connection.networkLookupByName(network).XMLDesc()).find("forward")
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
            return None
        raise
    return source.get("bridge") if forward is not None and forward.get("mode") == "bridge" else None


_event_loop_lock = threading.Lock()
_event_loop_runs = False


def _start_event_loop() -> None:
    """libvirt's own event loop, in a thread; it must be there before the first connection is opened."""
    global _event_loop_runs
    with _event_loop_lock:
        if _event_loop_runs:
            return
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True).start()
        _event_loop_runs = True


def _run_event_loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()
