# SPDX-License-Identifier: Apache-2.0
"""Debian packages: which ones this machine's own apt sources offer, and their files."""

import re
from pathlib import Path

from vm_images.command import BuildError, run

SUITE = "bookworm"

# What each kernel series is called in Debian; flavours (cloud, rt) lack 9p or are not what people run.
KERNEL_PACKAGES = {
    "6.1": re.compile(r"linux-image-6\.1\.0-\d+-amd64(-unsigned)?"),
    "6.12": re.compile(r"linux-image-6\.12\.\d+\+(deb12|bpo)(\.\d+)?-amd64(-unsigned)?"),
}


def refresh() -> None:
    """Fetch apt's package lists anew: a machine may have none, or ones that name packages that are gone."""
    run(["apt-get", "-qq", "update"])


def debian_sources() -> list[str]:
    """This machine's Debian sources as one-line entries; other origins do not belong into a guest."""
    entries = _known_sources()
    if not entries:
        refresh()
        entries = _known_sources()
    if not entries:
        raise BuildError(f"apt knows no Debian {SUITE} source: look at /etc/apt/sources.list.d")
    return entries


def _known_sources() -> list[str]:
    fields = "$(ORIGIN)|$(RELEASE)|$(REPO_URI)|$(COMPONENT)|$(SIGNED_BY)"
    entries: set[str] = set()
    for line in run(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"]).splitlines():
        origin, release, address, component, key = line.split("|", 4)
        if not origin.startswith("Debian") or not release.startswith(SUITE):
            continue
        option = f" [signed-by={key}]" if key.startswith("/") else ""
        entries.add(f"deb{option} {address} {release} {component}")
    return sorted(entries)


def _candidates(pattern: re.Pattern[str]) -> dict[str, str]:
    """Package name -> version that apt would install, for all names that match wholly."""
    names = [name for name in run(["apt-cache", "pkgnames", "linux-image-"]).split() if pattern.fullmatch(name)]
    found: dict[str, str] = {}
    name = ""
    for line in run(["apt-cache", "policy", *names]).splitlines() if names else []:
        if not line.startswith(" "):
            name = line.rstrip(":")
        elif line.strip().startswith("Candidate: ") and "(none)" not in line:
            found[name] = line.split()[1]
    return found


def newest_kernel(series: str) -> tuple[str, str]:
    """(package, version) of the newest kernel of a series; the signed package wins over its unsigned twin."""
    if series not in KERNEL_PACKAGES:
        raise BuildError(f"kernel {series!r} is not known: choose one of {', '.join(KERNEL_PACKAGES)}")
    candidates = _candidates(KERNEL_PACKAGES[series])
    if not candidates:
        raise BuildError(f"apt offers no kernel {series}: add bookworm-security or bookworm-backports, then 'apt-get update'")

    def rank(name: str) -> tuple[list[int], bool]:
        return [int(number) for number in re.findall(r"\d+", candidates[name])], not name.endswith("-unsigned")

    newest = max(candidates, key=rank)
    return newest, candidates[newest]


def fetch(package: str, *, version: str | None = None, directory: Path) -> Path:
    """Download one package with apt (its signatures checked by apt) and unpack it below `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    wanted = f"{package}={version}" if version else package
    run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", wanted], directory=directory)
    archive = next(directory.glob(f"{package}_*.deb"))
    unpacked = directory / "unpacked"
    unpacked.mkdir(exist_ok=True)
    run(["dpkg-deb", "-x", archive, unpacked])
    archive.unlink()
    return unpacked
