# SPDX-License-Identifier: Apache-2.0
"""`./run bench all`: the file's form, what is measured anew and what is not, the time, and the page as a browser sees it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.performance import bench, page, suite
from tests.performance.browser import visit
from tests.performance.schema import Bar, Machine, Measured, Part, Suite
from tests.performance.suite import Benchmark

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def measured(name: str = "files", value: float | None = 2.0, **more: Any) -> Part:
    bar = Bar(name="gain", value=value, unit="times", limit=1, sense=">=", holds=value is not None and value >= 1)
    facts: dict[str, Any] = {"machine": Machine(**bench.machine()), "versions": bench.versions(), "caveat": "<b>TCG & loopback</b>"}
    report = Measured(benchmark=name, bars=[bar], rows=[{"x": 1}], **facts)
    command = ["python", "-m", f"tests.performance.{name}"]
    given = {"command": command, "seconds": 1, "budget_seconds": 9, "shows": "what <it> shows"}
    return Part(**{"name": name, "outcome": "measured", "report": report, "plot": PIXEL, **given, **more})


def unmeasured(name: str = "files", outcome: str = "failed", words: str = "") -> Part:
    return Part(**{**measured(name).model_dump(), "outcome": outcome, "report": None, "plot": None, "words": words})


def whole(*parts: Part) -> Suite:
    facts: dict[str, Any] = {"quick": True, "seconds": 9, "command": ["./run", "bench", "all"]}
    facts |= {"machine": Machine(**bench.machine()), "versions": suite.versions(), "seeds": {"PYTHONHASHSEED": 1}}
    return Suite(begun="2026-11-27T18:00:00+00:00", parts=list(parts), **facts)


def test_every_benchmark_is_found_and_the_time_is_shared() -> None:
    found = suite.discover(300)
    assert {"handoff", "files", "dash", "warm", "moves", "fanout", "payload", "overload", "peers"} <= {b.name for b in found}
    assert not {"bench", "suite", "fetch", "page"} & {b.name for b in found}
    assert sum(benchmark.budget for benchmark in found) == pytest.approx(300)
    assert all(benchmark.shows.endswith((".", "?", ":")) or benchmark.shows for benchmark in found)
    (only,) = suite.discover(300, ["files"])
    assert only.budget == 300
    with pytest.raises(ValueError, match="no benchmark nothing; there are: "):
        suite.discover(300, ["nothing"])


def test_no_part_takes_the_others_their_time() -> None:
    one, others = Benchmark("one", "it", 10), [Benchmark("other", "it", 20), Benchmark("third", "it", 20)]
    assert suite.allowed(one, others, 50) == 30  # half of theirs is spare
    assert suite.allowed(one, others, 25) == 10
    assert suite.allowed(one, others, 4) == 4
    assert suite.allowed(one, [], -1) == 0.1


def test_the_shell_lists_the_same(tmp_path: Path) -> None:
    listed = "grep -l 'bench\\.arguments' tests/performance/*.py | sed 's|.*/||; s|\\.py$||'"
    words = subprocess.run(["sh", "-c", listed], cwd=bench.ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert words == [benchmark.name for benchmark in suite.discover(300)]


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"surprise": 1},
        {"parts": [{**measured().model_dump(), "report": None}]},
        {"parts": [{**measured().model_dump(), "outcome": "failed"}]},
        {"machine": {"processor": "x", "processors": 0, "memory_bytes": 1}},
    ],
)
def test_the_form_is_checked(change: dict[str, Any]) -> None:
    good = whole(measured()).model_dump()
    assert Suite.model_validate_json(json.dumps(good)).parts[0].report is not None
    with pytest.raises(ValidationError):
        Suite.model_validate({**good, **change})


def test_a_verdict_must_follow_from_its_numbers() -> None:
    for value in (0.5, None):
        with pytest.raises(ValidationError, match="is False"):
            Bar(name="gain", value=value, unit="", limit=1, sense=">=", holds=True)


def test_a_finished_part_is_used_again_only_if_it_is_worth_as_much(tmp_path: Path) -> None:
    path, benchmark = tmp_path / "files.part.json", Benchmark("files", "it", 9)
    assert suite.resumed(path, benchmark, quick=False) is None
    path.write_text(measured().model_dump_json())
    assert suite.resumed(path, benchmark, quick=False) is not None
    assert suite.resumed(path, benchmark, quick=True) is None
    older = measured()
    assert older.report is not None
    older.report.versions["streamlift"] = "0" * 40
    for other in (older.model_dump_json(), unmeasured().model_dump_json(), "{"):
        path.write_text(other)
        assert suite.resumed(path, benchmark, quick=False) is None


def test_a_part_whose_time_is_over_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the shell started ignores SIGINT and outlives it."""
    monkeypatch.setattr(suite, "GRACE", 0.5)
    script = f"trap '' INT; sleep 1000 & echo $! > {tmp_path}/pid; wait"
    with (tmp_path / "log").open("wb") as log:
        assert suite._run(["sh", "-c", script], log, 0.5) is None
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/cmdline").exists() and b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_could_not_be_computed_is_null() -> None:
    found = suite._without_nan({"a": [float("nan"), 1.0, {"b": float("inf")}]})
    assert found == {"a": [None, 1.0, {"b": None}]}
    assert "not measured" in page.render(whole(measured(value=None)))


