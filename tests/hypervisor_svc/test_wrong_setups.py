# SPDX-License-Identifier: Apache-2.0
"""What a newcomer gets wrong, made for real: each is answered by one message, the cause and the next command to type.

Each command runs in mount and network namespaces of its own, in which the wrong thing is wrong."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALONE = ("unshare", "--mount", "--net", "--propagation", "private")
pytestmark = pytest.mark.root


@dataclass(frozen=True)
class Said:
    """What the command line said: the cause, and the next command."""

    cause: str
    hint: str
    status: int


def typed(*arguments: str, around: tuple[str, ...] = ALONE, before: str = "true", config: Path | None = None, **more: str) -> Said:
    """Run `streamlift ARGUMENTS` inside `around`, after the shell command `before`; `more` becomes environment."""
    options = ["--config", str(config)] if config else []
    product = [sys.executable, "-m", "hypervisor_svc", *options, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", **more}
    argv = [*around, "/bin/sh", "-c", f'{before} && exec "$@"', "sh", *product]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stderr.splitlines()
    assert len(lines) == 2, f"not one cause and one hint: {done.stderr}"
    assert lines[0].startswith("streamlift: ") and lines[1].startswith("  "), done.stderr
    return Said(lines[0].removeprefix("streamlift: "), lines[1].strip(), done.returncode)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration that touches nothing of this machine."""
    path = tmp_path / "streamlift.toml"
    path.write_text(f'[service]\nruntime_dir = "{tmp_path}/run"\n[libvirt]\nenabled = false\n')
    return path


def test_no_root() -> None:
    said = typed("serve", around=("setpriv", "--reuid=65534", "--clear-groups"))
    assert (said.cause, said.status) == ("the service moves sockets and needs root", 1)
    assert said.hint == "sudo streamlift serve"


def test_root_of_a_container(config: Path) -> None:
    said = typed("serve", around=(*ALONE, "setpriv", "--bounding-set=-net_admin"), config=config)
    assert "CAP_NET_ADMIN" in said.cause and "--cap-add NET_ADMIN" in said.hint


def test_no_kvm(tmp_path: Path) -> None:
    """/dev/null in its place: where there is KVM, it does not work then."""
    spoilt = "if [ -e /dev/kvm ]; then mount --bind /dev/null /dev/kvm; fi"
    config = tmp_path / "c.toml"
    config.write_text('[libvirt]\nuri = "test:///default"\n')  # libvirt's own driver without a daemon
    argv = ("deploy", "tv1", "--share", str(tmp_path), "--accelerator", "kvm")
    said = typed(*argv, before=spoilt, config=config)
    assert said.cause.startswith("KVM does not work here: ")
    assert said.hint.endswith("--accelerator tcg")


def test_no_libvirt(tmp_path: Path) -> None:
    said = typed("attach", "myvm", "--share", str(tmp_path), before="mount -t tmpfs none /run")
    assert "libvirt at qemu:///system does not answer" in said.cause
    assert said.hint == "sudo systemctl start libvirtd"


def test_libvirt_is_not_installed(tmp_path: Path) -> None:
    said = typed("undeploy", "myvm", before="mount -t tmpfs none /run", PATH=_path_without(tmp_path, "libvirtd", "virtqemud"))
    assert said.hint.startswith("sudo apt-get install libvirt-daemon-system")


