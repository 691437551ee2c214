# SPDX-License-Identifier: Apache-2.0
"""VMs, one fixture argument away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from hypervisor_svc.deploy import Deployed, Deployment, deploy, undeploy
from tests.vm.libvirt_host import LibvirtHost
from tests.vm.product import Product
from tests.vm.two_hosts import TwoHosts
from vm_images.build import Image, build

Deploy = Callable[..., Deployed]


@pytest.fixture(scope="session")
def libvirt_host() -> Iterator[LibvirtHost]:
    """A hypervisor in namespaces of its own, with a client namespace beside it."""
    with LibvirtHost() as host:
        yield host


@pytest.fixture(scope="session")
def two_hosts() -> Iterator[TwoHosts]:
    """Two hypervisors, the fabric between them, and clients."""
    with TwoHosts() as hosts:
        yield hosts


@pytest.fixture
def connection(libvirt_host: LibvirtHost) -> Iterator[libvirt.virConnect]:
    """A connection to its libvirtd."""
    with contextlib.closing(libvirt_host.connect()) as connection:
        yield connection


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """The folder that the test's VM shares with the host."""
    directory = tmp_path / "share"
    directory.mkdir()
    return directory


@pytest.fixture
def serve(libvirt_host: LibvirtHost, tmp_path: Path, share: Path) -> Iterator[Callable[..., Product]]:
    """`serve(extra="...")`: the service, with more lines in its configuration; it is stopped when the test ends."""
    with contextlib.ExitStack() as stack:

        def start(*, extra: str = "") -> Product:
            product = Product(libvirt_host, tmp_path, share, extra=extra)
            product.start()
            stack.callback(product.stop)
            return product

        yield start


@pytest.fixture(scope="session")
def image() -> Image:
    """The guest image with the default kernel."""
    return build()


@pytest.fixture
def deploy_machine(libvirt_host: LibvirtHost, connection: libvirt.virConnect, share: Path) -> Iterator[Deploy]:
    """`deploy_machine(image, name=..., ...)`: start a VM that is removed when the test ends."""
    with contextlib.ExitStack() as stack:

        def start(image: Image, *, name: str = "guest", **options: object) -> Deployed:
            settings = {"share_directory": share, "machines": libvirt_host.machines, **options}
            deployed = deploy(connection, Deployment(name=name, image=image, **settings))  # type: ignore[arg-type]
            stack.callback(_undeploy_if_there, libvirt_host, name)
            return deployed

        yield start


def _undeploy_if_there(host: LibvirtHost, name: str) -> None:
    with contextlib.closing(host.connect()) as connection:
        if any(domain.name() == name for domain in connection.listAllDomains()):
            undeploy(connection, name)
