# SPDX-License-Identifier: Apache-2.0
"""The page of `./run bench all`: one HTML file that needs nothing else. Plots are inside it, and a policy forbids the browser to
fetch anything."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from tests.performance.schema import Bar, Part, Suite

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } .holds { color: #176f2c; } .short { color: #a40000; font-weight: bold; }
.cannot { color: #555; border-left: 3px solid #c90; padding-left: .8em; } code { background: #f3f3f3; padding: 0 .2em; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

REFERENCES = {
    "handoff": (("a handoff out and home, Jeong 2015", "1.9 ms"), ("Prism, NSDI 2021", "232 us")),
    "files": (("pays off from, Jeong 2015", "64 KB"), ("bandwidth at 3 MB, of the VM's, Jeong 2015", "1.71")),
    "dash": (("6 Mbit/s ladder, of the VM's time, Jeong 2015", "0.70"), ("of bare metal's time, Jeong 2015", "1.028")),
    "fanout": (
        ("processor, 1 to 2,000 UDP, of the daemon's, Hung 2010", "0.44"),
        ("processor, 1 to 1,800 TCP, of the daemon's, Hung 2010", "0.48"),
    ),
    "payload": (
        ("processor with shared payload, of copying, UDP and TCP, Hung 2010", "0.74 and 0.76"),
        ("sharing pays from, UDP and TCP, Hung 2010", "200 and 100 bytes"),
    ),
    "migrate": (("bandwidth meanwhile, Jeong 2015", "28 % less"), ("duration, Jeong 2015", "13 s")),
    "peers": (("a core carries, SRS; nginx-rtmp; ZLMediaKit", "2.5; 1.6; up to 8 Gbit/s"),),
}
"""Where the text of a paper, or of a project, gives a number: on other machines, so for the order of magnitude."""


def render(suite: Suite) -> str:
    """The whole page."""
    return "\n".join(_lines(suite)) + "\n"


def _lines(suite: Suite) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield f'<title>Streamlift: benchmarks</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>'
    yield "<h1>Streamlift: benchmarks</h1>"
    yield from _about(suite)
    for part in suite.parts:
        yield from _part(part)
    yield "</body>\n</html>"


def _about(suite: Suite) -> Iterator[str]:
    machine = suite.machine
    length = "quick: it shows that everything runs, and proves little" if suite.quick else "full"
    yield f"<p>{escape(suite.begun)}, {suite.seconds / 60:.1f} minutes, {length}. {machine.processors} processors"
    yield f" ({escape(machine.processor)}), {machine.memory_bytes / 2**30:.0f} GiB."
    yield f" The command: <code>{escape(' '.join(suite.command))}</code>.</p>"
    bars = [bar for part in suite.parts if part.report for bar in part.report.bars]
    missing = [part.name for part in suite.parts if part.outcome != "measured"]
    yield f"<p>{sum(bar.holds for bar in bars)} of {len(bars)} bars hold."
    yield f" Not measured: {escape(', '.join(missing))}.</p>" if missing else "</p>"
    yield "<details><summary>Versions and seeds</summary><table>"
    for name, version in (*suite.versions.items(), *suite.seeds.items()):
        yield f"<tr><td>{escape(name)}</td><td>{escape(str(version))}</td></tr>"
    yield "</table></details>"


def _part(part: Part) -> Iterator[str]:
    yield f'<h2 id="{escape(part.name)}">{escape(part.name)}</h2>\n<p>{escape(part.shows)}</p>'
    if part.report is None:
        yield f'<p class="short">{escape(part.outcome)} after {part.seconds:.0f} s</p><pre>{escape(part.words)}</pre>'
        return
    yield f'<img alt="{escape(part.shows)}" src="data:image/png;base64,{part.plot}">'
    yield f'<p class="cannot">What it cannot show: {escape(part.report.caveat)}</p>'
    yield "<table><tr><th>bar</th><th>measured</th><th>limit</th><th></th></tr>"
    yield from map(_bar, part.report.bars)
    yield "</table>"
    if part.name in REFERENCES:
        yield "<table><tr><th>for comparison, elsewhere</th><th></th></tr>"
        for what, number in REFERENCES[part.name]:
            yield f'<tr><td>{escape(what)}</td><td class="number">{escape(number)}</td></tr>'
        yield "</table>"
    yield f"<p><code>{escape(' '.join(part.command))}</code>, {part.seconds:.0f} s</p>"


def _bar(bar: Bar) -> str:
    value = "not measured" if bar.value is None else f"{bar.value:,.3f} {bar.unit}"
    verdict = '<td class="holds">holds</td>' if bar.holds else '<td class="short">falls short</td>'
    limit = f"{bar.sense} {bar.limit:g}"
    return f'<tr><td>{escape(bar.name)}</td><td class="number">{escape(value)}</td><td>{escape(limit)}</td>{verdict}</tr>'
