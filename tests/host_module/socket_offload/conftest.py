# SPDX-License-Identifier: Apache-2.0
"""What every test of the module needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guest_agent.handoff.socket_offload import Device
from tests.guest_agent.handoff.loopback import KINDS
from tests.host_module.socket_offload.connections import Pair, connected


@pytest.fixture
def device() -> Iterator[Device]:
    """The module, opened."""
    opened = Device()
    yield opened
    opened.close()


@pytest.fixture(params=sorted(KINDS))
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A connection of each kind."""
    with connected(request.param) as made:
        yield made
