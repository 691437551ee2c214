# SPDX-License-Identifier: Apache-2.0
"""The modules' own tests, on both kernels; a kernel that complains (WARNING, BUG, Call Trace) fails too."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.host_module.socket_offload import across
from tests.vm.other_kernel import ROOT, OtherKernel
from vm_images import build, module

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

SERIES = ("6.1", "6.12")

CELLS = {"6.1": "0/2", "6.12": "1/2"}
"""Which half of the state matrix runs where; `-m long` runs all on both."""
CROSS = {"6.1": "socket_offload/tcp_repair", "6.12": "tcp_repair/socket_offload"}
"""Guest's and host's backend; which kernel gets which mixed pair is nothing to them."""
EVERY_BYTE = "every_byte and routed-nat-ipv4"
CHOSEN = {"6.1": f"{EVERY_BYTE} or closes_its_side", "6.12": "every_byte and bridged-transparent-ipv6 or by_the_operator"}


FOLDER, END_TO_END = "tests/host_module/socket_offload", "tests/namespaces/test_end_to_end.py"
TWO_MINUTES = f"{FOLDER}/test_two_minutes.py"
ACROSS = "tests.host_module.socket_offload.across"
GIVE = f"{sys.executable} -m {ACROSS} give"

RELAYED = {"6.1": "every_byte", "6.12": "stalls or operator"}


def pytest_command(*arguments: str) -> str:
    """For a shell; what it need not load it does not."""
    bare = ["env", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1", sys.executable, "-m", "pytest", "-p", "pytest_timeout"]
    return shlex.join([*bare, "-q", "-p", "no:cacheprovider", "--tb", "short", *arguments])


def run_inside(series: str, output: Path, script: str, *, name: str = "socket_offload", timeout: float = 580) -> str:
    """On that kernel with that module; what it printed. A kernel that complained fails."""
    status = OtherKernel(series, (name,)).run(["sh", "-c", f"set -e; {script}"], timeout=timeout, output=output)
    text = output.read_text()
    print("\n".join(line for line in text.splitlines() if not line.startswith(across.MARK)))
    assert status == 0
    return text


@pytest.fixture(scope="module")
def gifts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file a series: what that kernel printed, and among it the connections that it gave away (`across.py`)."""
    return tmp_path_factory.mktemp("gifts")


@pytest.mark.parametrize("series", SERIES)
def test_socket_offload(series: str, gifts: Path) -> None:
    """Half of the state matrix, the calls, what frozen means; connections for the other kernel; then the main job in namespaces, by
    the module on both sides, and by one backend on each. Beside all that two minutes frozen."""
    script = f"""{pytest_command(TWO_MINUTES)} > /run/two_minutes 2>&1 & waiter=$!
        STREAMLIFT_CELLS={CELLS[series]} {pytest_command(FOLDER, "--ignore", TWO_MINUTES)}
        {GIVE}
        export STREAMLIFT_REQUESTS=100
        STREAMLIFT_BACKENDS=socket_offload/socket_offload {pytest_command(END_TO_END, "-k", CHOSEN[series])}
        STREAMLIFT_BACKENDS={CROSS[series]} {pytest_command(END_TO_END, "-k", EVERY_BYTE)}
        wait $waiter || {{ cat /run/two_minutes; exit 1; }}
        tail -1 /run/two_minutes"""
    text = run_inside(series, gifts / series, script)
    suite, by_module, by_each, two_minutes = (int(count) for count in re.findall(r"(\d+) passed", text))
    assert suite >= 114, "half of the state matrix alone has as many"
    assert (by_module, by_each, two_minutes) == (2, 1, 1)


@pytest.mark.parametrize("series", SERIES)
def test_connections_of_the_other_kernel(series: str, gifts: Path, tmp_path: Path) -> None:
    """What it gave away goes on here, whichever backend gave it and takes it."""
    (other,) = set(SERIES) - {series}
    if not (gifts / other).exists():
        run_inside(other, gifts / other, GIVE)
    text = run_inside(series, tmp_path / "output", f"{sys.executable} -m {ACROSS} take {gifts / other}")
    assert f"{sum(len(across.takers(state, data)) for _, _, state, data in across.CELLS)} connections went on" in text


@pytest.mark.parametrize("series", SERIES)
def test_omss(series: str, tmp_path: Path) -> None:
    """Streams, ends, loads under traffic; a little nonsense; and live streams through the whole product."""
    suites = [f"tests/host_module/omss/test_{name}.py" for name in ("sessions", "ends")]
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
def test_omss_in_want(series: str, tmp_path: Path) -> None:
    """Too little memory, too few workers; and listeners of the whole product that come and go."""
    script = f"""{pytest_command("tests/host_module/omss/test_shortage.py")}
        STREAMLIFT_RELAY_ENGINE=omss {pytest_command("tests/namespaces/test_disturbed_relay.py")}
        rmmod omss"""
    text = run_inside(series, tmp_path / "output", script, name="omss", timeout=600)
    assert [int(count) for count in re.findall(r"(\d+) passed", text)] == [2, 1]


