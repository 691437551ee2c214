# SPDX-License-Identifier: Apache-2.0
"""The three set-ups of Jeong 2015 side by side: the VM alone, offloaded, and the same media server on bare metal. One
hypervisor, one folder, one client."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.vm.libvirt_host import HOST_ADDRESSES, LibvirtHost, wait_for
from tests.vm.product import ROOT, Product

NAMES = {"vm": "VM alone", "offload": "offloaded", "metal": "bare metal"}
MACHINE = "tv1"
ADDRESS = "10.78.0.2"
PLAIN_PORT = 8080


@contextlib.contextmanager
def product_on_host(folder: Path, share: Path, *, extra: str = "") -> Iterator[Product]:
    """libvirt and the service, in namespaces of their own."""
    with LibvirtHost() as host:
        product = Product(host, folder, share, extra=extra)
        product.start()
        try:
            yield product
        finally:
            product.stop()


@contextlib.contextmanager
def virtual_machine(product: Product, *options: str) -> Iterator[str]:
    """Deployed by the command line, as an operator does, and ready; the accelerator that was chosen."""
    made = product.command("deploy", MACHINE, "--share", str(product.share), *options)
    try:
        product.wait_ready(ADDRESS)
        yield "kvm" if "(kvm)" in made else "tcg"
    finally:
        product.command("undeploy", MACHINE)


@contextlib.contextmanager
def bare_metal(host: LibvirtHost, share: Path, log: Path) -> Iterator[dict[str, str]]:
    """The media server on the hypervisor itself too; the servers' addresses by set-up."""
    argv = [sys.executable, "-m", "guest_agent.examples.media_server", "--root", str(share), "--port", str(PLAIN_PORT)]
    with log.open("wb") as output:
        server = host.start(*argv, "--no-offload", output=output, environment={"PYTHONPATH": str(ROOT)})
    try:
        wait_for(lambda: b"serving" in log.read_bytes(), seconds=60, what="the media server on bare metal")
        ports = (f"{ADDRESS}:{PLAIN_PORT}", f"{ADDRESS}:80", f"{HOST_ADDRESSES[0]}:{PLAIN_PORT}")
        yield dict(zip(NAMES, ports, strict=True))
    finally:
        host.namespaces.signal(server, signal.SIGTERM)


def caveat(accelerator: str) -> str:
    """What the figures cannot show."""
    if accelerator == "kvm":
        return "Client, hypervisor and VM share this machine's processors."
    return "No KVM here: QEMU emulates the VM's processors; the VM alone and the guest's part of a handoff are far slower for it."
