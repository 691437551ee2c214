# SPDX-License-Identifier: Apache-2.0
"""How long does a film take? Jeong 2015, Fig. 4: all segments of three ladders by DASH clients, with a real VM.

    ./run bench dash [--json FILE] [--plot FILE] [--quick]

Segments of the sizes of the paper's Table I, fetched by one client and by fifty at once, over a link of 1 Gbit/s: from the VM
alone, from the VM whose transfers the host serves, and from bare metal; without the product, nginx serves too. All in turn. Where
the VM is emulated, its part of each handoff is too: so the same again with a network namespace in the VM's place. The example
server anticipates the segments: a connection comes home once in 33."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.namespaces.deployment import Process, deployed
from tests.namespaces.topology import routed
from tests.performance import bench
from tests.performance.bench import Bar, Report
from tests.vm import setups
from tests.vm.libvirt_host import HOST_ADDRESSES, LibvirtHost, wait_for
from tests.vm.product import ROOT, Product
from tests.vm.setups import ADDRESS, PLAIN_PORT, bare_metal, product_on_host, virtual_machine
from vm_images.build import build, cache_directory
from vm_images.packages import fetch as fetch_package

SIDES = {
    "vm": "VM alone",
    "vm nginx": "VM alone, nginx",
    "offload": "offloaded",
    "metal": "bare metal",
    "metal nginx": "bare metal, nginx",
    "namespace": "offloaded, no VM",
    "namespace metal": "bare metal beside it",
}
COMPARED = (("offload", "metal"), ("offload", "metal nginx"), ("namespace", "namespace metal"))
NGINX_PORT = 8081
LINK = "1gbit"
LIMITS = {"tv": 1.03, "tablet": 1.10}
"""Elapsed time of the offloaded VM, of bare metal's, at most."""
PAPER = {"tv": {"vm": 1.0, "offload": 0.70, "metal": 0.70 / 1.028}}
"""Jeong 2015, section IV-C: 30 % less than the VM, 2.8 % more than bare metal; of the VM's time."""


@dataclass(frozen=True)
class Ladder:
    """Jeong 2015, Table I: seconds and mean bytes of a segment, and how many there are of a film of ten minutes."""

    name: str
    rate: str
    seconds: int
    bytes: int
    segments: int


LADDERS = (
    Ladder("tv", "6.0 Mbit/s", 15, 10_500_000, 40),
    Ladder("tablet", "1.2 Mbit/s", 10, 1_400_000, 60),
    Ladder("phone", "400 kbit/s", 6, 288_600, 100),
)


@dataclass(frozen=True)
class Load:
    """So many clients, each of which fetches this share of the film, so often."""

    clients: int
    part: float
    repeats: int

    def segments(self, ladder: Ladder) -> int:
        """How many of the ladder's segments each client fetches."""
        return max(1, round(ladder.segments * self.part))


FULL = (Load(1, 1.0, repeats=3), Load(50, 0.05, repeats=2))
QUICK = (Load(1, 0.1, repeats=1), Load(4, 0.05, repeats=1))


Inside = Callable[..., list[str]]
"""`inside(*argv)`: how a command is run where the client is."""


# Making the film.


def make_film(folder: Path, ladder: Ladder) -> None:
    """A manifest and its segments, of random bytes: nobody plays them here."""
    (folder / ladder.name).mkdir(parents=True)
    (folder / ladder.name / "manifest.mpd").write_text(manifest(ladder))
    for number in range(1, ladder.segments + 1):
        (folder / ladder.name / f"segment-{number:03d}.m4s").write_bytes(os.urandom(ladder.bytes))


def manifest(ladder: Ladder) -> str:
    """ISO/IEC 23009-1, as ffmpeg writes it for a constant segment length."""
    rate = ladder.bytes * 8 // ladder.seconds
    return f"""<?xml version="1.0" encoding="utf-8"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="urn:mpeg:dash:profile:isoff-live:2011" type="static"
    mediaPresentationDuration="PT{ladder.seconds * ladder.segments}S" minBufferTime="PT{ladder.seconds}S">
  <Period><AdaptationSet contentType="video" segmentAlignment="true">
    <Representation id="0" mimeType="video/mp4" codecs="avc1.64001f" bandwidth="{rate}">
      <SegmentTemplate timescale="1" duration="{ladder.seconds}" startNumber="1" media="segment-$Number%03d$.m4s"/>
    </Representation>
  </AdaptationSet></Period>
</MPD>
"""


# Measuring.