@pytest.mark.long
@pytest.mark.timeout(800)
@pytest.mark.parametrize("series", SERIES)
def test_omss_for_five_minutes(series: str, tmp_path: Path) -> None:
    """Sinks join, leave, stall and reset at random, and nobody else's stream changes."""
    script = f"{pytest_command('-m', 'long', 'tests/host_module/omss/test_sessions.py')}; rmmod omss"
    assert "1 passed" in run_inside(series, tmp_path / "output", script, name="omss", timeout=700)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backends", ["socket_offload/socket_offload", *CROSS.values()])
@pytest.mark.parametrize("series", SERIES)
def test_the_whole_suite_end_to_end(series: str, backends: str, tmp_path: Path) -> None:
    """By the module, and with each backend on either side. (What the service remembers is bounded, but full only after more
    handoffs than an emulator does: how its memory grows says nothing here.)"""
    script = f"STREAMLIFT_REQUESTS=150 STREAMLIFT_BACKENDS={backends} {pytest_command(END_TO_END, '-k', 'not memory')}"
    assert re.search(r"\d+ passed", run_inside(series, tmp_path / "output", script, timeout=3000))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("series", SERIES)
def test_the_whole_state_matrix(series: str, tmp_path: Path) -> None:
    """Every cell, to a new socket and in place."""
    text = run_inside(series, tmp_path / "output", pytest_command(f"{FOLDER}/test_state.py"), timeout=800)
    assert "229 passed" in text


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("series", SERIES)
def test_two_hundred_loads(series: str, tmp_path: Path) -> None:
    """And as many unloads, under traffic."""
    script = f"STREAMLIFT_LOADS=200 {pytest_command(FOLDER, '-k', 'loads_and_unloads')}"
    assert "1 passed" in run_inside(series, tmp_path / "output", script, timeout=800)


@pytest.mark.parametrize("built", ["elsewhere", pytest.param("here", marks=pytest.mark.long)])
def test_command_line(built: str, tmp_path: Path) -> None:
    """`streamlift module` builds against installed headers (`-m long`: an emulated compiler takes minutes), loads what is built,
    and knows it. Another version, and a kernel that lets nobody load one (lockdown), mean tcp_repair, and it is said why."""
    tree = build.headers(build.kernel("6.12"))
    command = f"{sys.executable} -m hypervisor_svc module"
    copy = f"install -D {build.module('socket_offload', '6.12')} /lib/modules/$(uname -r)/updates/socket_offload.ko; depmod"
    make = f"{command} build socket_offload --headers {tree}" if built == "here" else copy
    script = f"""{make}; {command} load socket_offload; {command} status --json
        rmmod socket_offload; insmod {of_another_version(tree, tmp_path / "other")}; {command} status --json; rmmod socket_offload
        mount -t securityfs none /sys/kernel/security; echo integrity > /sys/kernel/security/lockdown
        ! {command} load socket_offload; {command} status --json"""
    output = tmp_path / "output"
    status = OtherKernel("6.12").run(["sh", "-c", f"set -e; {script}"], timeout=500, output=output)
    text = output.read_text()
    assert status == 0, text
    mine, other, locked = (json.loads(line) for line in text.splitlines() if line.startswith("["))
    assert [(one["built"], one["loaded"], one["used"]) for one in mine] == [(True, True, "socket_offload"), (False, False, "user")]
    assert other[0]["used"] == "tcp_repair" and "another version" in other[0]["why"]
    assert locked[0]["used"] == "tcp_repair" and "not loaded" in locked[0]["why"]
    assert "socket_offload is refused: a container, or the kernel is locked down\n  cat /sys/kernel/security/lockdown" in text


def of_another_version(tree: Path, folder: Path) -> Path:
    """socket_offload.ko as a later program would know it."""
    source, made = folder / "socket_offload", folder / "made"
    module.copy_sources(ROOT / "host_module" / "socket_offload", source)
    header = source / "uapi" / "socket_offload.h"
    text = header.read_text(encoding="utf-8")
    assert "SKOFF_VERSION\t\t1\n" in text
    header.write_text(text.replace("SKOFF_VERSION\t\t1\n", "SKOFF_VERSION\t\t2\n"), encoding="utf-8")
    made.mkdir()
    module.build_module(source, tree=tree, directory=made)
    return made / "socket_offload.ko"
