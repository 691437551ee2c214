# SPDX-License-Identifier: Apache-2.0
"""An ordinary VM as a person with libvirt has one, nothing of ours in it: a Debian with Python on libvirt's NAT network, that
hears its power button. A root shell on its second serial port is how the test types what the person would."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import libvirt

from tests.vm.libvirt_host import LibvirtHost, wait_for
from vm_images import kernel as kernels
from vm_images import root
from vm_images.build import Image, bare, busybox, cache_directory, kernel, key, layer
from vm_images.initramfs import write_initramfs

NAME, ADDRESS, GATEWAY = "myvm", "192.168.122.50", "192.168.122.1"
PACKAGES = ("dbus",)
"""Without it systemd-logind does not run, and nobody hears the power button."""

NETWORK = f"""
<network>
  <name>default</name><forward mode='nat'/><bridge name='virbr0' stp='off' delay='0'/><dns enable='no'/>
  <ip address='{GATEWAY}' netmask='255.255.255.0'/>
</network>
"""
DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>512</memory><vcpu>2</vcpu><cpu mode='maximum'/>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>console=ttyS0 quiet net.ifnames=0 panic=-1</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <disk type='file'><driver name='qemu' type='qcow2'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
    <interface type='network'><source network='default'/><model type='virtio'/><rom enabled='no'/></interface>
    <serial type='pty'><log file='{folder}/console.log' append='off'/></serial>
    <serial type='unix'><source mode='bind' path='{shell}'/><target port='1'/></serial>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>
"""
ADDRESSES = f"[Match]\nName=eth0\n[Network]\nAddress={ADDRESS}/24\nGateway={GATEWAY}\n"
SHELL = """[Unit]
Description=A root shell for the test
[Service]
ExecStartPre=/bin/stty -F /dev/ttyS1 raw -echo
ExecStart=/bin/sh
StandardInput=tty-force
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS1
KillSignal=SIGKILL
Restart=always
[Install]
WantedBy=multi-user.target
"""


def build() -> Image:
    """Its disk and its kernel, from the cache if they are there."""
    base, found = bare(also=PACKAGES), kernel()
    recipe = (ADDRESSES, SHELL, Path(root.__file__).read_text(encoding="utf-8"))
    path = cache_directory() / f"own-{key(base.parent.name, found.modules.parent.name, *recipe)}"
    with layer(path) as (directory, missing):
        if missing:
            _fill(directory, base, found)
    return Image(path / "root.ext4", path / "vmlinuz", path / "initrd.img", found.release)


def _fill(directory: Path, base: Path, found: kernels.Kernel) -> None:
    tree = directory / "tree"
    root.unpack_base(base, root=tree)
    root.install_modules(tree, modules=found.modules)
    root.configure(tree)
    units = tree / "etc" / "systemd" / "system"
    (tree / "etc" / "systemd" / "network" / "eth0.network").write_text(ADDRESSES)
    (units / "shell.service").write_text(SHELL)
    wanted = units / "multi-user.target.wants"
    wanted.mkdir(exist_ok=True)
    (wanted / "shell.service").symlink_to("/etc/systemd/system/shell.service")
    (wanted / "systemd-networkd.service").symlink_to("/lib/systemd/system/systemd-networkd.service")
    root.make_image(tree, image=directory / "root.ext4")
    shutil.rmtree(tree)
    shutil.copyfile(found.image, directory / "vmlinuz")
    write_initramfs(directory / "initrd.img", busybox=busybox(found), modules=kernels.early_modules(found))


class OwnMachine:
    """The VM, as its owner knows it."""

    def __init__(self, domain: libvirt.virDomain, shell: Path) -> None:
        self.domain, self._shell = domain, shell

    def type(self, command: str, *, seconds: float = 60) -> str:
        """Type a command at its root shell; what it said. Raises RuntimeError if it fails."""
        with socket.socket(socket.AF_UNIX) as terminal:
            terminal.settimeout(seconds)
            terminal.connect(str(self._shell))
            terminal.sendall(f"{{ {command} ; }} 2>&1; echo ended=$?=\n".encode())
            words, status = _read_until(terminal, time.monotonic() + seconds)
        if status != 0:
            raise RuntimeError(f"{command}: {words}")
        return words

    def wait_booted(self) -> None:
        """Until its shell answers."""

        def answers() -> bool:
            with contextlib.suppress(OSError, RuntimeError):
                return "awake" in self.type("echo awake", seconds=2)
            return False

        wait_for(answers, seconds=60, what="the VM's shell")


def _read_until(terminal: socket.socket, deadline: float) -> tuple[str, int]:
    """What was said, and the exit status; a prompt may stand around both."""
    said = ""
    while (end := re.search(r"ended=(\d+)=", said)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(said)
        said += terminal.recv(4096).decode(errors="replace")
    return said[: end.start()], int(end[1])


@contextlib.contextmanager
def own_machine(host: LibvirtHost, *, runs: bool) -> Iterator[OwnMachine]:
    """Defined, and running or off, on the NAT network that libvirt comes with."""
    made, folder = build(), host.machines / NAME
    folder.mkdir()
    disk, shell = folder / "disk.qcow2", folder / "shell.sock"
    overlay: Sequence[str] = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(made.root), str(disk))
    subprocess.run(overlay, check=True)
    with contextlib.closing(host.connect()) as connection:
        network = connection.networkDefineXML(NETWORK)
        network.create()
        places = {"name": NAME, "kernel": made.kernel, "initrd": made.initrd, "disk": disk, "folder": folder, "shell": shell}
        domain = connection.defineXML(DOMAIN.format(**places))
        try:
            machine = OwnMachine(domain, shell)
            if runs:
                domain.create()
                machine.wait_booted()
            yield machine
        finally:
            with contextlib.suppress(libvirt.libvirtError):
                domain.destroy()
            domain.undefine()
            network.destroy()
            network.undefine()
            shutil.rmtree(folder)
