# SPDX-License-Identifier: Apache-2.0
"""`streamlift`: the host's command line. Tables for people, `--json` for programs."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hypervisor_svc import __version__, control, tables
from hypervisor_svc.advice import INSTALL
from hypervisor_svc.config import Config, document, load
from hypervisor_svc.errors import OperatorError, as_typed
from vm_images.command import BuildError


class _Commands(TyperGroup):
    """Whatever goes wrong that people can mend is said in one place: the cause, and the next command."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        try:
            return super().invoke(ctx)
        except (OperatorError, BuildError) as error:
            raise fail(str(error), error.hint) from None
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise fail(str(error), f"make room: df -h {error.filename or '/'}") from None


def examples(*lines: str) -> str:
    """The last part of a command's help: what it looks like when it is typed."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=examples(
        "sudo streamlift check                              # is this machine ready?",
        "sudo streamlift serve                              # the service; systemd runs it too",
        "sudo streamlift deploy tv1 --share /srv/media      # a VM whose server uses it",
        "sudo streamlift attach myvm --share /srv/media --address 192.168.122.50 --restart",
        "sudo streamlift top                                # what goes on",
    ),
)
image_app = typer.Typer(no_args_is_help=True, help="Guest images.")
app.add_typer(image_app, name="image")
module_app = typer.Typer(no_args_is_help=True, help="The kernel module that keeps connections warm.")
app.add_typer(module_app, name="module")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
ShareFolder = Annotated[Path, typer.Option("--share", help="Host folder that the VM and the service serve from.")]


class _State:
    config_path: str | None = None


def fail(message: str, hint: str = "", *, code: int = 1) -> typer.Exit:
    """Say what is wrong and what to do; the exit to raise. `code` 2 is for a command that was typed wrong."""
    typer.echo(f"streamlift: {message}", err=True)
    if hint:
        typer.echo(f"  {hint}", err=True)
    return typer.Exit(code)


def _config() -> Config:
    return load(_State.config_path)


def _ask(command: str, **arguments: Any) -> dict[str, Any]:
    return control.call(_config().control_socket, command, **arguments)


@contextlib.contextmanager
def _libvirt() -> Iterator[Any]:
    import libvirt

    from hypervisor_svc.domains import open_connection
    from hypervisor_svc.preflight import libvirt_hint

    uri = _config().libvirt.uri
    try:
        connection = open_connection(uri)
    except libvirt.libvirtError as error:
        raise fail(f"libvirt at {uri} does not answer: {error}", libvirt_hint()) from None
    try:
        yield connection
    except libvirt.libvirtError as error:
        raise fail(str(error), "libvirt's own log says more: journalctl -u libvirtd") from None
    finally:
        connection.close()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"streamlift {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    config: Annotated[str | None, typer.Option(help="Configuration file (TOML).", metavar="FILE")] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Serve VMs' client connections from the hypervisor."""
    _State.config_path = config


@app.command(epilog=examples("streamlift serve", "streamlift --config /etc/streamlift/other.toml serve"))
def serve() -> None:
    """Run the service in the foreground (systemd runs this)."""
    from hypervisor_svc import preflight, service

    config = _config()
    preflight.require(config)
    firewall = preflight.firewall(config)
    if firewall.hint:
        fail(firewall.message, firewall.hint)  # said, and not the end: the operator may know better
    raise typer.Exit(service.run(config))


@app.command(epilog=examples("sudo streamlift check", "streamlift check --json | jq '.[].hint'"))
def check(as_json: AsJson = False) -> None:
    """Look at what the service needs of this machine, and say the next command for what is missing. Exit status 1: it is."""
    from hypervisor_svc import preflight

    found = list(preflight.examine(_config()))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
    else:
        tables.show_findings(found)
    raise typer.Exit(any(finding.hint for finding in found))