def test_no_space(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    said = typed("image", "build", before=f"mount -t tmpfs -o size=8m none {cache}", STREAMLIFT_CACHE=str(cache))
    assert f"{cache}/images has" in said.cause and "needs 1024" in said.cause
    assert f"df -h {cache}/images" in said.hint and "STREAMLIFT_CACHE=" in said.hint


def test_the_control_socket_is_taken(config: Path, tmp_path: Path) -> None:
    """By a service that runs: the second one ends, and the first one is still asked by its own socket."""
    first = subprocess.Popen(
        [*ALONE, sys.executable, "-m", "hypervisor_svc", "--config", str(config), "serve"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait_for(tmp_path / "run" / "control.sock")
        said = typed("serve", config=config)
        assert f"{tmp_path}/run/control.sock is taken by process" in said.cause
        assert "streamlift status" in said.hint and "systemctl stop streamlift" in said.hint
        with socket.socket(socket.AF_UNIX) as door:
            door.connect(str(tmp_path / "run" / "control.sock"))
    finally:
        first.send_signal(signal.SIGTERM)
        first.wait(10)


def test_no_folder_for_the_control_socket(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[service]\nruntime_dir = "/proc/streamlift"\n')
    said = typed("serve", config=config)
    assert said.cause.startswith("/proc/streamlift cannot be made") and "runtime_dir" in said.hint


def test_no_kernel_headers(tmp_path: Path) -> None:
    said = typed("module", "build", "--headers", str(tmp_path))
    assert said.cause == f"no kernel headers at {tmp_path}"
    assert said.hint == f"sudo apt-get install linux-headers-{platform.release()}"


def test_headers_of_another_kernel(tmp_path: Path) -> None:
    (tmp_path / "Makefile").touch()
    (tmp_path / "include" / "config").mkdir(parents=True)
    (tmp_path / "include" / "config" / "kernel.release").write_text("5.10.0-1-amd64\n")
    said = typed("module", "build", "--headers", str(tmp_path))
    assert f"are those of Linux 5.10.0-1-amd64; {platform.release()} runs here" in said.cause
    assert said.hint == f"sudo apt-get install linux-headers-{platform.release()}"


@pytest.fixture
def modules() -> Iterator[Path]:
    """The running kernel's folder of modules, in whose place a test mounts its own; a folder that was missing goes again."""
    folder = Path("/usr/lib/modules")
    missing = not folder.exists()
    folder.mkdir(exist_ok=True)
    yield folder
    if missing:
        folder.rmdir()


def test_a_module_that_is_not_built(modules: Path) -> None:
    made = f"mount -t tmpfs none {modules} && mkdir -p {modules}/{platform.release()} && depmod 2>/dev/null"
    said = typed("module", "load", "omss", before=made)
    assert said.cause == f"omss is not built for Linux {platform.release()}"
    assert said.hint == "sudo streamlift module build"


def test_a_module_that_the_kernel_refuses(modules: Path, tmp_path: Path) -> None:
    """A relocatable file without a module in it."""
    (tmp_path / "omss.c").write_text("int nothing;\n")
    subprocess.run(["gcc", "-c", str(tmp_path / "omss.c"), "-o", str(tmp_path / "omss.ko")], check=True)
    updates = f"{modules}/{platform.release()}/updates"
    made = f"mount -t tmpfs none {modules} && mkdir -p {updates} && cp {tmp_path}/omss.ko {updates} && depmod 2>/dev/null"
    said = typed("module", "load", "omss", before=made)
    assert said.cause in (
        f"omss was not built for Linux {platform.release()}",
        "omss is refused: this kernel takes no modules",
        "omss is refused: a container, or the kernel is locked down",
    )
    assert "streamlift module" in said.hint or "lockdown" in said.hint


def test_nft_is_not_installed(config: Path, tmp_path: Path) -> None:
    said = typed("serve", config=config, PATH=_path_without(tmp_path, "nft"))
    assert "nft is not installed" in said.cause
    assert said.hint == "sudo apt-get install nftables"


@pytest.mark.parametrize(
    ("chain", "lets_in"),
    [
        ("policy drop; ct state established accept", False),
        ("policy drop; ct status dnat,assured accept", True),
        ("policy accept", True),
    ],
)
def test_a_firewall_without_the_rule(config: Path, chain: str, lets_in: bool) -> None:
    """`check` says it, with the command that helps: which is typed here, and has helped."""
    firewall = config.with_name("firewall.nft")
    firewall.write_text(f"table inet filter {{\nchain input {{\ntype filter hook input priority filter; {chain}\n}}\n}}\n")
    rules = f"nft -f {firewall}"
    command, fine = f"{sys.executable} -m hypervisor_svc --config {config} check --json", "lets redirected connections in"
    said = _in_namespaces(f"{rules} && {command}")
    assert (fine in said) is lets_in
    if not lets_in:
        hint = "nft insert rule inet filter input ct status dnat accept"
        assert f"sudo {hint}" in said
        assert fine in _in_namespaces(f"{rules} && {hint} && {command}")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("[polcy]\nx = 1\n", ":1: unknown key polcy; did you mean policy?"),
        ("[policy]\nthreshold_bytes = 0\n", ":2: policy.threshold_bytes = 0"),
        ("[policy\n", "Expected"),
    ],
)
def test_a_mistake_in_the_configuration(tmp_path: Path, text: str, cause: str) -> None:
    config = tmp_path / "c.toml"
    config.write_text(text)
    said = typed("serve", config=config)
    assert str(config) in said.cause and cause in said.cause
    assert said.hint.endswith("streamlift config")


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    said = typed("status", config=tmp_path / "none.toml")
    assert said.cause == f"{tmp_path}/none.toml: No such file or directory"


def test_the_service_does_not_run(config: Path) -> None:
    said = typed("top", "--times", "1", config=config, around=("env", "STREAMLIFT_COMMAND=./run streamlift"))
    assert "does not answer" in said.cause
    assert "systemctl start streamlift" in said.hint and "sudo ./run streamlift serve" in said.hint


def _in_namespaces(script: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [*ALONE, "sh", "-c", script]
    return subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False).stdout


def _path_without(folder: Path, *programs: str) -> str:
    """A PATH with everything but these."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for place in reversed(os.environ["PATH"].split(":")):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            if program.name not in programs:
                link = bin_folder / program.name
                link.unlink(missing_ok=True)
                link.symlink_to(program)
    assert all(shutil.which(program, path=str(bin_folder)) is None for program in programs)
    return str(bin_folder)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 15
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)

