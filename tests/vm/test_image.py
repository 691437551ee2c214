# SPDX-License-Identifier: Apache-2.0
"""The guest image boots on each supported kernel, says hello in time and serves the share."""

from __future__ import annotations

import filecmp
import functools
import hashlib
import os
import shutil
import socket
import tarfile
from pathlib import Path

import libvirt
import pytest

from hypervisor_svc.domains import read_machine
from tests.vm.conftest import Deploy
from tests.vm.libvirt_host import LibvirtHost, wait_for
from vm_images.build import build, cache_directory

pytestmark = [pytest.mark.vm, pytest.mark.root]

PATIENCE = 120.0  # seconds from power-on; about 9 on two quiet processors without hardware virtualisation


def first_bytes(path: Path, *, seconds: float) -> bytes:
    """What the guest writes first into its port; QEMU keeps the socket open from the VM's first moment."""
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(seconds)
        channel.connect(str(path))
        return channel.recv(4096)


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_boots_says_hello_and_serves_the_share(
    kernel: str, libvirt_host: LibvirtHost, connection: libvirt.virConnect, share: Path, deploy_machine: Deploy
) -> None:
    blob = os.urandom(3_000_001)
    (share / "blob.bin").write_bytes(blob)
    image = build(kernel)
    assert image.version.startswith(f"{kernel}.")

    deployed = deploy_machine(image)
    machine = read_machine(connection, connection.lookupByName(deployed.name))
    assert machine is not None
    assert machine.addresses == ("10.78.0.2", "fd78::2")
    assert machine.share == str(share)
    hello = first_bytes(libvirt_host.outside(machine.channel_path), seconds=PATIENCE)
    assert b'"hello"' in hello
    assert image.version.encode() in hello

    for address in ("10.78.0.2", "[fd78::2]"):
        fetch = functools.partial(fetch_digest, libvirt_host, address)
        digest = wait_for(fetch, seconds=PATIENCE, what=f"{address} answers")
        assert digest == hashlib.sha256(blob).hexdigest()
    console = deployed.console_log.read_text(encoding="utf-8", errors="replace")
    assert "Failed" not in console, console


def fetch_digest(host: LibvirtHost, address: str) -> str:
    """The hash of what the client gets from the VM; empty if it gets nothing."""
    command = f"set -o pipefail; curl -fsS -m 10 http://{address}/blob.bin | sha256sum"
    return host.client.run("bash", "-c", command, check=False).partition(" ")[0] if answers(host, address) else ""


def answers(host: LibvirtHost, address: str) -> bool:
    """Does anybody listen there?"""
    return bool(host.client.run("curl", "-fsSI", "-m", "5", f"http://{address}/blob.bin", check=False))


def same_bytes(one: Path, other: Path) -> bool:
    """Byte by byte: to hash the holes of two images takes seconds."""
    return filecmp.cmp(one, other, shallow=False)


def contents_of(archive: Path) -> dict[str, str]:
    """Name and hash of every file in a tar archive."""
    with tarfile.open(archive) as tar:
        files = ((member.name, tar.extractfile(member)) for member in tar if member.isfile())
        return {name: hashlib.sha256(file.read()).hexdigest() for name, file in files if file}


def test_equal_inputs_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is made twice. If the archive has newer packages than our cached base, the base is no equal input: then
    only what is put on top of the new one is made twice."""
    image, cache = build(), cache_directory()
    monkeypatch.setenv("STREAMLIFT_CACHE", str(tmp_path / "again"))
    again = build()
    assert again.root != image.root
    (new_base,) = (tmp_path / "again" / "images").glob("base-*/root.tar")
    base = cache / new_base.parent.name / "root.tar"
    before, after = contents_of(base), contents_of(new_base)
    if before["./var/lib/dpkg/status"] == after["./var/lib/dpkg/status"]:
        assert [name for name in before if before[name] != after.get(name)] == []
        assert same_bytes(base, new_base)
    else:
        third = tmp_path / "third" / "images"
        for layer in (new_base.parent, *(tmp_path / "again" / "images").glob("kernel-*")):
            shutil.copytree(layer, third / layer.name, symlinks=True)
        monkeypatch.setenv("STREAMLIFT_CACHE", str(third.parent))
        image = build()
    for part in ("root", "kernel", "initrd"):
        assert same_bytes(getattr(again, part), getattr(image, part)), part
    shutil.rmtree(tmp_path)


def test_a_cached_image_is_found_at_once() -> None:
    first = build()
    said: list[str] = []
    assert build(progress=said.append) == first
    assert said == []
