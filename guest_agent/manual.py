# SPDX-License-Identifier: Apache-2.0
"""streamlift-agent(1), made from the same parser as `--help`: man(7) source."""

from __future__ import annotations

import argparse
import os
import textwrap
import time
from collections.abc import Iterator

from guest_agent import __version__


def page(parser: argparse.ArgumentParser, *, description: str, examples: str) -> str:
    """The whole page. `examples`: lines as they are typed, some of them comments."""
    return "\n".join(_lines(parser, description, examples)) + "\n"


def _lines(parser: argparse.ArgumentParser, description: str, examples: str) -> Iterator[str]:
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    yield f'.TH {parser.prog.upper()} 1 "{day}" "streamlift {__version__}" "Streamlift"'
    yield from (".SH NAME", f"{_plain(parser.prog)} \\-", *_text(parser.description or ""))
    yield from (".SH SYNOPSIS", f".B {_plain(parser.prog)}", "[\\fIOPTIONS\\fR] [\\fICOMMAND\\fR]")
    yield ".SH DESCRIPTION"
    for number, paragraph in enumerate(description.strip().split("\n\n")):
        yield from ([".PP"] if number else [])
        yield from _text(paragraph)
    yield ".SH OPTIONS"
    for action in parser._actions:
        yield from (".TP", _name(action), *_text(parser._get_formatter()._expand_help(action)))
    yield from (".SH EXAMPLES", ".nf", *map(_plain, examples.strip().splitlines()), ".fi")
    yield from (".SH SEE ALSO", ".BR streamlift (1)")


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"\\fI{_plain(action.dest.upper())}\\fR"
    names = ", ".join(f"\\fB{_plain(name)}\\fR" for name in action.option_strings)
    if action.nargs == 0:
        return names
    word = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    return f"{names} \\fI{_plain(str(word))}\\fR"


def _text(words: str) -> list[str]:
    """Running text in short lines, as man(7) wants its source."""
    return [_plain(line) for line in textwrap.wrap(words, 72, break_on_hyphens=False, break_long_words=False)]


def _plain(text: str) -> str:
    """What groff(7) prints as it is: no escapes, no control lines, hyphens that can be copied."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text
