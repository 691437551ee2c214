# SPDX-License-Identifier: Apache-2.0
"""What a kernel can lack or refuse, on a kernel of Debian's: each is answered by one message, the cause and the next command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests.vm.other_kernel import OtherKernel
from vm_images import build

pytestmark = [pytest.mark.root, pytest.mark.long]

FOREIGN, HERE = "6.1", "6.12"


def test_a_foreign_module_and_no_connection_tracking(tmp_path: Path) -> None:
    """omss.ko of another kernel, where ours is looked for; and nf_conntrack_netlink, which an administrator has forbidden."""
    foreign = build.module("omss", FOREIGN)
    product = shlex.join([sys.executable, "-m", "hypervisor_svc"])
    script = f"""
        updates=/lib/modules/$(uname -r)/updates
        mkdir -p $updates && cp {foreign} $updates && depmod
        {product} module load omss || true
        echo ==
        echo 'install nf_conntrack_netlink /bin/false' > /etc/modprobe.d/forbidden.conf
        {product} serve || true"""
    output = tmp_path / "output"
    assert OtherKernel(HERE).run(["sh", "-c", script], timeout=120, output=output) == 0
    module, tracking = (part.strip().splitlines() for part in output.read_text().split("==\n"))
    release = OtherKernel(HERE).kernel().release
    assert module == [f"streamlift: omss was not built for Linux {release}", "  sudo streamlift module build"]
    assert tracking[0].startswith("streamlift: the kernel does not answer for connection tracking")
    assert tracking[1] == "  sudo modprobe nf_conntrack_netlink"
