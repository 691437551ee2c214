# SPDX-License-Identifier: Apache-2.0
"""The root file system: a minimal Debian, and on top of it the agent and the units that start it."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from vm_images.command import EPOCH, run
from vm_images.packages import SUITE

PACKAGES = ("systemd-sysv", "udev", "kmod", "iproute2", "python3")
LEFT_OUT = ("doc", "man", "info", "locale", "lintian", "bug")

GUEST_FILES = Path(__file__).parent / "guest"
AGENT = Path(__file__).parent.parent / "guest_agent"
AGENT_UNITS = ("streamlift-agent.service", "streamlift-media.service", "srv-share.mount")

# Needed by nobody in a guest that is thrown away, and each of them costs time at every start.
MASKED_UNITS = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty-static.service",
    "getty@tty1.service",
    "kmod-static-nodes.service",
    "ldconfig.service",
    "nginx.service",
    "modprobe@.service",
    "proc-sys-fs-binfmt_misc.automount",
    "serial-getty@ttyS0.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-firstboot.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-machine-id-commit.service",
    "systemd-modules-load.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-pcrphase.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-update-done.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
)

# The serial console is where a guest that does not come up can be read from outside.
JOURNAL = """[Journal]
Storage=volatile
ForwardToConsole=yes
MaxLevelConsole=info
"""

BLOCK = 4096
SIZE = 2 * 1024**3
FIXED_TIME = {"E2FSPROGS_FAKE_TIME": str(EPOCH)}
FILE_SYSTEM_ID = "5eed5eed-0000-4000-8000-000000000001"


def base_recipe(also: Sequence[str] = ()) -> tuple[str, ...]:
    """How the bare Debian is made, with the packages `also` in it."""
    return (
        "mmdebstrap",
        "--variant=minbase",
        "--mode=root",
        f"--include={','.join((*PACKAGES, *also))}",
        *(f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in LEFT_OUT),
        # A machine whose clock is behind the archive's can build too; the signatures are checked all the same.
        "--aptopt=Acquire::Check-Date false",
    )


def make_base(archive: Path, *, sources: Sequence[str], also: Sequence[str] = ()) -> None:
    """Write the bare Debian as a tar archive (about 15 s, the slow layer)."""
    run([*base_recipe(also), SUITE, archive, "-"], text="\n".join(sources) + "\n")


def unpack_base(archive: Path, *, root: Path) -> None:
    """Unpack the bare Debian below `root`, with its owners and modes."""
    root.mkdir()
    run(["tar", "--extract", "--numeric-owner", "--xattrs", "--file", archive, "--directory", root])


def install_modules(root: Path, *, modules: Path) -> None:
    """Put the kernel's modules into the root file system."""
    shutil.copytree(modules / "lib" / "modules", root / "usr" / "lib" / "modules", dirs_exist_ok=True)


def install_module(root: Path, *, module: Path, release: str) -> None:
    """Put a module of ours beside the kernel's own; the agent's unit loads it."""
    folder = root / "usr" / "lib" / "modules" / release / "updates"
    folder.mkdir()
    shutil.copyfile(module, folder / module.name)
    run(["/sbin/depmod", "-b", root / "usr", release])


def install_agent(root: Path) -> None:
    """Put the agent, the example server and their units into the root file system."""
    packages = root / "usr" / "lib" / "python3" / "dist-packages"
    shutil.copytree(AGENT, packages / "guest_agent", ignore=shutil.ignore_patterns("__pycache__", *AGENT_UNITS))
    # Compiled here, without time stamps: the guest starts faster, and the image stays reproducible.
    compile_all = ("/usr/bin/python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash")
    run(["chroot", root, *compile_all, "/usr/lib/python3/dist-packages/guest_agent"])
    scripts = root / "usr" / "lib" / "streamlift"
    scripts.mkdir()
    for script in ("network", "live", "nginx.conf"):
        shutil.copy(GUEST_FILES / script, scripts / script)
    _install_unit(root, GUEST_FILES / "streamlift-network.service", wanted_by="sysinit.target")
    for server in ("streamlift-media-plain.service", "streamlift-live.service", "streamlift-nginx.service"):
        _install_unit(root, GUEST_FILES / server, wanted_by="multi-user.target")
    for unit in AGENT_UNITS:
        _install_unit(root, AGENT / unit, wanted_by="multi-user.target")


