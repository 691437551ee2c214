# SPDX-License-Identifier: Apache-2.0
"""The service's configuration: one TOML file, every key typed and documented here. An unknown key or a bad value is
refused with file and line, and with what would be allowed."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from hypervisor_svc.errors import OperatorError, as_typed

DEFAULT_PATH = "/etc/streamlift/streamlift.toml"


_EXAMPLE = f"every key, its meaning and its default: {as_typed('config')}"


class ConfigError(OperatorError):
    """The file cannot be used; the text says where and why."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Service(_Section):
    """The service itself."""

    runtime_dir: str = Field(default="/run/streamlift", description="Where the control socket lives.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="What is logged.")
    backend: Literal["auto", "tcp_repair", "socket_offload"] = Field(
        default="auto", description="How sockets are moved; auto: by the kernel module, if it is loaded."
    )


class RedirectSection(_Section):
    """How packets of a connection that is out reach the host."""

    mode: Literal["nat", "transparent"] = Field(default="nat", description="NAT, or sockets with the guest's address.")
    port_range: tuple[int, int] = Field(default=(61000, 61063), description="Ports of restored sockets (nat), first and last.")
    address4: str | None = Field(default=None, description="Host's IPv4 address for NAT; default: the one towards the VM.")
    address6: str | None = Field(default=None, description="Host's IPv6 address for NAT; default: the one towards the VM.")

    @field_validator("port_range")
    @classmethod
    def _ports(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1024 <= value[0] <= value[1] <= 65535:
            raise ValueError("two ports from 1024 to 65535, the smaller first")
        return value


class Policy(_Section):
    """What one VM may have."""

    threshold_bytes: int = Field(default=65536, ge=1, description="Transfers smaller than this stay in the guest.")
    max_connections_per_vm: int = Field(default=4096, ge=1, description="Connections of one VM that may be out at once.")
    max_queue_bytes: int = Field(default=16 << 20, ge=65536, le=16 << 20, description="Queued bytes that may travel with a socket.")
    max_frames_per_second: int = Field(default=20000, ge=10, description="Messages a second; a guest that sends more waits.")
    vm_priority: dict[str, Literal["low", "normal", "high"]] = Field(
        default_factory=dict,
        description="Class of a VM by its name, else normal: while one of a higher class has something to send, lower ones wait.",
    )


class Serve(_Section):
    """How files are sent."""

    quantum_bytes: int = Field(default=524288, ge=4096, description="Bytes per connection and turn.")
    orphan_timeout_seconds: float = Field(default=10.0, ge=0.1, le=600, description="How long a connection waits for a lost agent.")
    next_request_seconds: float = Field(
        default=30.0, ge=0, le=600, description="How long a connection waits for a request that is anticipated; 0: not at all."
    )


class RelaySection(_Section):
    """One source, many sinks."""

    engine: Literal["auto", "user", "omss"] = Field(
        default="auto", description="Who relays; auto: the kernel module omss, if it is loaded; files are always the service's own."
    )
    max_relays_per_vm: int = Field(default=64, ge=0, description="Relays of one VM that may be open at once.")
    max_ring_bytes_per_vm: int = Field(default=256 << 20, ge=4096, description="What the rings of one VM's relays may keep.")
    udp_ports: tuple[int, int] | None = Field(
        default=None, description="UDP ports of this host that VMs may take for sources, first and last; default: none."
    )

    @field_validator("udp_ports")
    @classmethod
    def _ports(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1024 <= value[0] <= value[1] <= 65535:
            raise ValueError("two ports from 1024 to 65535, the smaller first")
        return value


class Libvirt(_Section):
    """Where VMs are found."""

    enabled: bool = Field(default=True, description="Look for VMs with the channel in libvirt.")
    uri: str = Field(default="qemu:///system", description="libvirt connection URI.")


class StaticVm(_Section):
    """A VM that libvirt does not manage."""

    name: str = Field(description="Name in status.", min_length=1)
    channel: str = Field(description="Unix socket of the virtio-serial port (QEMU: -chardev socket,server=on).")
    share: str = Field(description="Folder that is exported to the VM over 9p.")
    addresses: tuple[str, ...] = Field(description="The VM's own addresses.", min_length=1)
    bridge: str | None = Field(default=None, description="Host bridge that the VM is a port of; default: the VM is routed.")
    qmp: str | None = Field(default=None, description="Unix socket of a QMP monitor that nobody else uses; default: not watched.")

    @field_validator("addresses")
    @classmethod
    def _canonical(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ip_address(value)) for value in values)


class Config(_Section):
    """The whole file."""

    service: Service = Field(default_factory=Service)
    redirect: RedirectSection = Field(default_factory=RedirectSection)
    policy: Policy = Field(default_factory=Policy)
    serve: Serve = Field(default_factory=Serve)
    relay: RelaySection = Field(default_factory=RelaySection)
    libvirt: Libvirt = Field(default_factory=Libvirt)
    vm: tuple[StaticVm, ...] = ()

    @property
    def control_socket(self) -> str:
        """Where operators ask the service."""
        return os.path.join(self.service.runtime_dir, "control.sock")


def load(path: str | None) -> Config:
    """Read the file. Without `path` the default one, which may be missing. Raises ConfigError."""
    chosen = path or DEFAULT_PATH
    if path is None and not os.path.exists(chosen):
        return Config()
    try:
        with open(chosen, encoding="utf-8") as file:
            return parse(file.read(), chosen)
    except OSError as error:
        raise ConfigError(f"{chosen}: {error.strerror}", _EXAMPLE) from None


def parse(text: str, name: str = "<text>") -> Config:
    """Read TOML text; `name` is for messages. Raises ConfigError."""
    try:
        return Config.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {error}", _EXAMPLE) from None
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(text, name, detail) for detail in error.errors()), _EXAMPLE) from None


