# SPDX-License-Identifier: Apache-2.0
"""The header is the contract: the one Python file that knows its numbers agrees, as the compiler sees them. Pure but for gcc."""

from __future__ import annotations

import re
import struct
from dataclasses import fields
from pathlib import Path

from hypervisor_svc import omss
from tests.host_module.header import compiled

HEADER = Path(__file__).resolve().parents[3] / "host_module" / "omss" / "uapi" / "omss.h"
TEXT = HEADER.read_text(encoding="utf-8")
NUMBERS = {"VERSION", "BASE", "SET_SOURCE", "ADD_SINK", "REMOVE_SINK", "END", "HELLO", "GET_STATUS", "ADOPT", "CLASSES", "MAX_RING"}
NUMBERS |= {"MAX_ENTRY", "MAX_LATENCY", "SHARED_DATAGRAMS", "DETACHED", "COPY", "ATTACH", "HALT", "ALL_NAMESPACES"}
NUMBERS |= {"SESSION", "SINK", "SINKS", "SESSIONS"}
STRUCTS = {
    "hello": omss._HELLO,
    "source": omss._SOURCE,
    "add_sink": omss._ADD_SINK,
    "remove_sink": omss._REMOVE_SINK,
    "end": omss._END,
    "adopt": omss._ADOPT,
    "request": omss._REQUEST,
    "counters": omss._COUNTERS,
    "session_status": omss._SESSION,
    "sink_status": omss._SINK,
}
ENUMS = {
    omss.Framing: ("RAW", "MPEGTS"),
    omss.Join: ("LATEST", "OLDEST", "NEXT_SYNC", "FROM"),
    omss.OnLag: ("HEAD_DROP", "DROP_TO_SYNC", "DISCONNECT"),
    omss.State: ("RUNNING", "DRAINING", "ENDED"),
}


def members(name: str) -> list[str]:
    """The fields of a structure, in its order."""
    body = TEXT.split(f"struct omss_{name} {{")[1].split("};")[0]
    return re.findall(r"(?:__u32|__s32|__aligned_u64|struct omss_\w+) (\w+)(?:\[\w+\])?;", body)


def test_numbers(tmp_path: Path) -> None:
    names = sorted(NUMBERS)
    for name, value in zip(names, compiled(HEADER, tmp_path, [f"OMSS_{name}" for name in names]), strict=True):
        assert getattr(omss, name) == value, name


def test_enumerations(tmp_path: Path) -> None:
    for kind, names in ENUMS.items():
        assert {one.name for one in kind} == set(names)
        assert [kind[name].value for name in names] == compiled(HEADER, tmp_path, [f"OMSS_{name}" for name in names])
    states = list(omss.SinkState)
    assert [state.value for state in states] == compiled(HEADER, tmp_path, [f"OMSS_SINK_{state.name}" for state in states])


def test_sizes(tmp_path: Path) -> None:
    sizes = compiled(HEADER, tmp_path, [f"sizeof(struct omss_{name})" for name in STRUCTS])
    assert sizes == [layout.size for layout in STRUCTS.values()]


def test_no_structure_has_a_hole(tmp_path: Path) -> None:
    """Python packs them without padding."""
    for name in STRUCTS:
        total = " + ".join(f"sizeof(((struct omss_{name} *)0)->{field})" for field in members(name))
        assert compiled(HEADER, tmp_path, [total, f"sizeof(struct omss_{name})"])[0] == STRUCTS[name].size, name


def test_what_python_reads_by_position_has_the_order_of_the_header() -> None:
    assert members("session_status") == [one.name for one in fields(omss.Status)]
    assert members("sink_status") == [one.name for one in fields(omss.SinkStatus)]
    assert members("counters") == [one.name for one in fields(omss.Counters)]
    assert members("source") == [one.name for one in fields(omss.Source)]


def test_hello_has_the_sizes_in_the_order_in_which_they_are_checked() -> None:
    names = members("hello")
    assert [name for name in names if name.endswith("_size")] == names[1:10]
    assert [names[0], *names[10:]] == [one.name for one in fields(omss.Hello)]


def test_every_reason_for_a_drop_has_a_name(tmp_path: Path) -> None:
    names = [one.name for one in fields(omss.Drops)]
    assert compiled(HEADER, tmp_path, [f"OMSS_DROP_{name.upper()}" for name in names]) == list(range(len(names)))
    assert compiled(HEADER, tmp_path, ["OMSS_DROPS"])[0] >= len(names)


def test_option_numbers_are_nobody_elses() -> None:
    """iptables 64, arptables 96, ebtables 128, IPVS 1088: each has at most a few dozen."""
    taken = {*range(256), *range(1024, 1280)}
    assert not taken & set(range(omss.BASE, omss.BASE + 4))


def test_layouts_have_no_native_alignment() -> None:
    layouts: list[struct.Struct] = list(STRUCTS.values())
    assert all(layout.format.startswith("=") for layout in layouts)
