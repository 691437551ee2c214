# SPDX-License-Identifier: Apache-2.0
"""The modules' own tests, on both kernels; a kernel that complains (WARNING, BUG, Call Trace) fails too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.vm.other_kernel import OtherKernel

pytestmark = pytest.mark.root


@pytest.mark.parametrize("series", ["6.1", "6.12"])
def test_socket_offload(series: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb", "short", "tests/host_module"]
    status = OtherKernel(series, ("socket_offload",)).run(command, timeout=280, output=output)
    print(output.read_text())
    assert status == 0
    assert "passed" in output.read_text()
