# SPDX-License-Identifier: Apache-2.0
"""A benchmark's part that runs in a VM, one whose clock counts instructions if it is to: the same file, started there with
`--inside`.

    outside:  found = counted.measure("tests.performance.warm", "--quick", timeout=600)
    inside:   counted.tell({"rows": [...]})"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.vm.other_kernel import OtherKernel

KERNEL = "6.12"
_MARK = "RESULT "


def measure(
    module: str, *arguments: str, modules: tuple[str, ...] = ("socket_offload",), timeout: float, counted: bool = True
) -> Any:
    """Run the module's inside, with kernel modules of ours loaded; what it told. Raises RuntimeError with its last words."""
    command = [sys.executable, "-m", module, "--inside", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        status = OtherKernel(KERNEL, modules, counted=counted).run(command, timeout=timeout, output=output)
        text = output.read_text()
    if status:
        raise RuntimeError(f"the VM's part ended with {status}:\n{text[-3000:]}")
    return json.loads(text.split(_MARK, 1)[1].splitlines()[0])


def tell(result: Any) -> None:
    """From inside: the result, as JSON."""
    print(_MARK + json.dumps(result), flush=True)
