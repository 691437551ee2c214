# SPDX-License-Identifier: Apache-2.0
"""What QEMU's own monitor tells of a VM that libvirt does not manage: a real QEMU, with nothing in it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from hypervisor_svc.monitor import Monitor

pytestmark = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Path]:
    """The folder with two monitors of a machine that is about to run: `watched` and `ours`."""
    argv = ["qemu-system-x86_64", "-accel", "tcg", "-M", "q35", "-m", "64", "-nodefaults", "-display", "none", "-S"]
    for name in ("watched", "ours"):
        argv += ["-qmp", f"unix:{tmp_path}/{name},server=on,wait=off"]
    with subprocess.Popen(argv) as process:
        try:
            yield tmp_path
        finally:
            process.kill()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def ours(folder: Path):  # type: ignore[no-untyped-def]
    client = QMPClient("test")
    while True:
        try:
            await client.connect(str(folder / "ours"))
            break
        except Exception:
            client = QMPClient("test")
            await asyncio.sleep(0.05)
    try:
        yield client
    finally:
        await client.disconnect()


def test_pause_and_migrations(machine: Path) -> None:
    heard: list[object] = []

    async def test() -> None:
        monitor = Monitor(
            str(machine / "watched"),
            on_migrating=lambda: heard.append("migrating"),
            on_stays=lambda: heard.append("stays"),
            on_paused=heard.append,
        )
        monitor.start()
        async with ours(machine) as client:
            await until(lambda: heard == [True])  # -S: it has not been started
            await client.execute("cont")
            await until(lambda: heard[-1] is False)
            await client.execute("stop")
            await until(lambda: heard[-1] is True)
            await client.execute("cont")
            await until(lambda: heard[-1] is False)
            await client.execute("migrate-set-parameters", {"max-bandwidth": 1})
            await client.execute("migrate", {"uri": "exec:cat > /dev/null"})
            await until(lambda: "migrating" in heard)
            await client.execute("migrate_cancel")
            await until(lambda: heard[-1] == "stays")
        await monitor.stop()

    asyncio.run(test())
    assert heard[:5] == [True, False, True, False, "migrating"]


def test_a_monitor_that_is_not_there_yet(machine: Path, tmp_path: Path) -> None:
    """It is looked for again and again."""
    heard: list[object] = []

    async def test() -> None:
        path = tmp_path / "later"
        monitor = Monitor(
            str(path), on_migrating=lambda: heard.append("migrating"), on_stays=lambda: None, on_paused=heard.append
        )
        monitor.start()
        await asyncio.sleep(0.1)
        path.symlink_to(machine / "watched")
        await until(lambda: heard == [True])
        await monitor.stop()

    asyncio.run(test())
