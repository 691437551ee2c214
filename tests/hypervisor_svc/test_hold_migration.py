# SPDX-License-Identifier: Apache-2.0
"""When QEMU is held; that it is, the migrations of VMs show."""

from __future__ import annotations

import pytest

from hypervisor_svc.hold_migration import copies, nears_end


@pytest.mark.parametrize(
    ("stats", "begun", "near"),
    [
        ({}, False, False),
        ({"data_total": 0, "data_remaining": 0, "memory_bps": 1 << 20}, False, False),
        ({"data_total": 1 << 30, "data_remaining": 1 << 29}, True, False),
        ({"data_total": 1 << 30, "data_remaining": 1 << 29, "memory_bps": 1 << 30}, True, False),
        ({"data_total": 1 << 30, "data_remaining": 1 << 27, "memory_bps": 1 << 30}, True, True),
        ({"data_total": 1 << 30, "data_remaining": 0}, True, True),
    ],
)
def test_when_it_is_held(stats: dict[str, int], begun: bool, near: bool) -> None:
    assert (copies(stats), nears_end(stats)) == (begun, near)
