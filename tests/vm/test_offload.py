# SPDX-License-Identifier: Apache-2.0
"""The whole product with a real VM: requests through a Debian guest, every answer hashed, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client import make_content
from tests.vm.conftest import Deploy, Product
from vm_images.build import build

pytestmark = [pytest.mark.vm, pytest.mark.root]

SIZES = (0, 1, 4096, 65_535, 65_536, 100_000, 288_600, 1_400_000, 10_500_000, 64_000_000)
ADDRESS4, ADDRESS6 = "10.78.0.2", "fd78::2"
TRANSPARENT = '[redirect]\nmode = "transparent"\n'

Serve = Callable[..., Product]


def assert_offloaded(product: Product, address: str, *, least: float = 0.99) -> None:
    """Server and service tell the same story: nearly all above the threshold went through the host, and all came home."""
    product.wait_home()
    counters, machine = product.counters(address), product.status()["machines"][0]
    local = {reason: count for reason, count in counters["local"].items() if reason != "too_small"}
    assert counters["failed"] == machine["failed"] == 0
    assert counters["offloaded"] >= least * (counters["offloaded"] + sum(local.values())), local
    assert machine["handed_out"] == machine["handed_back"] == counters["offloaded"], (machine, counters)
    assert machine["ended"] == 0 and machine["refused"] == {}, machine


@pytest.mark.parametrize(
    ("kernel", "address", "requests", "extra"),
    [
        pytest.param("6.12", ADDRESS4, 2000, "", id="6.12-ipv4"),
        pytest.param("6.1", ADDRESS6, 500, "", id="6.1-ipv6"),
        pytest.param("6.12", ADDRESS4, 300, TRANSPARENT, id="transparent-6.12-ipv4"),
    ],
)
def test_every_byte_of_many_requests(
    kernel: str, address: str, requests: int, extra: str, share: Path, serve: Serve, deploy_machine: Deploy
) -> None:
    make_content(str(share), SIZES)
    product = serve(extra=extra)
    deploy_machine(build(kernel))
    product.wait_ready(address)
    before = product.open_files()
    report = product.load(address, requests=requests, connections=50)
    assert report["errors"] == 0, report["first_errors"]
    assert report["requests"] >= requests
    assert_offloaded(product, address)
    assert product.redirects() == []
    assert product.open_files() == before
