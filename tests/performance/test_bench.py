# SPDX-License-Identifier: Apache-2.0
"""The verdicts, on measurements that were made up; and one benchmark with a VM, as its users run it."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.performance import (
    bench,
    dash,
    dash_client,
    fanout,
    files,
    handoff,
    migrate,
    moves,
    overload,
    payload,
    peers,
    rtp,
    warm,
)
from tests.performance.bench import Bar, Report
from tests.vm.setups import NAMES


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (50, 5), (90, 9), (91, 10), (99, 10), (100, 10)]
)
def test_percentile_is_the_nearest_rank(percent: float, expected: float) -> None:
    assert bench.percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], percent) == expected


def test_percentile_of_nothing() -> None:
    assert math.isnan(bench.percentile([], 50))


def test_median_and_spread() -> None:
    assert bench.median_and_spread([1, 2, 3, 4]) == (2.5, 2)


@pytest.mark.parametrize(
    ("value", "sense", "holds"),
    [(1, "<=", True), (2, "<=", False), (2, ">=", True), (0.9, ">=", False), (math.nan, "<=", False), (math.nan, ">=", False)],
)
def test_a_bar_holds(value: float, sense: bench.Sense, holds: bool) -> None:
    assert Bar("x", value, "us", 1, sense).holds is holds


def test_the_exit_status_tells_whether_all_bars_hold() -> None:
    report = Report("x", "none", bars=[Bar("good", 1, "us", 2, "<=")])
    assert report.exit_status == 0
    report.bars.append(Bar("bad", 3, "us", 2, "<="))
    assert report.exit_status == 3


def test_the_report_has_the_schema() -> None:
    report = Report("x", "none", rows=[{"a": 1}], bars=[Bar("good", 1, "us", 2, "<=")], details={"steps": {}})
    data = json.loads(json.dumps(report.as_json()))
    assert {"benchmark", "machine", "versions", "rows", "bars", "caveat"} <= set(data)
    assert data["bars"] == [{"name": "good", "value": 1, "unit": "us", "limit": 2, "sense": "<=", "holds": True}]
    assert data["rows"] == [{"a": 1}]


def _row(phase: str, size: int, side: str, **values: Any) -> dict[str, Any]:
    return {"phase": phase, "size": size, "side": side, **values}


def _rows(*, added: float, rate: float) -> list[dict[str, Any]]:
    waits = {"longest_waits_us": [10.0, 20_000.0]}
    rows = [
        _row("latency", handoff.LATENCY_SIZE, "offload", latencies_us=[100.0 + added, 300.0 + added], **waits),
        _row("latency", handoff.LATENCY_SIZE, "baseline", latencies_us=[100.0, 300.0], longest_waits_us=[1e9, 1e9]),
    ]
    for phase in ("unlimited", handoff.LINK):
        for size in handoff.RATIO_LIMITS:
            rows.append(_row(phase, size, "offload", bytes=size, seconds=size / rate))
            rows.append(_row(phase, size, "baseline", bytes=size, seconds=size / 100))
    return rows


ALL_OFFLOADED = {"offloaded": 10, "local": {}, "failed": 0}


def test_handoff_holds() -> None:
    bars = handoff.judge(_rows(added=600, rate=99), ALL_OFFLOADED)
    assert [bar.value for bar in bars[:3]] == [600, 600, 20]
    assert [bar.value for bar in bars[3:6]] == pytest.approx([0.99] * 3)
    assert all(bar.holds for bar in bars)


def test_handoff_falls_short() -> None:
    bars = handoff.judge(_rows(added=4000, rate=70), {"offloaded": 5, "local": {"busy": 5}, "failed": 0})
    assert [bar.holds for bar in bars] == [False, False, True, False, False, False, False]


def _sweep(**milliseconds: list[float]) -> list[dict[str, Any]]:
    """One request for each of the sizes 1000, 2000, ... and set-up."""
    return [
        {"size": 1000 * (step + 1), "side": setup, "latencies_us": [time * 1e3]}
        for setup, times in milliseconds.items()
        for step, time in enumerate(times)
    ]


@pytest.mark.parametrize(
    ("offload", "expected"),
    [([9, 9, 9, 9], None), ([9, 9, 1, 1], 3000), ([1, 9, 1, 1], 3000), ([1, 1, 1, 1], 1000), ([1, 1, 1, 9], None)],
)
def test_where_it_begins_to_pay(offload: list[float], expected: int | None) -> None:
    assert files.crossover(_sweep(vm=[2, 2, 2, 2], offload=offload)) == expected


def test_files_verdict(tmp_path: Path) -> None:
    rows = _sweep(vm=[2, 4], offload=[4, 2], metal=[1, 1])
    bars = files.judge(rows, ALL_OFFLOADED)
    assert [(bar.value, bar.holds) for bar in bars] == [(2, True), (1, True)]
    bars = files.judge(_sweep(vm=[2, 2], offload=[4, 4]), {"offloaded": 1, "local": {"host_away": 1}, "failed": 0})
    assert [(bar.value, bar.holds) for bar in bars] == [(0.5, False), (0.5, False)]
    files.plot(rows, files.crossover(rows), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("seconds", "holds"), [(1.02, True), (1.04, False)])
def test_warm_verdict(seconds: float, holds: bool, tmp_path: Path) -> None:
    times = {"not offloaded": 1.0, "socket_offload": seconds, "tcp_repair": 2.0}
    rows = [
        {"congestion": congestion, "side": side, "loss": loss, "seconds": times[side], "windows": [(0.1, 10), (0.2, 20)]}
        for congestion in warm.CONGESTIONS
        for side in warm.SIDES
        for loss in warm.LOSSES
    ]
    plan = replace(warm.FULL, segments=10, repeats=1)
    counters = {loss: {side: {"offloaded": 30} for side in warm.SIDES} for loss in ("0 %", "0.5 %")}
    bars = warm.judge(rows, counters, plan)
    assert [bar.holds for bar in bars] == [holds] * 6 + [True] * 2
    warm.plot(Report("warm", "none", rows=rows), tmp_path / "plot.png", plan)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_window_is_read_from_the_kernels_table() -> None:
    """Of a connection to that port, over either family; not of who listens or waits for the network to forget it."""
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        with socket.create_connection(server.getsockname()[:2]) as client, server.accept()[0]:
            table, port = Path("/proc/self/net/tcp6").read_text(), client.getsockname()[1]
            assert warm.window_in(table, port) == 10, "as a connection begins (RFC 6928)"
            assert warm.window_in(table, 1) is None
    assert warm.window_in(Path("/proc/self/net/tcp6").read_text(), port) is None


def test_moves_verdict(tmp_path: Path) -> None:
    rows = [dict.fromkeys(moves.STEPS, cost) | {"backend": name} for name, cost in zip(moves.BACKENDS, (1000, 400), strict=True)]
    assert [(bar.value, bar.holds) for bar in moves.judge(rows)] == [(0.4, True)] * 3
    moves.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.vm
def test_the_sweep_runs(tmp_path: Path) -> None:
    """From which size on it pays is not judged here: other tests may be running."""
    report, plot = tmp_path / "files.json", tmp_path / "files.png"
    argv = [sys.executable, "-m", "tests.performance.files", "--quick", "--json", str(report), "--plot", str(plot)]
    done = subprocess.run(argv, cwd=bench.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, bench.FALLS_SHORT), done.stderr
    data = json.loads(report.read_text())
    assert {(row["size"], row["side"]) for row in data["rows"]} == {(size, name) for size in files.QUICK.sizes for name in NAMES}
    assert [bar["holds"] for bar in data["bars"] if bar["name"].startswith("bodies")] == [True]
    assert "crossover_bytes" in data
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    report = Report("handoff", "none", rows=_rows(added=1, rate=99))
    handoff.plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def _relayed(side: str, protocol: str, share: float, **more: Any) -> dict[str, Any]:
    row = {"side": side, "protocol": protocol, "sinks": 2000, "seconds": 2, "processor_seconds": 2 * share, "pieces": 1}
    return {**row, "expected": 10, "delivered": 10, "memory_per_sink": 500, **more}


def _fanned_out(cheap: float, *, copied: float = 100) -> list[dict[str, Any]]:
    rows = [_relayed("daemon", protocol, 0.2) for protocol in ("udp", "tcp")]
    for protocol in ("udp", "tcp"):
        rows += [_relayed(f"user, {budget} ms", protocol, cheap if budget else 0.2) for budget in fanout.BUDGETS]
    return rows + [{"side": "C loop", "sinks": 9, "delivered": 100}, {"side": "user", "sinks": 9, "delivered": copied}]


@pytest.mark.parametrize(("cheap", "copied", "short"), [(0.069, 80, 0), (0.071, 80, 2), (0.069, 79, 1)])
def test_fanout_is_compared_with_the_daemon(cheap: float, copied: float, short: int) -> None:
    bars = fanout.verdicts(_fanned_out(cheap, copied=copied), fanout.FULL)
    assert sum(not bar.holds for bar in bars) == short


@pytest.mark.parametrize(
    ("low", "high", "holds"), [([0, 0.5, 1], [0, 0, 0.4], True), ([0, 0.5, 1], [0, 0.02, 0.4], False), ([0, 0.1], [0, 0], False)]
)
def test_the_high_class_loses_last(low: list[float], high: list[float], holds: bool) -> None:
    classes = (("low", low), ("high", high))
    rows = [{"engine": one, "class": name, "loss": loss} for one in overload.ENGINES for name, losses in classes for loss in losses]
    assert all(bar.holds for bar in overload.verdicts(rows)) is holds


def test_where_sharing_begins_to_pay() -> None:
    plan = payload.Plan((64, 256, 1400))
    costs = {"OMSS-M": (10, 20, 40), "OMSS": (15, 19, 21), "daemon": (0, 0, 40)}
    rows = [
        {"side": side, "protocol": protocol, "size": size, "instructions": cost}
        for side, several in costs.items()
        for protocol in ("udp", "tcp")
        for size, cost in zip(plan.sizes, several, strict=True)
    ]
    assert payload.switching_point(rows, "tcp", plan) == 256
    assert all(bar.holds for bar in payload.verdicts(rows))
    next(row for row in rows if row["side"] == "OMSS" and row["size"] == 1400)["instructions"] = 41
    assert sum(not bar.holds for bar in payload.verdicts(rows)) == 2
    assert payload.switching_point(rows, "udp", plan) is None


def test_a_peer_is_compared_by_what_was_delivered() -> None:
    rows = [{"side": side, "processor_seconds": 1, "delivered": 1 << 30} for side in peers.SIDES]
    assert not peers.verdicts(rows)[0].holds
    rows[0]["processor_seconds"] = 2
    assert peers.verdicts(rows)[0].holds


@pytest.mark.parametrize("value", [7, "word", b"raw", {"b": 1, "a": {"c": "x"}}])
def test_bencode_is_undone(value: rtp.Value) -> None:
    raw = rtp.encode(value)
    found, end = rtp.decode(raw)
    assert end == len(raw)
    assert rtp.encode(found) == raw
    assert rtp.decode(b"d1:al1:x2:yyee")[0] == {"a": [b"x", b"yy"]}


def test_rtp_verdict(tmp_path: Path) -> None:
    facts = {"delivered": 1 << 30, "expected": 1 << 30, "memory_per_sink": 9, "longest_gap_ms": 50}
    costs = dict.fromkeys(rtp.SIDES, 2) | {"rtpengine": 4}
    rows: list[dict[str, Any]] = [{"side": side, "processor_seconds": cost, **facts} for side, cost in costs.items()]
    assert [(bar.value, bar.holds) for bar in rtp.verdicts(rows)] == [(2, True), (1, True)]
    rows[0]["delivered"] -= 1
    assert [bar.holds for bar in rtp.verdicts(rows)] == [True, False]
    peers.plot(Report("rtp", "none", rows=rows), tmp_path / "plot.png", rtp.SIDES)
    assert peers.table(rows, rtp.SIDES).row_count == len(rtp.SIDES)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def _films(**factors: float) -> list[dict[str, Any]]:
    """Each side needs so many seconds for each ladder."""
    sides = {**dict.fromkeys(dash.SIDES, 1.0), "vm": 2.0, "namespace": 1.01, **factors}
    return [
        {"ladder": ladder.name, "side": side, "clients": clients, "repeat": 0, "seconds": seconds}
        for clients in (1, 50)
        for ladder in dash.LADDERS
        for side, seconds in sides.items()
    ]


@pytest.mark.parametrize(("offload", "short"), [(1.02, 0), (1.05, 4), (1.2, 8)])
def test_dash_verdict(offload: float, short: int, tmp_path: Path) -> None:
    rows = _films(offload=offload)
    bars = dash.judge(rows, {"offloaded": 99, "failed": 0, "local": {"too_small": 500, "table_full": 1}}, "tcg")
    assert sum(not bar.holds for bar in bars) == short
    assert bars[-1].value == 0.99 and len(bars) == 13
    assert ["emulated" in bar.name for bar in bars[:3]] == [True, True, False]
    dash.plot(rows, "tcg", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_dash_client_reads_what_we_and_ffmpeg_write() -> None:
    ladder = dash.LADDERS[0]
    film = dash_client.parse(dash.manifest(ladder).encode())
    assert len(film.segments) == ladder.segments
    assert (film.segments[0], film.segments[-1]) == ("segment-001.m4s", "segment-040.m4s")
    template = '<SegmentTemplate timescale="12800" duration="192000" startNumber="5" media="s-$Number$.m4s"/>'
    text = f'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" mediaPresentationDuration="PT1M0.1S"><Period>{template}</Period></MPD>'
    assert dash_client.parse(text.encode()).segments == ("s-5.m4s", "s-6.m4s", "s-7.m4s", "s-8.m4s", "s-9.m4s")
    with pytest.raises(ValueError, match="not a static manifest"):
        dash_client.parse(b"<MPD/>")


def test_silences_that_were_over_before_a_migration_are_not_its_own() -> None:
    seen = [(1.0, 0.9), (2.0, 0.3), (3.0, 0.2)]
    assert migrate.longest(seen, since=2.1) == 0.3
    assert migrate.longest(seen, since=2.5) == 0.2
    assert migrate.longest([], since=0.0) == 0.0


def _migration(side: str, silence: float, drain: float, faults: int) -> dict[str, Any]:
    rates = {"before": 100.0, "during": 72.0, "after": 100.0}
    told = {"leave": {"drain_ms": drain, "share_ms": 50}, "total_ms": 3000}
    seen = {"silences_ms": [silence, 10.0], "faults": ["reset"] * faults, "timeline": [(-1.0, 100.0), (0.0, 72.0)]}
    return {"side": side, "repeat": 0, "seconds": 3.5, "mbit_per_second": rates, **told, **seen}


@pytest.mark.parametrize(
    ("silence", "drain", "faults", "short"), [(600, 300, 0, 0), (612, 300, 0, 1), (600, 301, 0, 1), (600, 300, 1, 1)]
)
def test_a_migration_is_compared_with_the_one_beside_it(
    silence: float, drain: float, faults: int, short: int, tmp_path: Path
) -> None:
    rows = [_migration("offload", silence, drain, faults), _migration("alone", 300, 400, 0)]
    rows += [_migration("offload", 100, 100, 0), _migration("alone", 1000, 0, 5)]
    assert sum(not bar.holds for bar in migrate.judge(rows)) == short
    assert migrate.loss(rows, "offload") == pytest.approx(28)
    assert migrate.tables(rows)[0].row_count == 2
    migrate.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.root
@pytest.mark.parametrize("name", ["fanout", pytest.param("overload", marks=pytest.mark.long)])
def test_relays_are_measured(name: str, tmp_path: Path) -> None:
    """Not how well: other tests may be running."""
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    argv = [sys.executable, "-m", f"tests.performance.{name}", "--quick", "--json", str(report), "--plot", str(plot)]
    done = subprocess.run(argv, cwd=bench.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, bench.FALLS_SHORT), done.stderr
    data = json.loads(report.read_text())
    if name == "fanout":
        assert {row["side"] for row in data["rows"]} == {*fanout.SIDES, *fanout.FLOODS}
        assert [bar["holds"] for bar in data["bars"] if bar["name"].startswith("bytes delivered")] == [True]
    else:
        assert [row["class"] for row in data["rows"]] == list(overload.CLASSES) * 4
    assert plot.read_bytes().startswith(b"\x89PNG")
