# SPDX-License-Identifier: Apache-2.0
"""Which of a stranger's migrations concern us."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from guest_agent.handoff.presence import Presence
from hypervisor_svc.connection import Guest
from hypervisor_svc.domains import Machine
from hypervisor_svc.foreign_moves import ForeignMoves
from hypervisor_svc.guests import Guests


def machine() -> Guest:
    return Guest(Machine("vm", "uuid", "/nowhere", None, ("192.0.2.1",)))


@pytest.mark.parametrize(
    ("presence", "draining", "concerns"),
    [(Presence.HERE, False, True), (Presence.HERE, True, False), (Presence.AWAY, False, False), (Presence.LEAVING, True, False)],
)
def test_only_of_one_that_is_here(presence: Presence, draining: bool, concerns: bool) -> None:
    """Nobody answers on its channel, so it is left alone then; but it is tried, once."""
    guest = machine()
    guest.presence, guest.draining = presence, draining

    async def test() -> None:
        moves = ForeignMoves(cast(Guests, cast(Any, [guest])))
        moves.begins("uuid")
        moves.begins("uuid")
        moves.begins("another")
        assert list(moves._tasks) == (["uuid"] if concerns else [])
        await asyncio.sleep(0)
        moves.gone("uuid")
        assert not moves._tasks

    asyncio.run(test())
