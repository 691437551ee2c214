# SPDX-License-Identifier: Apache-2.0
"""Many migrations to and fro, under all the load of a busy VM; and one connection that lives through five."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.audience import Crowd
from tests.vm.libvirt_host import wait_for
from tests.vm.moving import assert_unharmed, moving
from tests.vm.two_hosts import TwoHosts

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.long, pytest.mark.timeout(2400)]

CROWD = Crowd(segments=15, lives=10, files=10)
SLOW = 5
LARGEST = 64_000_000


@pytest.mark.parametrize(("mode", "moves"), [("routed", 20), ("bridged", 6)])
def test_to_and_fro_under_load(mode: str, moves: int, two_hosts: TwoHosts, tmp_path: Path) -> None:
    with moving(two_hosts, tmp_path, mode) as machine:
        files = [product.open_files() for product in machine.products]
        with machine.watched(CROWD, slow=SLOW) as watchers:
            for number in range(moves):
                print(number, machine.move().last)
                watchers.wait_out(machine.here)
            found = watchers.stop()
        assert_unharmed(found)
        machine.here.wait_home()
        for product, before in zip(machine.products, files, strict=True):
            assert product.redirects() == []
            assert product.open_files() <= before + 2  # the channel is where the VM is


def test_one_download_through_five_migrations(two_hosts: TwoHosts, tmp_path: Path) -> None:
    with moving(two_hosts, tmp_path, "routed") as machine:
        blob, target = os.urandom(LARGEST), tmp_path / "got.bin"
        (machine.share / "large.bin").write_bytes(blob)
        curl = ("curl", "-sSf", "--max-time", "300", "--limit-rate", "600k", "-o", str(target))
        url = f"http://{machine.address}/large.bin"
        with subprocess.Popen(two_hosts.fabric.client.command(*curl, url), stderr=subprocess.PIPE) as download:
            try:
                for _ in range(5):
                    wait_for(lambda: machine.here.machine()["connections_out"] == 1, seconds=60, what="the transfer is out")
                    machine.move()
                wait_for(lambda: machine.here.machine()["connections_out"] == 1, seconds=60, what="the transfer is out")
                assert download.poll() is None, "it was over before the fifth migration"
                _, words = download.communicate(timeout=200)
                assert download.returncode == 0, words
            finally:
                download.kill()
        assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(blob).digest()
