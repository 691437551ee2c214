# SPDX-License-Identifier: Apache-2.0
"""Without root only the pure tests run. With root nothing is skipped: a missing part is a failure.

`./run test` lets two workers (pytest-xdist) share the tests: those of the modules, which run on other kernels in VMs of their own,
go beside all the rest, which use one network and one libvirt and so run one after the other."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

settings.register_profile("streamlift", deadline=None)
settings.load_profile("streamlift")


class Beside(LoadScopeScheduling):  # type: ignore[misc]
    """Which worker takes a test: all of a scope go to one."""

    def _split_scope(self, nodeid: str) -> str:
        return "kernels" if nodeid.startswith("tests/vm/test_modules.py") else "host"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Beside:
    """With -n."""
    return Beside(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs root for those who are not."""
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root: sudo ./run test")
    for item in items:
        if item.get_closest_marker("root") or item.get_closest_marker("vm"):
            item.add_marker(skip)
