# SPDX-License-Identifier: Apache-2.0
"""A hypervisor of its own on this machine: libvirtd in private namespaces, and a client on a veth link.

        client namespace                     host namespaces (net, mount, uts, pid)
    203.0.113.2, fd78:c::2  --- veth ---  203.0.113.1, fd78:c::1   streamlift0 --- VMs (QEMU)
                                          libvirtd, the service

Nothing of the machine's own libvirt, network or names is touched, and the end of the host's first process is
the end of all that ran there. Needs root, not systemd. With a `fabric` (`fabric.py`) the client and the network beyond the
host are the fabric's.

The folders below `directory` are the host's /etc/libvirt, /var/lib/libvirt and so on; `outside` translates a path that
libvirt reports into one that processes outside the host's namespaces can open.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

import libvirt

from hypervisor_svc.domains import open_connection
from tests.vm.fabric import Fabric
from tests.vm.namespaces import Namespaces, give_addresses, link

CLIENT_ADDRESSES = ("203.0.113.2", "fd78:c::2")
HOST_ADDRESSES = ("203.0.113.1", "fd78:c::1")

LIBVIRTD_CONF = """
unix_sock_group = "root"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{uuid}"
"""

# No security driver, no cgroups and no virtlogd: the namespaces are the fence here, and logs are plain files.
QEMU_CONF = """
user = "root"
group = "root"
security_driver = "none"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""

Found = TypeVar("Found")

PRIVATE_FOLDERS = {
    "etc": "/etc/libvirt",
    "state": "/var/lib/libvirt",
    "run": "/run/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
    "streamlift": "/var/lib/streamlift",
}


class LibvirtHost:
    """libvirtd by hand; a context manager. `uri` works inside and outside the host's namespaces."""

    def __init__(
        self,
        *,
        name: str = "streamlift-host",
        directory: Path | None = None,
        fabric: Fabric | None = None,
        storage: Path | None = None,
    ) -> None:
        """`storage`: what is /var/lib/streamlift here; hosts between which VMs move have the same."""
        self.name = name
        self.directory = directory or Path(tempfile.mkdtemp(prefix="streamlift-host-"))
        self._folders = {folder: self.directory / folder for folder in PRIVATE_FOLDERS}
        if storage is not None:
            self._folders["streamlift"] = storage
        self._fabric = fabric
        self._stack = contextlib.ExitStack()

    @property
    def uri(self) -> str:
        """libvirt's address of this host."""
        return f"qemu+unix:///system?socket={self.directory}/run/libvirt-sock"

    @property
    def machines(self) -> Path:
        """Where VMs deployed here keep their files."""
        return self._folders["streamlift"] / "machines"

    def __enter__(self) -> LibvirtHost:
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.namespaces = Namespaces("mount", "net", "uts", "pid")
            stack.callback(self.namespaces.close)
            self._prepare()
            if self._fabric is not None:
                self._join(self._fabric)
            else:
                self.client = Namespaces("net")
                stack.callback(self.client.close)
                self._connect_client()
            self._start_libvirtd()
            stack.callback(self._stop_libvirtd)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def connect(self) -> libvirt.virConnect:
        """A new connection to this host's libvirt."""
        return open_connection(self.uri)

    def run(self, *arguments: str | Path, check: bool = True) -> str:
        """Run a program on the host, with its network and its view of libvirt's folders."""
        return self.namespaces.run(*arguments, check=check)

    def start(
        self,
        *arguments: str | Path,
        output: IO[Any] | int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program on the host that runs on, for instance the service."""
        return self.namespaces.start(*arguments, output=output, environment=environment)

    def outside(self, path: str | Path) -> Path:
        """Where a path of the host is for processes outside its namespaces."""
        for folder, inside in PRIVATE_FOLDERS.items():
            if Path(path).is_relative_to(inside):
                return self._folders[folder] / Path(path).relative_to(inside)
        return Path(path)

    def restart_libvirtd(self) -> None:
        """Kill libvirtd and start it again; VMs run on."""
        self.namespaces.signal(self._libvirtd, signal.SIGKILL)
        self._start_libvirtd()

    def _prepare(self) -> None:
        for path in (*self._folders.values(), self.machines, self.directory / "state" / "dnsmasq"):
            path.mkdir(parents=True, exist_ok=True)
        uuid = Path("/proc/sys/kernel/random/uuid").read_text(encoding="ascii").strip()
        (self.directory / "etc" / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(uuid=uuid), encoding="utf-8")
        (self.directory / "etc" / "qemu.conf").write_text(QEMU_CONF, encoding="utf-8")
        for folder, inside in PRIVATE_FOLDERS.items():
            Path(inside).mkdir(parents=True, exist_ok=True)
            self.run("mount", "--bind", self._folders[folder], inside)
        # /sys shows the network of the namespace in which it was mounted, and libvirt looks for bridges there.
        self.run("mount", "-t", "sysfs", "none", "/sys")
        self.run("hostname", self.name)
        # libvirt asks for its own name before it migrates, and nobody answers here.
        names = self.directory / "hosts"
        names.write_text(f"127.0.0.1 localhost {self.name}\n", encoding="ascii")
        self.run("mount", "--bind", names, "/etc/hosts")
        self.run("ip", "link", "set", "lo", "up")
        self.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")

    def _connect_client(self) -> None:
        link(self.namespaces, "client0", self.client, "eth0")
        for side, card, (address4, address6) in (
            (self.namespaces, "client0", HOST_ADDRESSES),
            (self.client, "eth0", CLIENT_ADDRESSES),
        ):
            give_addresses(side, card, f"{address4}/24", f"{address6}/64")
        self.client.run("ip", "link", "set", "lo", "up")
        for gateway in HOST_ADDRESSES:
            self.client.run("ip", "route", "add", "default", "via", gateway)

    def _join(self, fabric: Fabric) -> None:
        """Others' migrations come to the address that the fabric gives."""
        self.client, self.uplink = fabric.client, fabric.join(self.namespaces)
        with (self.directory / "etc" / "qemu.conf").open("a", encoding="utf-8") as settings:
            settings.write(f'migration_host = "{self.uplink.address4}"\n')

    def _start_libvirtd(self) -> None:
        with (self.directory / "log" / "libvirtd.log").open("ab") as log:
            self._libvirtd = self.start(
                "libvirtd", "--config", "/etc/libvirt/libvirtd.conf", "--pid-file", "/run/libvirt/libvirtd.pid", output=log
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                self.connect().close()
                return
            except libvirt.libvirtError:
                if self._libvirtd.poll() is not None or time.monotonic() > deadline:
                    words = (self.directory / "log" / "libvirtd.log").read_text(encoding="utf-8")[-2000:]
                    raise RuntimeError(f"libvirtd does not answer: {words}") from None
                time.sleep(0.05)

    def _stop_libvirtd(self) -> None:
        with contextlib.suppress(libvirt.libvirtError), contextlib.closing(self.connect()) as connection:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                domain.destroy()
        try:
            self.namespaces.signal(self._libvirtd, signal.SIGTERM)
        except subprocess.TimeoutExpired:
            self.namespaces.signal(self._libvirtd, signal.SIGKILL)


def wait_for(condition: Callable[[], Found], *, seconds: float, what: str) -> Found:
    """Call `condition` until it returns something true, and return that; TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)
