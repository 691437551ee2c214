# SPDX-License-Identifier: Apache-2.0
"""Tests of the modules run where the modules are: in VMs, started by `tests/vm/test_modules.py`."""

from pathlib import Path

collect_ignore_glob = []
if not Path("/dev/socket_offload").exists():
    collect_ignore_glob += [f"socket_offload/test_{name}.py" for name in ("state", "calls", "frozen", "two_minutes")]
if not Path("/sys/module/omss").exists():
    collect_ignore_glob += ["omss/test_sessions.py", "omss/test_ends.py", "omss/test_shortage.py"]
