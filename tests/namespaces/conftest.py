# SPDX-License-Identifier: Apache-2.0
"""What all tests of a moving guest stand on; `share` is a module's own where it wants other files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client import make_content
from tests.namespaces.two_hosts import SIZE, TwoHosts, two_hosts


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 1 kB to SIZE, named by their sizes."""
    folder = tmp_path_factory.mktemp("share")
    make_content(str(folder), (1000, 1_400_000, SIZE))
    return folder


@pytest.fixture
def hosts(tmp_path: Path, share: Path) -> Iterator[TwoHosts]:
    """Everything is up, and the guest is at host a."""
    with two_hosts(tmp_path, share) as made:
        yield made
