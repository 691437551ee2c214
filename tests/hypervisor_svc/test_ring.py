# SPDX-License-Identifier: Apache-2.0
"""The ring against a plain list, and where sinks go on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor_svc.ring import OnLag, Ring, Skip, catch_up


def _ring(capacity: int, entries: int, syncs: tuple[int, ...] = ()) -> Ring:
    ring = Ring(capacity)
    for number in range(entries):
        assert ring.append(b"%d" % number) == number
        if number in syncs:
            ring.mark_sync(number)
    return ring


@given(capacity=st.integers(2, 20), entries=st.integers(0, 60), begin=st.integers(-5, 70), end=st.integers(-5, 70))
def test_the_window_is_the_end_of_all_that_came(capacity: int, entries: int, begin: int, end: int) -> None:
    ring = _ring(capacity, entries)
    everything = [b"%d" % number for number in range(entries)]
    kept = everything[-capacity:]
    assert (ring.tail, ring.head) == (entries - len(kept), entries)
    assert ring.bytes == sum(map(len, kept))
    assert ring.window(begin, end) == everything[max(begin, ring.tail) : max(end, 0)]


def test_outside_the_window_is_an_error() -> None:
    ring = _ring(4, 10)
    assert ring[6] == b"6"
    for sequence in (5, 10):
        with pytest.raises(LookupError, match=r"\[6, 10\)"):
            ring[sequence]


def test_sync_points_leave_with_their_entries() -> None:
    assert _ring(4, 10, syncs=(2, 7)).newest_sync() == 7
    assert _ring(4, 12, syncs=(2, 7)).newest_sync() is None


def test_where_every_entry_is_a_sync_point() -> None:
    ring = Ring(4, all_sync=True)
    assert ring.newest_sync() is None
    ring.append(b"one")
    ring.append(b"two")
    assert ring.newest_sync() == 1
    assert catch_up(ring, 0, 2, on_lag=OnLag.DROP_TO_SYNC, lag_soft=1) == Skip(1, overrun=False)


@pytest.mark.parametrize(
    ("cursor", "on_lag", "soft", "syncs", "expected"),
    [
        (20, OnLag.HEAD_DROP, 8, (), None),
        (12, OnLag.HEAD_DROP, 8, (), None),
        (13, OnLag.HEAD_DROP, 4, (), Skip(16, overrun=False)),
        (9, OnLag.HEAD_DROP, 8, (), Skip(12, overrun=True)),
        (9, OnLag.HEAD_DROP, 4, (), Skip(16, overrun=True)),
        (9, OnLag.DROP_TO_SYNC, 8, (14, 17), Skip(17, overrun=True)),
        (13, OnLag.DROP_TO_SYNC, 4, (14,), Skip(14, overrun=False)),
        (14, OnLag.DROP_TO_SYNC, 4, (14,), None),
        (15, OnLag.DROP_TO_SYNC, 4, (14,), None),
        (13, OnLag.DROP_TO_SYNC, 4, (), Skip(None, overrun=False)),
        (9, OnLag.DROP_TO_SYNC, 8, (), Skip(None, overrun=True)),
    ],
)
def test_where_a_sink_goes_on(cursor: int, on_lag: OnLag, soft: int, syncs: tuple[int, ...], expected: Skip | None) -> None:
    ring = _ring(8, 20, syncs)
    assert (ring.tail, ring.head) == (12, 20)
    assert catch_up(ring, cursor, ring.head, on_lag=on_lag, lag_soft=soft) == expected


@given(
    entries=st.integers(0, 60),
    cursor=st.integers(0, 60),
    pending=st.integers(0, 20),
    on_lag=st.sampled_from([OnLag.HEAD_DROP, OnLag.DROP_TO_SYNC]),
    soft=st.integers(1, 16),
    syncs=st.sets(st.integers(0, 60)),
)
def test_nobody_goes_back_or_out_of_the_window(
    entries: int, cursor: int, pending: int, on_lag: OnLag, soft: int, syncs: set[int]
) -> None:
    ring = _ring(16, entries, tuple(syncs))
    front = max(entries - pending, 0)
    skip = catch_up(ring, min(cursor, entries), front, on_lag=on_lag, lag_soft=soft)
    if skip is not None and skip.to is not None:
        assert max(cursor, ring.tail - 1) < skip.to <= ring.head or skip.to == ring.tail
    if skip is None:
        assert cursor >= ring.tail
