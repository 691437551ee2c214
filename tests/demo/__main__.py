# SPDX-License-Identifier: Apache-2.0
"""`./run demo [--keep] [--json FILE]`, `./run demo live`, `./run demo migrate`: everything from nothing to a played stream, and
nothing left behind.

A hypervisor in namespaces of its own (`tests/vm/libvirt_host.py`), the service, a VM that `streamlift deploy` makes, and curl
and ffmpeg as its clients. Exit status 0 only if every byte matched and every large segment was offloaded. `live` is in
`live.py`, `migrate` in `migrate.py`."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from tests.demo import clients, content, live, migrate
from tests.demo.report import Report, Row
from tests.performance import fetch
from tests.vm.libvirt_host import LibvirtHost
from tests.vm.moving import moving
from tests.vm.product import Product
from tests.vm.setups import ADDRESS, NAMES, bare_metal, caveat, product_on_host, virtual_machine
from tests.vm.two_hosts import TwoHosts
from vm_images.build import build, cache_directory

BLOCK_BYTES = 30_000_000
REPEATS = 3
console = Console(stderr=True)


@contextlib.contextmanager
def stage(words: str) -> Iterator[Callable[[str], None]]:
    """Say what takes its time, how it goes on, and how long it took."""
    begin = time.monotonic()
    with console.status(f"{words} ...") as status:
        if not console.is_terminal:
            console.print(f"{words} ...")
        yield lambda line: status.update(f"{words}: {line}")
    console.print(f"[green]done[/green] {words} ({time.monotonic() - begin:.1f} s)")


def watch(product: Product, ladder: content.Ladder, root: Path) -> Row:
    """Fetch a ladder as clients do, and compare."""
    client, files = product.host.client, content.files(root, ladder)
    before = product.counters(ADDRESS)
    curl = clients.curl(client, ADDRESS, root, files)
    ffmpeg = clients.ffmpeg(client, ADDRESS, root, ladder.name, files)
    product.wait_home()
    after = product.counters(ADDRESS)
    row = Row(ladder.name, ladder.segments, curl.sizes + ffmpeg.sizes, curl.faults + ffmpeg.faults)
    row.offloaded = after["offloaded"] - before["offloaded"]
    row.local = Counter(after["local"]) - Counter(before["local"])
    row.steps = product.ask("status", samples=max(1, row.offloaded))["durations"]
    return row


def measure(product: Product, ladder: content.Ladder, root: Path, servers: dict[str, str]) -> dict[str, list[float]]:
    """Mbit/s of blocks of requests for one segment of the ladder, the set-ups in turn."""
    segment = content.files(root, ladder)[-2]
    requests = min(max(2, BLOCK_BYTES // segment.stat().st_size), 40)
    path = f"/{segment.relative_to(root)}"
    rows = fetch.measure(product.host.client.command, servers, path, requests=requests, repeats=REPEATS)
    return {name: [fetch.megabits(row) for row in rows if row["side"] == name] for name in NAMES}


def run(product: Product, root: Path, accelerator: str) -> Report:
    """All that the table shows."""
    report = Report(ADDRESS, accelerator)
    for ladder in content.LADDERS:
        with stage(f"curl and ffmpeg fetch {ladder.name}"):
            report.rows.append(watch(product, ladder, root))
    with bare_metal(product.host, root, product.log.with_name("metal.log")) as servers:
        for ladder, row in zip(content.LADDERS, report.rows, strict=True):
            with stage(f"measuring {ladder.name}: {', '.join(NAMES.values())}"):
                row.rates = measure(product, ladder, root, servers)
    return report


@contextlib.contextmanager
def reachable(host: LibvirtHost) -> Iterator[None]:
    """A link from this machine's own network to the demo's, so that any player here can watch."""
    pid = str(host.namespaces.pid)
    near = ("ip", "link", "add", "streamlift-demo", "type", "veth", "peer", "name", "demo0", "netns", pid)
    subprocess.run(near, check=True)
    try:
        host.run("ip", "address", "add", "203.0.113.5/30", "dev", "demo0")
        host.run("ip", "link", "set", "demo0", "up")
        for words in ("address add 203.0.113.6/30 dev streamlift-demo", "link set streamlift-demo up"):
            subprocess.run(["ip", *words.split()], check=True)
        subprocess.run(["ip", "route", "add", f"{ADDRESS}/32", "via", "203.0.113.5"], check=True)
        yield
    finally:
        subprocess.run(["ip", "link", "delete", "streamlift-demo"], check=False)


def keep(product: Product) -> None:
    """Until Ctrl-C."""
    with reachable(product.host):
        out = Console()
        paths = ", ".join(f"{ladder.name}/{content.MANIFEST}" for ladder in content.LADDERS)
        out.print(f"\nThe VM runs. Point a player on this machine at http://{ADDRESS} with one of", soft_wrap=True)
        out.print(f"  {paths}", soft_wrap=True)
        out.print("What becomes of the transfers:", soft_wrap=True)
        out.print(f"  ./run streamlift --config {product.config} status", soft_wrap=True)
        with contextlib.suppress(KeyboardInterrupt):
            out.print("Ctrl-C ends it and cleans up.")
            signal.pause()


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="./run demo", description="a streaming VM, served by the hypervisor")
    shows = ("files", "live", "migrate")
    parser.add_argument("what", nargs="?", choices=shows, default="files", help="a DASH stream, a live one, or a VM that moves")
    parser.add_argument("--keep", action="store_true", help="leave it running until Ctrl-C")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what the table shows")
    return parser.parse_args()


def show_live(options: argparse.Namespace) -> int:
    """A live stream from one encoder to fifty clients; the exit status."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamlift-demo-")))
        share = folder / "share"
        share.mkdir()
        with stage("starting libvirt and the service"):
            product = stack.enter_context(product_on_host(folder, share))
        with stage("booting a VM with `streamlift deploy`"):
            stack.enter_context(virtual_machine(product, "--live-password", live.PASSWORD))
        with stage(f"ffmpeg encodes, {live.CLIENTS} clients watch, {live.STALLED} of them do not read for {live.STALL} s"):
            found = live.watch(product, folder)
        found.show(Console())
        if options.json:
            options.json.write_text(json.dumps(found.as_json(), indent=1) + "\n")
    return 0 if found.holds else 1