@app.command(epilog=examples("streamlift top", "streamlift top --interval 0.5", "streamlift top --times 1 > snapshot.txt"))
def top(
    interval: Annotated[float, typer.Option(help="Seconds between two pictures, 0.2 at least.")] = 1.0,
    times: Annotated[int | None, typer.Option(help="End after so many pictures; else at q or Ctrl-C.", min=1)] = None,
) -> None:
    """The status and the busiest connections, drawn again while they change; q or Ctrl-C ends it."""
    from hypervisor_svc import top

    top.run(_ask, interval=interval, times=times)


@app.command(epilog=examples("streamlift status", "streamlift status --json | jq .totals"))
def status(as_json: AsJson = False) -> None:
    """Service, VMs and what became of their connections."""
    result = _ask("status")
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        tables.show_status(result)


@app.command(epilog=examples("streamlift connections", "streamlift connections --json | jq length"))
def connections(as_json: AsJson = False) -> None:
    """Connections that the host has now."""
    rows = _ask("connections")["connections"]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        tables.show_connections(rows)


@app.command(epilog=examples("streamlift relays --watch", 'streamlift relays --json | jq ".[].sink_count"'))
def relays(
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show them anew every second, until Ctrl-C.")] = False,
) -> None:
    """One-to-many sessions: sinks, rates, lag and losses, the engine and why it was chosen."""
    while True:
        rows = _ask("relays")["relays"]
        if as_json:
            typer.echo(json.dumps(rows, indent=None if watch else 2))
        else:
            tables.show_relays(rows, clear=watch)
        if not watch:
            return
        try:
            time.sleep(1)
        except KeyboardInterrupt:
            return


