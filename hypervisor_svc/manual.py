# SPDX-License-Identifier: Apache-2.0
"""`streamlift man`: the manual pages, made from what `--help` shows and from the configuration's model. man(7) source."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from typer.core import TyperGroup

from hypervisor_svc import __version__
from hypervisor_svc.config import DEFAULT_PATH, as_toml, documented
from vm_images.root import AGENT

SECTIONS = (
    (
        "DESCRIPTION",
        "A streaming server in a virtual machine hands the TCP connection of a client to this service when it has a file or a "
        "live stream to deliver; the service sends it from the page cache, or to thousands at once, and gives the connection "
        "back. The server calls one function for it, and the client notices nothing.",
    ),
)
FILES = {
    DEFAULT_PATH: "the configuration, see streamlift.toml(5); it may be missing",
    "/run/streamlift/control.sock": "where the commands ask the service; root's alone",
    "/var/lib/streamlift/machines": "what deploy made for each VM, its console's log among it",
    "/var/cache/streamlift": "guest images; STREAMLIFT_CACHE names another folder",
}
EXIT = {
    "0": "done",
    "1": "something is wrong: the first line says what, the second the next command to type",
    "2": "the command was typed wrong",
}


def write(app: Any, folder: Path) -> list[Path]:
    """streamlift.1, streamlift-agent.1 and streamlift.toml.5 below `folder`; what was written. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"streamlift.1": command_page(app), "streamlift-agent.1": _agent_page(), "streamlift.toml.5": config_page()}
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in pages]


def command_page(app: Any) -> str:
    """streamlift(1)."""
    root = typer.main.get_command(app)
    context = typer.Context(root, info_name="streamlift")
    return _joined(_command_lines(root, context))


def config_page() -> str:
    """streamlift.toml(5)."""
    return _joined(_config_lines())


def _agent_page() -> str:
    """The agent makes its own: the service imports nothing of it."""
    environment = {**os.environ, "PYTHONPATH": str(AGENT.parent)}
    argv = [sys.executable, "-m", "guest_agent", "man"]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout


def _command_lines(root: Any, context: typer.Context) -> Iterator[str]:
    yield from _head("STREAMLIFT", 1, "streamlift", "serves VMs' client connections from the hypervisor")
    yield from (".SH SYNOPSIS", ".B streamlift", "[\\fIOPTIONS\\fR] \\fICOMMAND\\fR [\\fIARGS\\fR]")
    for heading, words in SECTIONS:
        yield from (f".SH {heading}", *_text(words))
    yield from (".SH OPTIONS", *_parameters(root, context), ".SH COMMANDS")
    for command, inside in _commands(root, context):
        yield from _one_command(command, inside)
    yield from (".SH EXAMPLES", *_examples(root))
    yield from (".SH FILES", *_definitions(FILES), ".SH EXIT STATUS", *_definitions(EXIT))
    yield from (".SH SEE ALSO", ".BR streamlift.toml (5),", ".BR streamlift\\-agent (1),", ".BR virsh (1)")


def _commands(group: Any, context: typer.Context) -> Iterator[tuple[Any, typer.Context]]:
    """All that can be typed, groups resolved, in the order of `--help`."""
    for name, command in group.commands.items():
        inside = typer.Context(command, info_name=name, parent=context)
        if isinstance(command, TyperGroup):
            yield from _commands(command, inside)
        else:
            yield command, inside


def _one_command(command: Any, context: typer.Context) -> Iterator[str]:
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (f".SS {_plain(f'{context.command_path} {usage}')}", *_text(command.help or ""))
    yield from _parameters(command, context)
    yield from (".PP", "Examples:", ".PP", *_examples(command))


def _examples(command: Any) -> Iterator[str]:
    lines = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]
    yield from (".nf", *(f"    {_plain(line)}" for line in lines), ".fi")


def _parameters(command: Any, context: typer.Context) -> Iterator[str]:
    records = (parameter.get_help_record(context) for parameter in command.get_params(context))
    for names, words in (record for record in records if record):
        yield from (".TP", f"\\fB{_plain(names)}\\fR", *_text(words or names))


def _config_lines() -> Iterator[str]:
    yield from _head("STREAMLIFT.TOML", 5, "streamlift.toml", "the configuration of streamlift")
    words = f"The service reads {DEFAULT_PATH}, or the file that --config names. Every key has a default, so the file may be "
    yield from (".SH DESCRIPTION", *_text(words + "missing. An unknown key is refused with its line. The file is TOML."))
    yield ".SH KEYS"
    for header, model in documented():
        yield from (f".SS {_plain(header)}", *_text(model.__doc__ or ""))
        yield from _keys(model)
    yield from (".SH SEE ALSO", ".BR streamlift (1)")


def _keys(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        ending = "" if field.is_required() or default is None else f" Default: {as_toml(default)}."
        yield from (".TP", f"\\fB{_plain(name)}\\fR", *_text(f"{field.description}{ending}"))


def _head(title: str, section: int, name: str, purpose: str) -> Iterator[str]:
    """The day is today's, or SOURCE_DATE_EPOCH's where equal sources must give equal pages."""
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    yield f'.TH {title} {section} "{day}" "streamlift {__version__}" "Streamlift"'
    yield from (".SH NAME", f"{_plain(name)} \\-", *_text(purpose))


def _definitions(terms: dict[str, str]) -> Iterator[str]:
    for term, words in terms.items():
        yield from (".TP", f"\\fB{_plain(term)}\\fR", *_text(words))


def _joined(lines: Iterator[str]) -> str:
    return "\n".join(lines) + "\n"


def _text(words: str) -> list[str]:
    """Running text in short lines, as man(7) wants its source."""
    return [_plain(line) for line in textwrap.wrap(words, 72, break_on_hyphens=False, break_long_words=False)]


def _plain(text: str) -> str:
    """What groff(7) prints as it is: no escapes, no control lines, hyphens that can be copied."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text