def configure(root: Path) -> None:
    """The few settings that make the guest start fast and talk on its serial console."""
    etc = root / "etc"
    units = etc / "systemd" / "system"
    for unit in MASKED_UNITS:
        _replace_link(units / unit, target="/dev/null")
    _replace_link(units / "default.target", target="/lib/systemd/system/multi-user.target")
    (etc / "systemd" / "journald.conf.d").mkdir(exist_ok=True)
    (etc / "systemd" / "journald.conf.d" / "streamlift.conf").write_text(JOURNAL, encoding="utf-8")
    (etc / "hostname").write_text("streamlift\n", encoding="utf-8")
    (etc / "fstab").write_text("", encoding="utf-8")
    # Empty means: not the first start, and every guest gets an identity of its own.
    (etc / "machine-id").write_text("", encoding="utf-8")
    (root / "srv" / "share").mkdir(exist_ok=True)
    # What names the machine that built the image must not differ from one to the next.
    (etc / "resolv.conf").write_text("", encoding="utf-8")


def make_image(root: Path, *, image: Path) -> None:
    """Write the tree below `root` as an ext4 image, the same bytes for the same tree."""
    _set_times(root)
    options = f"root_owner=0:0,hash_seed={FILE_SYSTEM_ID},lazy_itable_init=0,lazy_journal_init=0"
    run(
        ["mke2fs", "-q", "-t", "ext4", "-L", "streamlift", "-U", FILE_SYSTEM_ID, "-E", options, "-b", str(BLOCK)]
        + ["-J", "size=16", "-m", "0", "-d", str(root), str(image), str(SIZE // BLOCK)],
        environment=FIXED_TIME,
    )
    _set_inode_times(image)


def _install_unit(root: Path, unit: Path, *, wanted_by: str) -> None:
    units = root / "etc" / "systemd" / "system"
    shutil.copyfile(unit, units / unit.name)
    wants = units / f"{wanted_by}.wants"
    wants.mkdir(exist_ok=True)
    _replace_link(wants / unit.name, target=f"/etc/systemd/system/{unit.name}")


def _replace_link(path: Path, *, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _set_times(root: Path) -> None:
    """Nothing in the image is younger than the epoch; what is older keeps its time."""
    for folder, _, files in os.walk(root, topdown=False):
        for name in [*files, "."]:
            path = os.path.join(folder, name)
            if os.lstat(path).st_mtime > EPOCH:
                os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
    os.utime(root, (EPOCH, EPOCH))


def _set_inode_times(image: Path) -> None:
    """mke2fs copies each file's times of access and of change, which nobody can set in the tree."""
    commands = (f"set_inode_field <{inode}> {field} @{EPOCH}\n" for inode in _inodes(image) for field in ("atime", "ctime"))
    script = "".join(commands)
    run(["debugfs", "-w", "-f", "/dev/stdin", image], text=script, environment=FIXED_TIME)


def _inodes(image: Path) -> list[int]:
    """All inodes in use by files; the first ten belong to the file system itself, but for the root folder's."""
    report = run(["dumpe2fs", image])
    count = re.search(r"^Inode count: +(\d+)$", report, re.MULTILINE)
    assert count is not None
    free: set[int] = set()
    for line in re.findall(r"^  Free inodes: (.+)$", report, re.MULTILINE):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", line):
            free.update(range(int(first), int(last or first) + 1))
    return [2, *(inode for inode in range(11, int(count[1]) + 1) if inode not in free)]