@app.command("hand-back", epilog=examples(
        "streamlift hand-back --all tv1",
        "streamlift hand-back tv1 0123456789abcdef0123456789abcdef",
))
def hand_back(
    domain: Annotated[str, typer.Argument(help="Name of the VM.")],
    token: Annotated[str | None, typer.Argument(help="One transfer (see `connections`).")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All connections of the VM.")] = False,
) -> None:
    """Send connections home at once; the guest's server sends the rest itself."""
    if (token is None) == (not everything):
        raise fail("say which: a token, or --all", f"streamlift hand-back --all {domain}", code=2)
    result = _ask("hand_back", machine=domain, token=token)
    typer.echo(f"{result['handed_back']} connections are on their way home")


LateChoice = Annotated[str, typer.Option(help="What becomes of a transfer that is late: finish (sent from here), reset, wait.")]
Deadline = Annotated[float, typer.Option(help="Seconds without a connection that came home, after which others are late.", min=0)]


def _late(value: str) -> str:
    if value not in ("finish", "reset", "wait"):
        raise fail(f"--late {value!r} is none of finish, reset, wait", code=2)
    return value


@app.command(epilog=examples("streamlift leave tv1", "streamlift leave --late reset tv1 && virsh save tv1 /srv/tv1.saved"))
def leave(
    domain: Annotated[str, typer.Argument(help="Name of the VM.")],
    deadline: Deadline = 2.0,
    late: LateChoice = "finish",
    as_json: AsJson = False,
) -> None:
    """Bring everything of a VM home and have it unmount its share: then it can be migrated or saved by other means."""
    from hypervisor_svc.move_commands import leave as run

    run(_config().control_socket, domain, deadline=deadline, late=_late(late), as_json=as_json)


@app.command("return", epilog=examples("streamlift return tv1"))
def come_back(domain: Annotated[str, typer.Argument(help="Name of the VM.")], as_json: AsJson = False) -> None:
    """The opposite of `leave`; also while that is under way."""
    result = _ask("return", machine=domain)
    typer.echo(json.dumps(result) if as_json else f"{domain} is here again, after {result['ms']:g} ms")


@app.command(epilog=examples("streamlift expect tv1"))
def expect(domain: Annotated[str, typer.Argument(help="Name of the VM.")], as_json: AsJson = False) -> None:
    """Tell the service that a VM is about to come; libvirt's hook does. The service would find it by itself, within seconds."""
    result = _ask("expect", machine=domain)
    typer.echo(json.dumps(result) if as_json else f"{domain} is expected")


@app.command(epilog=examples("streamlift migrate tv1 qemu+ssh://host2/system", "streamlift migrate --late wait --unsafe tv1 qemu+ssh://host2/system"))
def migrate(
    domain: Annotated[str, typer.Argument(help="Name of the VM.")],
    destination: Annotated[str, typer.Argument(help="libvirt URI of the other host, as this host's libvirtd reaches it.")],
    deadline: Deadline = 2.0,
    late: LateChoice = "finish",
    migrate_uri: Annotated[str | None, typer.Option(help="Where QEMU itself connects to.", metavar="URI")] = None,
    destination_control: Annotated[
        str | None, typer.Option(help="Control socket of the service there, if it can be reached from here.", metavar="SOCKET")
    ] = None,
    copy_storage: Annotated[bool, typer.Option("--copy-storage", help="Copy what the VM's disk has of its own.")] = False,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Both hosts have the disk's storage; libvirt cannot tell.")] = False,
    bandwidth: Annotated[int, typer.Option(help="MiB/s; 0: no limit of ours.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Migrate a VM, live: its connections come home, it moves, and they are handed out there. Ctrl-C cancels."""
    from hypervisor_svc.leave import Late
    from hypervisor_svc.migrate import Plan
    from hypervisor_svc.move_commands import migrate as run

    plan = Plan(
        destination=destination,
        control=_config().control_socket,
        source=_config().libvirt.uri,
        destination_control=destination_control,
        deadline=deadline,
        late=Late(_late(late)),
        migrate_uri=migrate_uri,
        copy_storage=copy_storage,
        unsafe=unsafe,
        bandwidth=bandwidth,
    )
    with _libvirt() as connection:
        run(connection, domain, plan, as_json=as_json)


@app.command(
    epilog=examples(
        "streamlift deploy tv1 --share /srv/media",
        "streamlift deploy tv2 --share /srv/media --bridge br0 --address 192.0.2.7/24 --gateway 192.0.2.1",
        "streamlift deploy radio --share /srv/media --live-password SECRET",
    )
)
def deploy(
    name: Annotated[str, typer.Argument(help="Name of the new VM.")],
    share: ShareFolder,
    address: Annotated[str | None, typer.Option(help="IPv4 address and prefix length; routed: 10.78.0.2/24.")] = None,
    address6: Annotated[str | None, typer.Option(help="IPv6 address and prefix length; routed: fd78::2/64.")] = None,
    gateway: Annotated[str | None, typer.Option(help="IPv4 gateway; routed: the network's first address.")] = None,
    gateway6: Annotated[str | None, typer.Option(help="IPv6 gateway; routed: the network's first address.")] = None,
    memory: Annotated[int, typer.Option(help="MiB.")] = 512,
    vcpus: Annotated[int, typer.Option(help="Virtual processors.")] = 2,
    kernel: Annotated[str, typer.Option(help="Kernel series of the guest: 6.1 or 6.12.")] = "6.1",
    accelerator: Annotated[str, typer.Option(help="auto, kvm or tcg; auto tries whether KVM works.")] = "auto",
    mode: Annotated[str | None, typer.Option(help="routed or bridged; with --bridge: bridged.")] = None,
    bridge: Annotated[str | None, typer.Option(help="Join this bridge of the host, which has an address on it.")] = None,
    package: Annotated[list[str] | None, typer.Option(help="A Debian package more in the image; may be repeated.")] = None,
    live_password: Annotated[
        str | None, typer.Option(help="Start the image's live server on port 8000, for encoders that know this word.")
    ] = None,
) -> None:
    """Build the image if needed, make a streaming VM and start it: on a network of its own, or on a bridge of the host."""
    from hypervisor_svc.accelerator import choose, kvm_obstacle
    from hypervisor_svc.deploy import BRIDGE, Deployment
    from hypervisor_svc.deploy import deploy as make
    from vm_images.build import build

    mode = mode or ("bridged" if bridge else "routed")
    for value, allowed in ((accelerator, ("auto", "kvm", "tcg")), (mode, ("routed", "bridged")), (kernel, ("6.1", "6.12"))):
        if value not in allowed:
            raise fail(f"{value!r} is none of {', '.join(allowed)}", code=2)
    if mode == "bridged" and not (bridge and (address or address6)):
        raise fail("a bridged VM needs a bridge and an address", "for example --bridge br0 --address 192.0.2.7/24", code=2)
    with _libvirt() as connection:
        chosen = choose(accelerator)  # type: ignore[arg-type]
        image = build(kernel, also=tuple(package or ()), progress=lambda line: typer.echo(line, err=True))
        wanted = Deployment(
            name=name,
            image=image,
            share_directory=share.resolve(),
            address4=_address(address, Deployment.address4, mode),
            address6=_address(address6, Deployment.address6, mode),
            gateway4=gateway,
            gateway6=gateway6,
            memory_mib=memory,
            vcpus=vcpus,
            accelerator=chosen,
            mode=mode,  # type: ignore[arg-type]
            bridge=bridge or BRIDGE,
            live_password=live_password,
        )
        made = make(connection, wanted)
    typer.echo(f"{made.name} runs ({made.accelerator}) at {', '.join(made.addresses)}; console: {made.console_log}")
    if (accelerator, chosen) == ("auto", "tcg"):
        typer.echo(f"  it is emulated, and slow: {kvm_obstacle()}")


def _address(given: str | None, routed: str | None, mode: str) -> str | None:
    """Only routed VMs have an address by default; an empty one means none of this family."""
    return (given or None) if given is not None or mode == "bridged" else routed


@app.command(epilog=examples("streamlift undeploy tv1"))
def undeploy(name: Annotated[str, typer.Argument(help="A VM that `deploy` made.")]) -> None:
    """Stop and remove a VM and all that `deploy` made for it."""
    from hypervisor_svc.deploy import undeploy as remove

    with _libvirt() as connection:
        remove(connection, name)
    typer.echo(f"{name} is gone")


@app.command(
    epilog=examples(
        "streamlift attach myvm --share /srv/media --address 192.168.122.50 --restart",
        "streamlift attach myvm --address 192.168.122.51",
    )
)
def attach(
    domain: Annotated[str, typer.Argument(help="A VM that libvirt knows.")],
    share: Annotated[Path | None, typer.Option(help="Host folder that the VM and the service serve from.")] = None,
    address: Annotated[
        list[str] | None, typer.Option(help="An address of the VM; may be repeated. Default: its leases of libvirt's DHCP.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Shut the VM down and start it again, if it needs that.")] = False,
    agent: Annotated[bool, typer.Option(help="Put the agent on the share, for the VM to install.")] = True,
) -> None:
    """Give an existing VM the channel and the share, and put the agent there. What is not given stays as it is."""
    from hypervisor_svc import agent_package
    from hypervisor_svc.attach import attach as change
    from hypervisor_svc.attach import complete

    with _libvirt() as connection:
        made = change(connection, domain, share_directory=share, addresses=address or ())
        if agent and made.share:
            agent_package.write(made.share / agent_package.NAME)
        if restart:
            complete(connection, domain)
            made = dataclasses.replace(made, restart_needed=False)
    typer.echo(made.message)
    if agent:
        typer.echo("next, in the VM, as root:")
        typer.echo("  mount --mkdir -t 9p -o trans=virtio streamlift /srv/share")
        typer.echo(f"  {INSTALL}")


@app.command(epilog=examples("streamlift detach myvm"))
def detach(domain: Annotated[str, typer.Argument(help="A VM that `attach` changed.")]) -> None:
    """Take away what `attach` gave: channel, share and addresses."""
    from hypervisor_svc.attach import detach as change

    with _libvirt() as connection:
        typer.echo(change(connection, domain).message)


@app.command(
    epilog=examples("streamlift bench --domain myvm --path film.mp4", "streamlift bench --domain tv1 --path a.bin --json out.json")
)
def bench(
    domain: Annotated[str, typer.Option(help="The VM.")],
    path: Annotated[str, typer.Option(help="What is fetched from the VM's server: the path of a URL.")],
    port: Annotated[int, typer.Option(help="Of the VM's server.")] = 80,
    address: Annotated[str | None, typer.Option(help="Of the VM; default: its first.")] = None,
    requests: Annotated[int, typer.Option(help="Of each block.", min=1)] = 10,
    blocks: Annotated[int, typer.Option(help="Of each side, in turns.", min=1)] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was measured.", metavar="FILE")] = None,
) -> None:
    """What the offload is worth: fetch a file through a VM's own server, with it and without it, in turns. While it measures
    without, the VM's other clients are served by the VM too. Nothing in the VM is changed."""
    from hypervisor_svc import benchmark

    found = benchmark.run(_ask, domain, path=path, port=port, address=address, requests=requests, blocks=blocks)
    if json_file:
        benchmark.write(found, json_file)
    benchmark.show(found)


@app.command("config", epilog=examples("streamlift config > /etc/streamlift/streamlift.toml"))
def show_config() -> None:
    """Print a configuration file with every key, its meaning and its default."""
    typer.echo(document(), nl=False)


@app.command(epilog=examples("streamlift man --out /usr/local/share/man/man1", "streamlift man --out . && man -l ./streamlift.1"))
def man(out: Annotated[Path, typer.Option(help="Folder to write them to.")]) -> None:
    """Write the manual pages: streamlift(1), streamlift-agent(1), streamlift.toml(5)."""
    from hypervisor_svc import manual

    typer.echo("\n".join(map(str, manual.write(app, out))))


@image_app.command("build", epilog=examples("streamlift image build --kernel 6.12"))
def image_build(
    kernel: Annotated[str, typer.Option(help="Kernel series: 6.1 or 6.12.")] = "6.1",
    package: Annotated[list[str] | None, typer.Option(help="A Debian package more in it; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Build the guest image (kept in the cache, keyed by its content)."""
    from vm_images.build import build

    image = build(kernel, also=tuple(package or ()), progress=lambda line: typer.echo(line, err=True))
    facts = {"root": str(image.root), "kernel": str(image.kernel), "initrd": str(image.initrd), "version": image.version}
    typer.echo(json.dumps(facts) if as_json else "\n".join(f"{key:8}{value}" for key, value in facts.items()))


@module_app.command("build", epilog=examples(
        "streamlift module build",
        "streamlift module build omss --headers /usr/src/linux-headers-6.1.0-44-amd64",
))
def module_build(
    names: Annotated[list[str] | None, typer.Argument(help="Which; default: all.", metavar="[NAME]...")] = None,
    headers: Annotated[Path | None, typer.Option(help="Kernel headers; default: those of the running kernel.")] = None,
) -> None:
    """Build the modules for the running kernel and install them."""
    from hypervisor_svc import module

    made = module.build(headers, names or module.NAMES)
    typer.echo(f"built {', '.join(map(str, made))}; next: {as_typed('module load')}")


@module_app.command("load", epilog=examples("streamlift module load", "streamlift module load socket_offload"))
def module_load(
    names: Annotated[list[str] | None, typer.Argument(help="Which; default: all.", metavar="[NAME]...")] = None,
) -> None:
    """Load the modules; a service that starts after this uses them."""
    from hypervisor_svc import module

    module.load(names or module.NAMES)
    typer.echo("\n".join(f"{facts['module']}: {facts['why']}" for facts in module.status()))


@module_app.command("status", epilog=examples("streamlift module status"))
def module_status(as_json: AsJson = False) -> None:
    """Are the modules built and loaded, which backend and which relay engine would be used, and why?"""
    from hypervisor_svc import module

    found = module.status()
    if as_json:
        typer.echo(json.dumps(found))
    else:
        texts = ("\n".join(f"{key:9}{value}" for key, value in facts.items()) for facts in found)
        typer.echo("\n\n".join(texts))


def main() -> None:
    """Entry point of `streamlift`."""
    app(prog_name="streamlift", args=sys.argv[1:])
