# SPDX-License-Identifier: Apache-2.0
"""A hypervisor of its own on this machine: libvirtd in private namespaces, and a client on a veth link.

        client namespace                     host namespaces (net, mount, uts, pid)
    203.0.113.2, fd78:c::2  --- veth ---  203.0.113.1, fd78:c::1   streamlift0 --- VMs (QEMU)
                                          libvirtd, the service

Nothing of the machine's own libvirt, network or names is touched, and the end of the host's first process is
the end of all that ran there. Needs root, not systemd.

The folders below `directory` are the host's /etc/libvirt, /var/lib/libvirt and so on; `outside` translates a path that
libvirt reports into one that processes outside the host's namespaces can open.
"""

from __future__ import annotations

import contextlib
import os
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


class Namespaces:
    """A process that keeps namespaces alive; `command(...)` is how to run something inside."""

    def __init__(self, *kinds: str) -> None:
        self._kinds = kinds
        options = [f"--{kind}" for kind in kinds]
        if "mount" in kinds:
            options += ["--propagation", "private"]
        if "pid" in kinds:
            options += ["--fork", "--kill-child=SIGKILL", "--mount-proc"]
        # In a pid namespace this shell is the first process: it must reap what daemons leave behind ("wait"), and
        # the namespaces must not outlive us (--pdeathsig).
        wait = "sleep infinity & wait" if "pid" in kinds else "exec sleep infinity"
        holder = ("sh", "-c", f"echo ready; {wait}")
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *options, *holder],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for us
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("unshare failed: are we root?")
        self.pid = _first_child(self._process.pid) if "pid" in kinds else self._process.pid

    def command(self, *arguments: str | Path) -> list[str]:
        """The command line that runs `arguments` inside."""
        kinds = [f"--{kind}" for kind in self._kinds]
        return ["nsenter", f"--target={self.pid}", *kinds, "--", *(str(argument) for argument in arguments)]

    def run(self, *arguments: str | Path, check: bool = True) -> str:
        """Run a program inside to its end and return what it printed."""
        result = subprocess.run(self.command(*arguments), capture_output=True, text=True, check=False)
        if check and result.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, arguments))}: {result.stderr.strip() or result.returncode}")
        return result.stdout

    def start(
        self,
        *arguments: str | Path,
        output: IO[Any] | int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program inside that runs on; both of its outputs go to `output`."""
        return subprocess.Popen(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            env={**os.environ, **(environment or {})},
            process_group=0,
        )

    def signal(self, process: subprocess.Popen[bytes], number: int) -> None:
        """Signal what `start` started and wait for its end. In a pid namespace nsenter stands between, and passes no signal on."""
        if process.poll() is None:
            os.kill(_first_child(process.pid) if "pid" in self._kinds else process.pid, number)
        process.wait(timeout=20)

    def close(self) -> None:
        """End the namespaces, and with a pid namespace all that ran in it."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _first_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()[0])


class LibvirtHost:
    """libvirtd by hand; a context manager. `uri` works inside and outside the host's namespaces."""

    def __init__(self, *, name: str = "streamlift-host", directory: Path | None = None) -> None:
        self.name = name
        self.directory = directory or Path(tempfile.mkdtemp(prefix="streamlift-host-"))
        self._stack = contextlib.ExitStack()

    @property
    def uri(self) -> str:
        """libvirt's address of this host."""
        return f"qemu+unix:///system?socket={self.directory}/run/libvirt-sock"

    @property
    def machines(self) -> Path:
        """Where VMs deployed here keep their files."""
        return self.directory / "machines"

    def __enter__(self) -> LibvirtHost:
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.namespaces = Namespaces("mount", "net", "uts", "pid")
            stack.callback(self.namespaces.close)
            self.client = Namespaces("net")
            stack.callback(self.client.close)
            self._prepare()
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
                return self.directory / folder / Path(path).relative_to(inside)
        return Path(path)

    def restart_libvirtd(self) -> None:
        """Kill libvirtd and start it again; VMs run on."""
        self.namespaces.signal(self._libvirtd, signal.SIGKILL)
        self._start_libvirtd()

    def _prepare(self) -> None:
        for folder in (*PRIVATE_FOLDERS, "machines", "state/dnsmasq"):
            (self.directory / folder).mkdir(parents=True, exist_ok=True)
        uuid = Path("/proc/sys/kernel/random/uuid").read_text(encoding="ascii").strip()
        (self.directory / "etc" / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(uuid=uuid), encoding="utf-8")
        (self.directory / "etc" / "qemu.conf").write_text(QEMU_CONF, encoding="utf-8")
        for folder, inside in PRIVATE_FOLDERS.items():
            Path(inside).mkdir(parents=True, exist_ok=True)
            self.run("mount", "--bind", self.directory / folder, inside)
        # /sys shows the network of the namespace in which it was mounted, and libvirt looks for bridges there.
        self.run("mount", "-t", "sysfs", "none", "/sys")
        self.run("hostname", self.name)
        self.run("ip", "link", "set", "lo", "up")
        self.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")

    def _connect_client(self) -> None:
        link = ("ip", "link", "add", "client0", "netns", str(self.namespaces.pid), "type", "veth")
        subprocess.run([*link, "peer", "name", "eth0", "netns", str(self.client.pid)], check=True)
        sides = (
            (self.namespaces, "client0", HOST_ADDRESSES),
            (self.client, "eth0", CLIENT_ADDRESSES),
        )
        for side, card, (address4, address6) in sides:
            side.run("ip", "link", "set", card, "up")
            side.run("ip", "address", "add", f"{address4}/24", "dev", card)
            side.run("ip", "address", "add", f"{address6}/64", "dev", card, "nodad")
        self.client.run("ip", "link", "set", "lo", "up")
        for gateway in HOST_ADDRESSES:
            self.client.run("ip", "route", "add", "default", "via", gateway)

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