@pytest.mark.root
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """No error, no request, every picture drawn; a page that does fetch something is noticed by the same eyes."""
    failed = unmeasured("peers", "out of time", "</pre><script>1")
    good, bad = tmp_path / "good.html", tmp_path / "bad.html"
    good.write_text(page.render(whole(measured(), measured("dash", 0.5), failed)))
    seen = visit(good)
    assert (seen.errors, seen.network_requests, seen.pictures) == ([], [], [True, True])
    assert seen.title == "Streamlift: benchmarks"
    text = page.render(whole(measured())).replace(page.POLICY, "default-src * data: 'unsafe-inline'")
    bad.write_text(text.replace("</body>", "<script src='http://127.0.0.1:9/x.js'></script><img src='missing.png'></body>"))
    seen = visit(bad)
    assert seen.network_requests == ["http://127.0.0.1:9/x.js"]
    assert seen.errors and seen.pictures == [True, False]


@pytest.mark.root
def test_one_part_measured_then_resumed(tmp_path: Path) -> None:
    """The real thing, with the cheapest part; the second run measures nothing."""
    argv = [sys.executable, "-m", "tests.performance.suite", "--out", str(tmp_path), "--quick", "--only", "handoff"]
    reports = []
    for _ in range(2):
        done = subprocess.run(argv, cwd=bench.ROOT, capture_output=True, text=True, check=False)
        assert done.returncode in (0, bench.FALLS_SHORT), done.stderr
        reports.append(Suite.model_validate_json((tmp_path / "report.json").read_bytes()))
    assert reports[0].parts == reports[1].parts and reports[1].seconds < reports[0].parts[0].seconds
    seen = visit(tmp_path / "report.html")
    assert (seen.errors, seen.network_requests, seen.pictures) == ([], [], [True])


@pytest.mark.long
@pytest.mark.vm
@pytest.mark.timeout(900)
def test_all_of_it_quickly(tmp_path: Path) -> None:
    """As its users type it."""
    argv = ["./run", "bench", "all", "--out", str(tmp_path), "--quick"]
    done = subprocess.run(argv, cwd=bench.ROOT, capture_output=True, text=True, check=False)
    found = Suite.model_validate_json((tmp_path / "report.json").read_bytes())
    assert [part.name for part in found.parts if part.outcome != "measured"] == [], done.stderr
    assert {part.name for part in found.parts} == {benchmark.name for benchmark in suite.discover(300)}
    seen = visit(tmp_path / "report.html")
    assert (seen.errors, seen.network_requests) == ([], []) and all(seen.pictures)
