# SPDX-License-Identifier: Apache-2.0
"""When QEMU is held; that it is, the migrations of VMs show."""

from __future__ import annotations

import math

import pytest

from hypervisor_svc.hold_migration import (
    BRAKED_LIMIT,
    HOLD_SPEED,
    MigrationHold,
    Tick,
    copies,
    downtime_of_a_held,
    seconds_left,
)


@pytest.mark.parametrize(
    ("stats", "begun", "seconds"),
    [
        ({}, False, math.inf),
        ({"data_total": 0, "data_remaining": 0, "memory_bps": 1 << 20}, False, math.inf),
        ({"data_total": 1 << 30, "data_remaining": 1 << 29}, True, math.inf),
        ({"data_total": 1 << 30, "data_remaining": 1 << 29, "memory_bps": 1 << 30}, True, 0.5),
        ({"data_total": 1 << 30, "data_remaining": 0}, True, 0.0),
    ],
)
def test_how_near_the_end_is(stats: dict[str, int], begun: bool, seconds: float) -> None:
    assert (copies(stats), seconds_left(stats)) == (begun, seconds)


@pytest.mark.parametrize(
    ("allowed", "speed", "milliseconds"),
    [(300, 200 << 20, 300 * 200), (300, 0, 300), (300, HOLD_SPEED << 20, 300), (2000, 100 << 30, 2_000_000)],
)
def test_how_long_a_held_vm_may_stand_still(allowed: int, speed: int, milliseconds: int) -> None:
    """As much goes over meanwhile as at the usual speed within the usual time; QEMU has a limit."""
    assert downtime_of_a_held(allowed, speed) == milliseconds


class _Domain:
    """What a hold asks of libvirt, for the arithmetic."""

    def migrateGetMaxDowntime(self) -> int:
        return 300

    def migrateGetMaxSpeed(self) -> int:
        return 1000

    def migrateSetMaxSpeed(self, speed: int) -> None:
        self.speed = speed


@pytest.mark.parametrize(
    ("remaining", "speed", "braked", "time"),
    [
        (300, 400, 0.1, False),  # it is still the speed of before
        (80, 400, 0.1, True),
        (300, 100, 0.5, False),
        (80, 100, 0.5, True),
        (300, 100, BRAKED_LIMIT - 0.1, False),
        (300, 100, BRAKED_LIMIT + 0.1, True),
    ],
)
def test_when_a_braked_migration_is_held(remaining: int, speed: int, braked: float, time: bool) -> None:
    hold = MigrationHold(_Domain(), 0)
    hold.brake({"memory_bps": 400 << 20})
    stats = {"data_total": 1 << 30, "data_remaining": remaining << 20, "memory_bps": speed << 20}
    assert hold.is_time(stats, braked) is time


def test_a_tick_is_seen_by_what_is_copied() -> None:
    """The first look has nothing to compare with."""
    tick = Tick()
    assert [tick.is_now({"data_processed": done}) for done in (100, 100, 200, 200, 300)] == [False, False, True, False, True]