def show_migrate(options: argparse.Namespace) -> int:
    """A VM that moves to another hypervisor and back; the exit status."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamlift-demo-")))
        with stage("starting two hypervisors, with the service and the network between them, and a VM with `streamlift deploy`"):
            scene = stack.enter_context(moving(stack.enter_context(TwoHosts()), folder, "routed"))
            migrate.add_download(scene.share)
        with stage("ffmpeg plays, curl downloads, others watch, and the VM moves with `streamlift migrate`") as progress:
            found = migrate.watch(scene, folder, say=progress)
        found.show(Console())
        console.print(caveat(scene.accelerator))
        if options.json:
            options.json.write_text(json.dumps(found.as_json(), indent=1) + "\n")
    return 0 if found.holds else 1


def main() -> int:
    """Entry point; the exit status."""
    options = arguments()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with stage("building the guest image") as progress:
        build(progress=progress)
    if options.what == "live":
        return show_live(options)
    if options.what == "migrate":
        return show_migrate(options)
    with stage("making DASH content") as progress:
        root = content.make(cache_directory().parent / "content", progress=progress)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamlift-demo-")))
        with stage("starting libvirt and the service"):
            product = stack.enter_context(product_on_host(folder, root))
        with stage("booting a VM with `streamlift deploy`"):
            accelerator = stack.enter_context(virtual_machine(product))
        report = run(product, root, accelerator)
        report.show(Console())
        if options.json:
            options.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
        if options.keep:
            keep(product)
    return 0 if report.holds else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
