# SPDX-License-Identifier: Apache-2.0
"""Without root only the pure tests run. With root nothing is skipped: a missing part is a failure."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs root for those who are not."""
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root: sudo ./run test")
    for item in items:
        if item.get_closest_marker("root") or item.get_closest_marker("vm"):
            item.add_marker(skip)