@contextlib.contextmanager
def nginx_on_metal(host: LibvirtHost, folder: Path, share: Path) -> Iterator[str]:
    """Debian's nginx on the hypervisor, configured as in the guest; its address."""
    binary = _nginx()
    text = (ROOT / "vm_images" / "guest" / "nginx.conf").read_text(encoding="utf-8")
    config, log = folder / "nginx.conf", folder / "nginx.log"
    config.write_text(text.replace("/srv/share", str(share)).replace("/run/", f"{folder}/"))
    with log.open("wb") as output:
        server = host.start(binary, "-p", str(folder), "-e", str(log), "-c", str(config), output=output)
    try:
        address = f"{HOST_ADDRESSES[0]}:{NGINX_PORT}"
        url = f"http://{address}/tv/manifest.mpd"
        wait_for(lambda: host.client.run("curl", "-sf", url, check=False), seconds=20, what=f"nginx: {log.read_text()}")
        yield address
    finally:
        host.namespaces.signal(server, signal.SIGTERM)


def _nginx() -> Path:
    """The program out of Debian's package: installing it would start a service on this machine."""
    folder = cache_directory().parent / "nginx"
    binary = folder / "unpacked" / "usr" / "sbin" / "nginx"
    return binary if binary.exists() else fetch_package("nginx", directory=folder) / "usr" / "sbin" / "nginx"