def _explain(text: str, name: str, detail: ErrorDetails) -> str:
    location = list(detail["loc"])
    key = ".".join(str(part) for part in location)
    line = _line_of(text, location)
    if detail["type"] == "extra_forbidden":
        return f"{name}:{line}: unknown key {key}; {_allowed(location)}"
    return f"{name}:{line}: {key} = {detail['input']!r}: {detail['msg']}"


def _allowed(location: list[int | str]) -> str:
    model: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation if isinstance(part, str) else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
        elif part == "vm":
            model = StaticVm
    names = sorted(model.model_fields)
    close = difflib.get_close_matches(str(location[-1]), names, 1)
    return (f"did you mean {close[0]}? " if close else "") + f"allowed: {', '.join(names)}"


def _line_of(text: str, location: list[int | str]) -> int:
    """Line of the key, found by its table's header; of the table if the key is not there."""
    table, index, keys = str(location[0]), 0, [str(part) for part in location[1:] if isinstance(part, str)]
    if len(location) > 1 and isinstance(location[1], int):
        index = location[1]
    current, seen, best = "", -1, 1
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[{1,2}\s*([\w.-]+)\s*\]{1,2}", line)
        if header:
            current = header[1]
            seen += current == table
        if current == table and seen == index:
            best = number if header else best
            if keys and re.match(rf"\s*{re.escape(keys[0])}\s*=", line):
                return number
        elif not current and re.match(rf"\s*{re.escape(table)}\s*=", line):
            return number
    return best


def document() -> str:
    """A configuration file with every key, its meaning and its default."""
    return "\n".join(_document_lines()) + "\n"


def documented() -> Iterator[tuple[str, type[BaseModel]]]:
    """Each table of the file: its header, and the model of its keys."""
    for name, section in Config.model_fields.items():
        if name == "vm":
            yield "[[vm]]", StaticVm
        elif isinstance(section.annotation, type):
            yield f"[{name}]", section.annotation


def _document_lines() -> Iterator[str]:
    for header, model in documented():
        yield from _section_lines(header, model, comment=model is StaticVm)


def _section_lines(header: str, model: type[BaseModel], *, comment: bool) -> Iterator[str]:
    yield f"# {model.__doc__}"
    yield f"# {header}" if comment else header
    for name, field in model.model_fields.items():
        yield f"# {field.description}"
        default = field.get_default(call_default_factory=True)
        required = field.is_required() or default is None
        yield f"# {name} = ..." if required or comment else f"{name} = {as_toml(default)}"
    yield ""


def as_toml(value: Any) -> str:
    """A value as the file has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {as_toml(item)}" for key, item in value.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else str(value)
