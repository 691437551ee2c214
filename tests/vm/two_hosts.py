# SPDX-License-Identifier: Apache-2.0
"""Two hypervisors that share their storage, and the fabric between them: VMs move from one to the other, and back."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import libvirt

from tests.vm.announcer import Announcer
from tests.vm.fabric import Fabric
from tests.vm.libvirt_host import LibvirtHost


class TwoHosts:
    """A context manager: `first`, `second` and `fabric`. VMs' files (/var/lib/streamlift) are the same on both."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> TwoHosts:
        with contextlib.ExitStack() as stack:
            storage = Path(tempfile.mkdtemp(prefix="streamlift-storage-"))
            stack.callback(shutil.rmtree, storage, ignore_errors=True)
            self.fabric = stack.enter_context(Fabric())
            announcer = stack.enter_context(contextlib.closing(Announcer(self.fabric)))
            names = ("streamlift-first", "streamlift-second")
            hosts = [stack.enter_context(LibvirtHost(name=name, fabric=self.fabric, storage=storage)) for name in names]
            for host in hosts:
                announcer.watch(host.uri, host.uplink)
            self.first, self.second = hosts
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def share_network(self, name: str) -> None:
        """A libvirt network of the first host on the second too, with the same bridge, addresses and MAC address: the VM's
        gateway is the same wherever it runs."""
        with contextlib.closing(self.first.connect()) as source, contextlib.closing(self.second.connect()) as target:
            definition = source.networkLookupByName(name).XMLDesc(libvirt.VIR_NETWORK_XML_INACTIVE)
            target.networkDefineXML(definition).create()

    def drop_network(self, name: str) -> None:
        """Where it is left."""
        for host in (self.first, self.second):
            with contextlib.closing(host.connect()) as connection, contextlib.suppress(libvirt.libvirtError):
                network = connection.networkLookupByName(name)
                network.destroy()
                network.undefine()
