# SPDX-License-Identifier: Apache-2.0
"""QEMU copies memory and does not stop the VM before it may, by what libvirt can change of a migration that goes on.

    begin     from the start the VM may stand still for a millisecond at most (virDomainMigrateSetMaxDowntime): too little for what
              remains, at any speed of a VM that works
    brake     when little remains: empty pages go over in no time, so the end may be nearer than it seems. Clients are served
              meanwhile, and lose nothing by it
    hold      when what remains would go over soon: next to nothing is copied (virDomainMigrateSetMaxSpeed), so in that millisecond
              not even one page would be, and QEMU stops no VM that has a page left to copy
    stop      QEMU may stop the VM at once, if what remains goes over, at the speed that was seen, within the time that the VM may
              stand still. QEMU reckons with the speed of now, at which it is held: so it is given so many times that time
    release   as it was: QEMU copies until so little remains, stops the VM, copies that and is done

QEMU does what it knows of the speed, every tenth of a second (migration/migration.c, migration_update_counters). So the copying
begins as slowly as it is held, until the first limit is known."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import libvirt

HOLD_SPEED = 1
"""MiB a second: in DOWNTIME a quarter of a page."""
DOWNTIME = 1
"""Milliseconds."""
BRAKE_AT, HOLD_AT = 1.5, 0.8
"""Seconds of copying before its end, at the speed of each: QEMU is told in time."""
BRAKED = 4
BRAKED_LIMIT = BRAKED * BRAKE_AT
"""A braked migration copies so many times slower, for so many seconds at most: the VM may write as fast."""
MEASURED = 0.25
"""Seconds after which QEMU tells the speed of a braked migration."""
TICK = 0.1
"""Seconds between two looks of a held QEMU (migration/migration.c, BUFFER_DELAY)."""
LEAVES = 0.05
"""Seconds before the next of them in which the VM leaves: mostly enough, and its clients do not wait longer than they must."""
STOP_LIMIT = 0.3
"""Seconds that QEMU has to stop the VM at once; then it goes on as usual."""
_LONGEST_DOWNTIME = 2_000_000
"""Milliseconds (QEMU's MAX_MIGRATE_DOWNTIME)."""


class MigrationHold:
    """Of one domain. `bandwidth`: MiB a second at which it is to be copied (0: libvirt's default for it). All may raise
    libvirt.libvirtError."""

    def __init__(self, domain: libvirt.virDomain, bandwidth: int) -> None:
        self._domain = domain
        self._downtime: int = domain.migrateGetMaxDowntime()
        self.usual_speed: int = domain.migrateGetMaxSpeed()
        self._speed = bandwidth or self.usual_speed
        self._seen = 0

    def begin(self) -> None:
        """The migration goes on, at HOLD_SPEED."""
        self._domain.migrateSetMaxDowntime(DOWNTIME)
        self._domain.migrateSetMaxSpeed(self._speed)

    def brake(self, stats: dict[str, Any]) -> None:
        """See above; `stats` of virDomainGetJobStats."""
        self._seen = stats.get("memory_bps", 0)
        self._domain.migrateSetMaxSpeed(max(HOLD_SPEED, self._seen // BRAKED >> 20))

    def is_time(self, stats: dict[str, Any], braked: float) -> bool:
        """To hold, so many seconds after `brake`. Until QEMU has measured the new speed, what was seen before counts."""
        if braked < MEASURED:
            return bool(stats) and bool(stats.get("data_remaining", 0) <= self._seen * HOLD_AT / BRAKED)
        return braked > BRAKED_LIMIT or seconds_left(stats) <= HOLD_AT

    def hold(self) -> None:
        """See above."""
        self._domain.migrateSetMaxSpeed(HOLD_SPEED)

    def stop(self) -> None:
        """See above."""
        self._domain.migrateSetMaxDowntime(downtime_of_a_held(self._downtime, self._seen))

    def release(self) -> None:
        """The opposite of `begin`, `brake` and `hold`."""
        self._domain.migrateSetMaxDowntime(self._downtime)
        self._domain.migrateSetMaxSpeed(self._speed)

    def forget(self) -> None:
        """The VM has not moved. libvirt remembers how fast its next migration may be; the rest it resets by itself."""
        with contextlib.suppress(libvirt.libvirtError):
            self._domain.migrateSetMaxSpeed(self.usual_speed)


def downtime_of_a_held(allowed: int, speed: int) -> int:
    """Milliseconds in which as much goes over, at HOLD_SPEED, as in `allowed` ones at `speed` (bytes a second)."""
    return min(max(allowed, allowed * speed // (HOLD_SPEED << 20)), _LONGEST_DOWNTIME)


class Tick:
    """When QEMU, held, has just looked: then it copies at once what it may until the next time."""

    def __init__(self) -> None:
        self._before: int | None = None

    def is_now(self, stats: dict[str, Any]) -> bool:
        """`stats` of virDomainGetJobStats, a few milliseconds apart."""
        before, self._before = self._before, stats.get("data_processed", 0)
        return before is not None and before != self._before


def copies(stats: dict[str, Any]) -> bool:
    """Whether the copying has begun; of virDomainGetJobStats."""
    return bool(stats.get("data_total"))


def seconds_left(stats: dict[str, Any]) -> float:
    """Until what remains would be copied, at the speed of now."""
    remaining, speed = stats.get("data_remaining", 0), stats.get("memory_bps", 0)
    if not copies(stats) or (remaining and not speed):
        return math.inf
    return float(remaining / speed) if remaining else 0.0
