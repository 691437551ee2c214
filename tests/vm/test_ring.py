# SPDX-License-Identifier: Apache-2.0
"""A ring in a share: a guest writes it over 9p, a relay on this side reads it from the page cache at the same time."""

from __future__ import annotations

import asyncio
import os
import struct
import sys
from pathlib import Path

import pytest

from guest_agent.ring import Ring
from hypervisor_svc.splice import Left, RingSource
from tests.hypervisor_svc.splice_bench import bench
from tests.vm.other_kernel import OtherKernel

pytestmark = pytest.mark.root

SIZE, BLOCK, BLOCKS = 2 << 20, 20_000, 500
WRITER = f"""
import struct, time
from guest_agent.ring import Ring
with Ring("/outside/ring") as ring:
    for block in range({BLOCKS}):
        first = block * {BLOCK // 8}
        ring.write(struct.pack(">{BLOCK // 8}Q", *range(first, first + {BLOCK // 8})))
        time.sleep(0.002)
    ring.end()
"""


def test_what_a_guest_writes_is_what_sinks_get(tmp_path: Path) -> None:
    path = tmp_path / "ring"
    Ring(path, size=SIZE).close()

    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with bench(RingSource(os.open(path, os.O_RDONLY), 0)) as made:
            listeners = [made.listen() for _ in range(3)]
            command = [sys.executable, "-c", WRITER]
            guest = loop.run_in_executor(None, lambda: OtherKernel("6.12").run(command, timeout=200, outside=[path]))
            assert await guest == 0
            await made.until(lambda: all(one.left for one in listeners), "the ring's end")
            assert {one.left for one in listeners} == {(Left.SOURCE_ENDED, 0)}
            whole = struct.pack(f">{BLOCKS * BLOCK // 8}Q", *range(BLOCKS * BLOCK // 8))
            await made.until(lambda: all(len(one.got) == len(whole) for one in listeners), "every byte")
            assert all(one.got == whole for one in listeners)
            assert made.session.status().source_dropped == {}

    asyncio.run(asyncio.wait_for(test(), 280))