def fetch(inside: Inside, server: str, ladder: Ladder, load: Load) -> dict[str, Any]:
    """One film by all clients of a load; raises RuntimeError if one byte is missing."""
    argv = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.performance.dash_client", "--server", server]
    argv += ["--manifest", f"{ladder.name}/manifest.mpd", "--clients", str(load.clients)]
    argv += ["--segments", str(load.segments(ladder))]
    done = subprocess.run(inside(*argv), capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"the clients failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    expected = load.segments(ladder) * ladder.bytes
    if found["bytes"] != [expected] * load.clients:
        raise RuntimeError(f"a client of {server} got {min(found['bytes'])} of {expected} bytes")
    return found


def measure(inside: Inside, servers: dict[str, str], loads: Sequence[Load]) -> list[dict[str, Any]]:
    """Rows of every load, ladder and side, the sides in turn."""
    rows = []
    for load in loads:
        for ladder in LADDERS:
            for repeat in range(load.repeats):
                for side, server in servers.items():
                    seconds = fetch(inside, server, ladder, load)["seconds"]
                    row = {"ladder": ladder.name, "side": side, "clients": load.clients, "repeat": repeat}
                    rows.append({**row, "segments": load.segments(ladder), "seconds": seconds})
    return rows


@contextlib.contextmanager
def with_vm(folder: Path, share: Path) -> Iterator[tuple[Product, dict[str, str], str]]:
    """The product, the servers' addresses by side, and the accelerator; the client's link is one of 1 Gbit/s (tc-tbf)."""
    with product_on_host(folder, share) as product, virtual_machine(product, "--package", "nginx") as accelerator:
        with bare_metal(product.host, share, folder / "metal.log") as plain:
            with nginx_on_metal(product.host, folder, share) as metal:
                found = {**plain, "vm nginx": f"{ADDRESS}:{NGINX_PORT}", "metal nginx": metal}
                shape = ("root", "tbf", "rate", LINK, "burst", "256kb", "latency", "50ms")
                product.host.run("tc", "qdisc", "replace", "dev", "client0", *shape)
                yield product, {side: found[side] for side in SIDES if side in found}, accelerator


@contextlib.contextmanager
def without_vm(folder: Path, share: Path) -> Iterator[tuple[Inside, dict[str, str]]]:
    """How to run something where the client is, and the servers' addresses by side; on a link of 1 Gbit/s too."""
    folder.mkdir()
    with routed() as network, deployed(network, folder, share) as deployment:
        argv = [sys.executable, "-m", "guest_agent.examples.media_server", "--root", str(share), "--port", str(PLAIN_PORT)]
        metal = Process(network.host, [*argv, "--no-offload"], folder / "metal.log")
        metal.start()
        try:
            wait_for(lambda: "serving" in metal.log.read_text(), seconds=20, what="the media server on bare metal")
            network.shape(LINK)
            gateway = network.client.run("ip", "-4", "route", "show", "default").split()[2]
            servers = (f"{network.guest_address[4]}:{deployment.port}", f"{gateway}:{PLAIN_PORT}")
            inside = functools.partial(_inside, network.client.name)
            yield inside, dict(zip(("namespace", "namespace metal"), servers, strict=True))
        finally:
            metal.stop()


def _inside(namespace: str, *argv: str) -> list[str]:
    return ["ip", "netns", "exec", namespace, *argv]


# Judging: pure.


def seconds(rows: Sequence[dict[str, Any]], ladder: str, side: str, clients: int) -> list[float]:
    """Of every repeat."""
    return [row["seconds"] for row in rows if (row["ladder"], row["side"], row["clients"]) == (ladder, side, clients)]


def ratio(rows: Sequence[dict[str, Any]], ladder: str, clients: int, side: str, base: str) -> float:
    """Median elapsed time of one side over that of another."""
    ours, other = (statistics.median(seconds(rows, ladder, name, clients)) for name in (side, base))
    return ours / other


def loads_of(rows: Sequence[dict[str, Any]]) -> list[int]:
    """How many clients there were, ascending."""
    return sorted({row["clients"] for row in rows})


def names(accelerator: str) -> dict[str, str]:
    """What the sides are called: an emulated VM is called so beside each of its numbers."""
    emulated = " (emulated)" if accelerator == "tcg" else ""
    return {side: name + emulated * (side in ("vm", "vm nginx", "offload")) for side, name in SIDES.items()}


def judge(rows: Sequence[dict[str, Any]], counters: dict[str, Any], accelerator: str) -> list[Bar]:
    """For each number of clients, beside each server on bare metal."""
    bars, called = [], names(accelerator)
    for clients in loads_of(rows):
        for ladder, limit in LIMITS.items():
            for side, base in COMPARED:
                name = f"elapsed time, {ladder}, {clients} client{'s' if clients > 1 else ''}, {called[side]}"
                bars.append(Bar(name, ratio(rows, ladder, clients, side, base), f"of {called[base]}", limit, "<="))
    large = counters["offloaded"] + counters["failed"] + sum(n for reason, n in counters["local"].items() if reason != "too_small")
    return [*bars, Bar("segments that the host delivered", counters["offloaded"] / max(large, 1), "of all", 0.99, ">=")]


# Showing.


def tables(rows: Sequence[dict[str, Any]], accelerator: str) -> list[Table]:
    """Elapsed times by load."""
    found = []
    for clients in loads_of(rows):
        title = f"elapsed seconds, median (spread); {clients} clients"
        shown = Table("ladder", *names(accelerator).values(), title=title, title_justify="left")
        for ladder in LADDERS:
            medians = [bench.median_and_spread(seconds(rows, ladder.name, side, clients)) for side in SIDES]
            shown.add_row(f"{ladder.name}, {ladder.rate}", *(f"{median:.2f} ({spread:.2f})" for median, spread in medians))
        found.append(shown)
    return found


def plot(rows: Sequence[dict[str, Any]], accelerator: str, path: Path) -> None:
    """Fig. 4: bars by ladder, of the VM's own time; the paper's as crosses."""
    loads = loads_of(rows)
    with bench.drawing(path, columns=len(loads)) as axes:
        for axis, clients in zip(axes, loads, strict=True):
            for at, (side, name) in enumerate(names(accelerator).items()):
                places = [place + (at - 3) * 0.12 for place in range(len(LADDERS))]
                axis.bar(places, [ratio(rows, ladder.name, clients, side, "vm") for ladder in LADDERS], 0.11, label=name)
                known = [(place, PAPER[ladder.name][side]) for place, ladder in zip(places, LADDERS, strict=True)
                         if side in PAPER.get(ladder.name, {})]  # fmt: skip
                label = "Jeong 2015" if side == "vm" else None
                axis.plot([x for x, _ in known], [y for _, y in known], "kx", label=label)
            axis.set(ylabel="elapsed time / that of the VM alone", title=f"{clients} clients, {LINK}")
            axis.set_xticks(range(len(LADDERS)), [f"{ladder.name}, {ladder.rate}" for ladder in LADDERS])
            axis.legend()


def main() -> int:
    """The benchmark."""
    options = bench.arguments("how long a film takes")
    build(also=("nginx",))
    with tempfile.TemporaryDirectory() as name:
        folder, share = Path(name), Path(name) / "share"
        for ladder in LADDERS:
            make_film(share, ladder)
        loads = QUICK if options.quick else FULL
        with with_vm(folder, share) as (product, servers, accelerator):
            shaping = f" The link of {LINK} is a token bucket of 256 kB: what is smaller passes at the speed of memory."
            report = Report("dash", setups.caveat(accelerator) + shaping)
            report.rows = measure(product.host.client.command, servers, loads)
            report.details = {"accelerator": accelerator, "media_server": product.counters(ADDRESS)}
        with without_vm(folder / "namespaces", share) as (inside, servers):
            report.rows += measure(inside, servers, loads)
    report.bars = judge(report.rows, report.details["media_server"], accelerator)
    if options.plot:
        plot(report.rows, accelerator, options.plot)
    return bench.finish(report, options, tables(report.rows, accelerator))


if __name__ == "__main__":
    sys.exit(main())
