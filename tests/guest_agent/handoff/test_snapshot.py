# SPDX-License-Identifier: Apache-2.0
"""The codec of snapshots: golden bytes, and that no input from a guest gets past it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.handoff.errors import GuestError, Reason
from guest_agent.handoff.snapshot import Endpoint, after, decode, encode
from tests.guest_agent.handoff.samples import SNAPSHOT, contradictions

GOLDEN = (
    '{"version":3,"local":["192.0.2.10",80],"peer":["198.51.100.7",40000],"send_sequence":4294967280,'
    '"receive_sequence":1000,"mss":1460,"send_scale":7,"receive_scale":10,"sack":true,"timestamps":true,'
    '"timestamp":123456,"timestamp_usec":false,"v4_mapped":false,"window":[1000,65535,65535,64000,1005],'
    '"options":[true,false,false,7200,75,9,87040,131072,0,0,0,0,0,"cubic"],"queues":[5,34,2],'
    '"state":1,"fin_unsent":false,"fin_read":false,"segments":[],"warm":null,"upper_layer":null}'
)


ALONE = replace(SNAPSHOT, unacked=b"", unsent=b"")
"""With nothing but a request in its queues: what contradicts itself is the change alone."""


def through_json(header: dict[str, Any]) -> Any:
    return json.loads(json.dumps(header))


def test_golden_header_and_body() -> None:
    header, body = encode(SNAPSHOT)
    assert json.dumps(header, separators=(",", ":")) == GOLDEN
    assert body == SNAPSHOT.receive_queue + SNAPSHOT.unacked + SNAPSHOT.unsent


def test_where_a_connection_will_arrive() -> None:
    """34 bytes in flight, 2 to be sent, then 100: from 0xFFFFFFF0 the send sequence wraps to 120."""
    there = after(SNAPSHOT, 100)
    assert (there.send_sequence, there.send_next) == (120, 120)
    assert there.receive_sequence == there.receive_next == SNAPSHOT.receive_sequence
    assert (there.receive_queue, there.unacked, there.unsent) == (b"", b"", b"")
    assert there.window.rcv_wup <= there.receive_next, "the kernel refuses a later one (tcp_repair_set_window)"


@pytest.mark.parametrize("ends", [("192.0.2.10", "198.51.100.7"), ("2001:db8::1", "2001:db8:2::7")])
def test_round_trip(ends: tuple[str, str]) -> None:
    snapshot = replace(SNAPSHOT, local=Endpoint(ends[0], 443), peer=Endpoint(ends[1], 1))
    header, body = encode(snapshot)
    assert decode(through_json(header), body) == snapshot


def test_sequence_numbers_wrap() -> None:
    assert SNAPSHOT.send_next == (0xFFFFFFF0 + 34) % 2**32
    assert SNAPSHOT.receive_next == 1005


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("local", ["192.0.2.010", 80]),
        ("local", ["0.0.0.0", 80]),
        ("local", ["224.0.0.1", 80]),
        ("local", ["::ffff:192.0.2.10", 80]),
        ("local", ["fe80::1%eth0", 80]),
        ("local", ["192.0.2.10", 0]),
        ("local", ["192.0.2.10", True]),
        ("peer", ["2001:db8::1", 80]),
        ("mss", 0),
        ("mss", 65536),
        ("mss", 1460.0),
        ("send_scale", 15),
        ("send_scale", None),
        ("send_sequence", -1),
        ("send_sequence", 2**32),
        ("sack", 1),
        ("window", [0, 0, 0, 0]),
        ("window", [0, 0, 0, 0, 2**32]),
        ("window", [1000, 65536, 65535, 64000, 1005]),
        ("window", [1000, 65535, 65535, 64000, 1006]),
        ("window", [65006, 65535, 65535, 64000, 1005]),
        ("queues", [5, 34, 3]),
        ("queues", [-1, 40, 2]),
        ("options", []),
        ("v4_mapped", None),
    ],
)
def test_bad_fields_are_refused(field: str, value: object) -> None:
    header, body = encode(SNAPSHOT)
    with pytest.raises(GuestError) as error:
        decode(through_json(header) | {field: value}, body)
    assert error.value.reason is Reason.BAD_SNAPSHOT


@pytest.mark.parametrize("version", [0, 1, 2, 4, 999, "3", None])
def test_other_versions_are_refused(version: object) -> None:
    header, body = encode(SNAPSHOT)
    with pytest.raises(GuestError) as error:
        decode(header | {"version": version}, body)
    assert error.value.reason is Reason.BAD_VERSION


@pytest.mark.parametrize("value", [1, {"kind": "tls"}, "tls", False])
def test_the_place_of_ktls_is_empty(value: object) -> None:
    """Who fills it is newer than we are: it is refused by its own reason, whatever it is."""
    header, body = encode(SNAPSHOT)
    with pytest.raises(GuestError) as error:
        decode(header | {"upper_layer": value}, body)
    assert error.value.reason is Reason.UPPER_LAYER


@pytest.mark.parametrize("change", contradictions(ALONE), ids=str)
def test_contradictions_are_refused(change: dict[str, Any]) -> None:
    """The kernel refuses the same ones, alone: `tests/host_module/socket_offload/test_calls.py`."""
    header, body = encode(replace(ALONE, **change))
    with pytest.raises(GuestError) as error:
        decode(through_json(header), body)
    assert error.value.reason is Reason.BAD_SNAPSHOT


def test_missing_and_unknown_fields_are_refused() -> None:
    header, body = encode(SNAPSHOT)
    with pytest.raises(GuestError):
        decode({key: value for key, value in header.items() if key != "mss"}, body)
    with pytest.raises(GuestError):
        decode(header | {"surprise": 1}, body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=10), inner, max_size=6),
    max_leaves=20,
)


@given(field=st.sampled_from(sorted(encode(SNAPSHOT)[0])), value=JSON, body=st.binary(max_size=64))
def test_mutated_snapshots_never_crash(field: str, value: object, body: bytes) -> None:
    header, good_body = encode(SNAPSHOT)
    for candidate in (body, good_body):
        try:
            decode(through_json(header) | {field: value}, candidate)
        except GuestError:
            continue


@given(JSON)
def test_any_json_never_crashes(value: object) -> None:
    with pytest.raises(GuestError):
        decode(value, b"")
