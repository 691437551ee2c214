# SPDX-License-Identifier: Apache-2.0
"""A VM moves to another hypervisor and back while it is watched: no failed request, no wrong byte, no reset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.audience import Crowd
from tests.vm.libvirt_host import wait_for
from tests.vm.moving import Moving, assert_unharmed, moving
from tests.vm.two_hosts import TwoHosts

pytestmark = [pytest.mark.vm, pytest.mark.root]

SMALL = Crowd(segments=6, lives=2, files=2)


@pytest.fixture(scope="module", params=["routed", pytest.param("bridged", marks=pytest.mark.long)])
def machine(request: pytest.FixtureRequest, two_hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moving]:
    """A VM on the first of two hypervisors."""
    with moving(two_hosts, tmp_path_factory.mktemp(request.param), request.param) as scene:
        yield scene


def test_there_and_back(machine: Moving) -> None:
    with machine.watched(SMALL, slow=1) as watchers:
        for _ in range(2):
            machine.move()
            watchers.wait_out(machine.here)
        found = watchers.stop()
    assert_unharmed(found)
    machine.here.wait_home()
    assert machine.here.redirects() == machine.there.redirects() == []


def test_cancelled_while_memory_is_copied(machine: Moving, tmp_path: Path) -> None:
    """It stays, and everything is handed out again."""
    with machine.watched(SMALL) as watchers:
        product = machine.here
        process = machine.begin("--bandwidth", "8")
        wait_for(lambda: product.machine()["presence"] == "loose", seconds=60, what="the VM has let go")
        machine.cancel(process)
        cancelled = machine.end(process)
        assert (cancelled.status, cancelled.last["moved"], machine.here) == (1, False, product), cancelled
        wait_for(lambda: product.machine()["presence"] == "here", seconds=60, what="the VM is here again")
        watchers.wait_out(product)
        found = watchers.stop()
    assert_unharmed(found)
