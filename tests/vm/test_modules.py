# SPDX-License-Identifier: Apache-2.0
"""The modules' own tests, on both kernels; a kernel that complains (WARNING, BUG, Call Trace) fails too."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.vm.other_kernel import ROOT, OtherKernel
from vm_images import build, module

pytestmark = pytest.mark.root

SERIES = ("6.1", "6.12")

CROSS = {"6.1": "socket_offload/tcp_repair", "6.12": "tcp_repair/socket_offload"}
"""Guest's and host's backend; which kernel gets which mixed pair is nothing to them."""
EVERY_BYTE = "every_byte and routed-nat-ipv4"
CHOSEN = {"6.1": f"{EVERY_BYTE} or closes_its_side", "6.12": "every_byte and bridged-transparent-ipv6 or by_the_operator"}


RELAYED = {"6.1": "every_byte", "6.12": "stalls or operator"}


def pytest_command(*arguments: str) -> str:
    """For a shell."""
    return shlex.join([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb", "short", *arguments])


def run_inside(series: str, output: Path, script: str, *, name: str = "socket_offload", timeout: float = 280) -> str:
    """On that kernel with that module; what it printed. A kernel that complained fails."""
    status = OtherKernel(series, (name,)).run(["sh", "-c", f"set -e; {script}"], timeout=timeout, output=output)
    text = output.read_text()
    print(text)
    assert status == 0
    return text


@pytest.mark.parametrize("name", ["socket_offload", "omss"])
@pytest.mark.parametrize("series", SERIES)
def test_sparse(series: str, name: str, tmp_path: Path) -> None:
    """Address spaces, byte orders and locks, as sparse(1) sees them; the build itself takes a warning (W=1) for an error."""
    source = ROOT / "host_module" / name
    assert module.sparse(source, tree=build.headers(build.kernel(series)), directory=tmp_path) == []


@pytest.mark.parametrize("series", SERIES)
def test_socket_offload(series: str, tmp_path: Path) -> None:
    """The state matrix, and the calls."""
    text = run_inside(series, tmp_path / "output", pytest_command("tests/host_module/socket_offload"))
    passed = re.search(r"(\d+) passed", text)
    assert passed is not None
    assert int(passed[1]) >= 228, "the state matrix alone has as many"


@pytest.mark.parametrize("series", SERIES)
def test_omss(series: str, tmp_path: Path) -> None:
    """Streams, ends, loads under traffic; a little nonsense; and live streams through the whole product."""
    suites = [f"tests/host_module/omss/test_{name}.py" for name in ("sessions", "ends", "shortage")]
    script = f"""{pytest_command(*suites)}
        {sys.executable} -m tests.host_module.omss.fuzz --minutes 0.1
        STREAMLIFT_RELAY_ENGINE=omss {pytest_command("tests/namespaces/test_relay.py", "-k", RELAYED[series])}
        rmmod omss"""
    text = run_inside(series, tmp_path / "output", script, name="omss")
    passed = [int(count) for count in re.findall(r"(\d+) passed", text)]
    assert passed[0] >= 40 and passed[1] == 2


@pytest.mark.long
@pytest.mark.timeout(800)
@pytest.mark.parametrize("series", SERIES)
def test_omss_for_five_minutes(series: str, tmp_path: Path) -> None:
    """Sinks join, leave, stall and reset at random, and nobody else's stream changes."""
    script = f"{pytest_command('-m', 'long', 'tests/host_module/omss/test_sessions.py')}; rmmod omss"
    assert "1 passed" in run_inside(series, tmp_path / "output", script, name="omss", timeout=700)


@pytest.mark.parametrize("series", SERIES)
def test_end_to_end(series: str, tmp_path: Path) -> None:
    """The main job in namespaces: by the module on both sides, then by one backend on each."""
    suite = "tests/namespaces/test_end_to_end.py"
    script = f"""export STREAMLIFT_REQUESTS=150
        STREAMLIFT_BACKENDS=socket_offload/socket_offload {pytest_command(suite, "-k", CHOSEN[series])}
        STREAMLIFT_BACKENDS={CROSS[series]} {pytest_command(suite, "-k", EVERY_BYTE)}"""
    text = run_inside(series, tmp_path / "output", script)
    assert "2 passed" in text and "1 passed" in text


def test_command_line(tmp_path: Path) -> None:
    """`streamlift module` builds against installed headers, loads what it built, and knows it. One of them: an emulated compiler is
    slow."""
    tree = build.headers(build.kernel("6.12"))
    command = f"{sys.executable} -m hypervisor_svc module"
    script = f"{command} build socket_offload --headers {tree}; {command} load socket_offload; {command} status --json"
    output = tmp_path / "output"
    status = OtherKernel("6.12").run(["sh", "-c", f"set -e; {script}"], timeout=200, output=output)
    text = output.read_text()
    assert status == 0, text
    facts = json.loads(text.splitlines()[-1])
    assert [(one["built"], one["loaded"], one["used"]) for one in facts] == [(True, True, "socket_offload"), (False, False, "user")]
