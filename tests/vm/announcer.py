# SPDX-License-Identifier: Apache-2.0
"""Who tells the fabric behind which hypervisor a routed VM is: on each hypervisor somebody who hears from its libvirt that a VM
runs there, as a routing daemon with a route of its own for each VM (BGP to the host) would. The last one who says so is right."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import xml.etree.ElementTree as ET
from typing import Any

import libvirt

from hypervisor_svc import domains
from hypervisor_svc.attach import addresses_of
from tests.vm.fabric import Fabric, Uplink

log = logging.getLogger(__name__)


class Announcer:
    """For all hypervisors of a fabric; `close` ends it."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._heard: queue.Queue[tuple[libvirt.virConnect, Uplink, str] | None] = queue.Queue()
        self._watched: list[tuple[libvirt.virConnect, int]] = []
        self._thread = threading.Thread(target=self._run, name="announcer")
        domains._start_event_loop()
        self._thread.start()

    def watch(self, uri: str, uplink: Uplink) -> None:
        """Announce what runs at this libvirt."""
        connection = domains.open_connection(uri)
        kind = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
        self._watched.append((connection, connection.domainEventRegisterAny(None, kind, self._event, uplink)))

    def close(self) -> None:
        """Hear no more."""
        for connection, callback in self._watched:
            with contextlib.suppress(libvirt.libvirtError):
                connection.domainEventDeregisterAny(callback)
                connection.close()
        self._heard.put(None)
        self._thread.join()

    def _event(self, connection: libvirt.virConnect, domain: libvirt.virDomain, *details: Any) -> None:
        """In libvirt's thread, which must not ask libvirt."""
        self._heard.put((connection, details[-1], domain.UUIDString()))

    def _run(self) -> None:
        while (heard := self._heard.get()) is not None:
            try:
                self._look(*heard)
            except libvirt.libvirtError as error:
                log.debug("not announced: %s", error)  # it ended meanwhile
            except RuntimeError:
                log.exception("not announced")

    def _look(self, connection: libvirt.virConnect, uplink: Uplink, uuid: str) -> None:
        domain = connection.lookupByUUIDString(uuid)
        if domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
            return
        definition = ET.fromstring(domain.XMLDesc())
        if definition.find("devices/interface[@type='network']") is not None:
            self._fabric.announce(uplink, addresses_of(definition))
