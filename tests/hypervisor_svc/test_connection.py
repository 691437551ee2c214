# SPDX-License-Identifier: Apache-2.0
"""The durations that `status` tells."""

from __future__ import annotations

import pytest

from hypervisor_svc.connection import Durations


def test_percentiles_of_all_and_of_the_last() -> None:
    durations = Durations()
    for milliseconds in range(1, 101):
        durations.add("out", milliseconds / 1e3)
    assert durations.summary() == {"out": {"samples": 100, "p50_us": 50_000, "p99_us": 99_000}}
    assert durations.summary(samples=3) == {"out": {"samples": 3, "p50_us": 99_000, "p99_us": 99_000}}


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_are_an_operators_mistake(samples: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        Durations().summary(samples)
