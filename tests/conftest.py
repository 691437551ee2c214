# SPDX-License-Identifier: Apache-2.0
"""Without root only the pure tests run. With root nothing is skipped: a missing part is a failure.

`./run test` lets two workers (pytest-xdist) share the tests by group: what runs on other kernels, in VMs of its own, goes beside
all the rest, whose tests use one network and one libvirt and so run one after the other."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

settings.register_profile("streamlift", deadline=None)
settings.load_profile("streamlift")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what named no group into one; skip what needs root for those who are not."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group("host"))
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root: sudo ./run test")
    for item in items:
        if item.get_closest_marker("root") or item.get_closest_marker("vm"):
            item.add_marker(skip)
