# SPDX-License-Identifier: Apache-2.0
"""What the service needs of the machine, looked at before it starts (`streamlift serve`) or when somebody asks
(`streamlift check`): one finding a need, and with each that is not met the next command to type."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypervisor_svc import control
from hypervisor_svc.accelerator import kvm_obstacle
from hypervisor_svc.config import Config
from hypervisor_svc.conntrack import Conntrack
from hypervisor_svc.errors import OperatorError, as_root, as_typed

_CAP_NET_ADMIN = 12


class PreflightError(OperatorError):
    """The service cannot start here."""


@dataclass(frozen=True)
class Finding:
    """`message` says how it is; `hint` is the next command where something is missing, and empty where nothing is."""

    subject: str
    message: str
    hint: str = ""


Look = Callable[[Config], Finding]


def require(config: Config) -> None:
    """All without which the service cannot run, in an order in which none hides another. Raises PreflightError."""
    for look in (_root, _capability, _nftables, _connection_tracking, _runtime_folder, _alone):
        finding = look(config)
        if finding.hint:
            raise PreflightError(finding.message, finding.hint)


def examine(config: Config) -> Iterator[Finding]:
    """Everything, also what the service can do without; stops at what would make all the rest a guess."""
    yield (finding := _root(config))
    if finding.hint:
        return
    looks: tuple[Look, ...] = (_capability, _nftables, _connection_tracking, firewall, _runtime_folder, _libvirt, _kvm)
    for look in looks:
        yield look(config)


def _root(config: Config) -> Finding:
    if os.geteuid() != 0:
        return Finding("root", "the service moves sockets and needs root", as_root())
    return Finding("root", "yes")


def _capability(config: Config) -> Finding:
    """proc(5): CapEff of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = int(next(line.split()[1] for line in lines if line.startswith("CapEff:")), 16)
    if not effective >> _CAP_NET_ADMIN & 1:
        hint = "run it on the hypervisor itself, or give the container --cap-add NET_ADMIN"
        return Finding("CAP_NET_ADMIN", "root is without CAP_NET_ADMIN here: is this a container?", hint)
    return Finding("CAP_NET_ADMIN", "yes")


def _nftables(config: Config) -> Finding:
    if shutil.which("nft") is None:
        return Finding("nftables", "nft is not installed; redirecting connections needs it", "sudo apt-get install nftables")
    asked = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False)
    if asked.returncode:
        return Finding("nftables", f"the kernel refuses nftables: {asked.stderr.strip()}", "sudo modprobe nf_tables")
    return Finding("nftables", "yes")


def _connection_tracking(config: Config) -> Finding:
    table = Conntrack()
    try:
        table.probe()
    except OSError as error:
        message = f"the kernel does not answer for connection tracking: {error.strerror}"
        return Finding("connection tracking", message, "sudo modprobe nf_conntrack_netlink")
    finally:
        table.close()
    return Finding("connection tracking", "yes")


def _runtime_folder(config: Config) -> Finding:
    folder = config.service.runtime_dir
    try:
        os.makedirs(folder, mode=0o755, exist_ok=True)
    except OSError as error:
        hint = f"name another: [service] runtime_dir (every key: {as_typed('config')})"
        return Finding("runtime folder", f"{folder} cannot be made: {error.strerror}", hint)
    return Finding("runtime folder", folder)


def _alone(config: Config) -> Finding:
    """A second service would take the control socket away from the first and end what that one has out."""
    path = config.control_socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return Finding("control socket", path)
    try:
        who = f"process {control.call(path, 'status')['pid']}"
    except OperatorError:
        who = "another program"
    hint = f"it runs already: {as_typed('status')}; or stop it first: systemctl stop streamlift"
    return Finding("control socket", f"{path} is taken by {who}", hint)


def firewall(config: Config) -> Finding:
    """A rule set that drops what it does not know must let redirected connections in: they end at the host's own ports."""
    try:
        listed = subprocess.run(["nft", "-j", "list", "ruleset"], capture_output=True, text=True, check=False).stdout
        rules = [entry for entry in json.loads(listed)["nftables"] if "metainfo" not in entry]
    except (OSError, ValueError, KeyError):
        return Finding("firewall", "not looked at: nft does not answer")
    if config.redirect.mode != "nat":
        return Finding("firewall", "nothing to let in: mode transparent")
    for chain in (entry["chain"] for entry in rules if "chain" in entry):
        if _drops_input(chain) and not _lets_redirected_in(chain, rules):
            name = f"{chain['family']} {chain['table']} {chain['name']}"
            message = f"the firewall's chain {name} drops redirected connections: their clients would hang"
            return Finding("firewall", message, f"sudo nft insert rule {name} ct status dnat accept")
    return Finding("firewall", "lets redirected connections in")


def _drops_input(chain: dict[str, Any]) -> bool:
    return chain.get("hook") == "input" and chain.get("type") == "filter" and chain.get("policy") == "drop"


def _lets_redirected_in(chain: dict[str, Any], rules: list[dict[str, Any]]) -> bool:
    """Some rule of the chain accepts by `ct status dnat`, or accepts everything."""
    own = [entry["rule"] for entry in rules if "rule" in entry and _is_in(entry["rule"], chain)]
    return any({"accept": None} in rule["expr"] and _matches_redirected(rule["expr"]) for rule in own)


def _is_in(rule: dict[str, Any], chain: dict[str, Any]) -> bool:
    return (rule["family"], rule["table"], rule["chain"]) == (chain["family"], chain["table"], chain["name"])


def _matches_redirected(expressions: list[dict[str, Any]]) -> bool:
    matches = [expression["match"] for expression in expressions if "match" in expression]
    return all(match["left"] == {"ct": {"key": "status"}} and "dnat" in json.dumps(match["right"]) for match in matches)


def _libvirt(config: Config) -> Finding:
    import libvirt

    from hypervisor_svc.domains import open_connection

    if not config.libvirt.enabled:
        return Finding("libvirt", "not used: [libvirt] enabled = false")
    try:
        open_connection(config.libvirt.uri).close()
    except libvirt.libvirtError as error:
        return Finding("libvirt", f"libvirt at {config.libvirt.uri} does not answer: {error}", libvirt_hint())
    return Finding("libvirt", config.libvirt.uri)


def libvirt_hint() -> str:
    """The next command where libvirt does not answer."""
    if not any(shutil.which(daemon) for daemon in ("libvirtd", "virtqemud")):
        return "sudo apt-get install libvirt-daemon-system qemu-system-x86"
    return "sudo systemctl start libvirtd"


def _kvm(config: Config) -> Finding:
    obstacle = kvm_obstacle()
    return Finding("KVM", f"{obstacle}; VMs are emulated, and slow" if obstacle else "works")
