# SPDX-License-Identifier: Apache-2.0
"""The header is the contract: the one Python file that knows its numbers agrees, as the compiler sees them. Pure but for gcc."""

from __future__ import annotations

import re
import struct
from dataclasses import fields
from pathlib import Path

from guest_agent.handoff import socket_offload
from guest_agent.handoff.snapshot import MAX_QUEUE, MAX_SEGMENTS, Options
from guest_agent.handoff.warm import PRIVATE_SIZE, Warm
from tests.host_module.header import compiled

HEADER = Path(__file__).resolve().parents[3] / "host_module" / "socket_offload" / "uapi" / "socket_offload.h"
TEXT = HEADER.read_text(encoding="utf-8")
NUMBERS = {"HANDSHAKE", "FREEZE_EXPORT", "IMPORT", "THAW", "ABORT", "OWN", "BIND", "OPTIONS", "VERSION", "WSCALE", "SACK"}
NUMBERS |= {"TIMESTAMPS", "USEC_TS", "MAPPED", "FIN_UNSENT", "FIN_READ", "WARM", "NODELAY", "CORK", "KEEPALIVE", "ECN"}
STRUCTS = {name: f"_{name.upper()}" for name in ("handshake", "export", "import", "thaw", "warm", "segment")}


def test_numbers(tmp_path: Path) -> None:
    names = sorted(NUMBERS)
    for name, value in zip(names, compiled(HEADER, tmp_path, [f"SKOFF_{name}" for name in names]), strict=True):
        assert getattr(socket_offload, name) == value, name


def test_sizes_and_offsets(tmp_path: Path) -> None:
    sizes = compiled(HEADER, tmp_path, [f"sizeof(struct skoff_{name})" for name in STRUCTS])
    ours = [getattr(socket_offload, python).size for python in STRUCTS.values()]
    assert sizes == ours
    fixed, whole = compiled(HEADER, tmp_path, ["offsetof(struct skoff_snapshot, warm)", "sizeof(struct skoff_snapshot)"])
    layout: struct.Struct = socket_offload._SNAPSHOT
    assert (fixed, whole) == (layout.size, layout.size + socket_offload._WARM.size)
    reasons = ["offsetof(struct skoff_export, reason)", "offsetof(struct skoff_import, reason)"]
    assert compiled(HEADER, tmp_path, reasons) == [28, 28]


def test_the_numbers_of_the_calls_keep_the_sizes_of_version_1(tmp_path: Path) -> None:
    """A structure may grow; who knows only its beginning still calls the same number."""
    sizes = compiled(HEADER, tmp_path, [f"SKOFF_{name}_SIZE" for name in ("HANDSHAKE", "EXPORT", "IMPORT", "THAW")])
    assert sizes == [24, 32, 56, 16]


def test_the_place_of_ktls(tmp_path: Path) -> None:
    """At the end of the fixed part, before the warm state; zero is nothing, and nobody says yet that he can move another kind."""
    places = ["offsetof(struct skoff_snapshot, upper_layer)", "offsetof(struct skoff_snapshot, upper_length)", "SKOFF_UPPER_TLS"]
    end = socket_offload._SNAPSHOT.size
    assert compiled(HEADER, tmp_path, places) == [end - 8, end - 4, 1]
    assert (compiled(HEADER, tmp_path, ["SKOFF_UPPER_NONE"])[0], 0) == socket_offload.NO_UPPER_LAYER


def test_limits(tmp_path: Path) -> None:
    limits = ["SKOFF_MAX_QUEUE", "SKOFF_MAX_SEGMENTS", "SKOFF_CA_PRIVATE"]
    assert compiled(HEADER, tmp_path, limits) == [MAX_QUEUE, MAX_SEGMENTS, PRIVATE_SIZE]


def test_the_warm_state_has_the_fields_of_the_header_in_its_order() -> None:
    body = TEXT.split("struct skoff_warm {")[1].split("};")[0]
    names = re.findall(r"__u(?:8|32|64) (\w+)", body)
    assert names == list(Warm._fields[Warm._fields.index("snd_cwnd") :])


def test_the_options_are_in_the_order_of_the_header() -> None:
    """They are packed and unpacked by position."""
    body = TEXT.split("/* Socket options, as setsockopt(2) takes them. */")[1].split("char congestion")[0]
    names = re.findall(r"__u32 (\w+);", body)
    assert names == [field.name for field in fields(Options)][3:-1]


def test_every_reason_is_known_and_explained() -> None:
    reasons = {name: int(value) for name, value in re.findall(r"#define SKOFF_REASON_(\w+)\s+(\d+)", TEXT)}
    assert reasons.pop("NONE") == 0
    assert set(socket_offload._REASONS) == set(reasons.values())


def test_no_flag_is_unknown_to_either_side(tmp_path: Path) -> None:
    flags = [name for name in NUMBERS if name in re.findall(r"#define SKOFF_(\w+)\s+\(1 << \d+\)", TEXT)]
    known = compiled(HEADER, tmp_path, ["SKOFF_KNOWN_FLAGS"])[0]
    snapshot_flags = [name for name in flags if name not in ("OWN", "BIND", "OPTIONS")]
    assert sum(getattr(socket_offload, name) for name in snapshot_flags) == known
