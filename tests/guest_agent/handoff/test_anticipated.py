# SPDX-License-Identifier: Apache-2.0
"""What a client may ask next: both ends understand each other, and nonsense is the guest's fault."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.handoff.anticipated import (
    MAX_ANTICIPATED,
    MAX_HEAD,
    MAX_REQUEST,
    Anticipated,
    find,
    read_anticipated,
    within_limits,
    write_anticipated,
)
from guest_agent.handoff.errors import GuestError, Reason

ONE = Anticipated(b"GET /2 HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", "film/2", 0, 10, 10, 5)
NUMBERS = st.integers(0, (1 << 62) - 1)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(sorted(ONE.__dict__)) | st.text(), inner),
)
ENTRIES = st.builds(
    Anticipated,
    request=st.binary(min_size=1, max_size=100),
    head=st.binary(min_size=1, max_size=100),
    path=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
    offset=NUMBERS,
    count=NUMBERS.filter(bool),
    size=NUMBERS.filter(bool),
    mtime_ns=NUMBERS,
)


@given(st.lists(ENTRIES, max_size=MAX_ANTICIPATED))
def test_there_and_back(anticipated: list[Anticipated]) -> None:
    assert read_anticipated(write_anticipated(anticipated)) == tuple(anticipated)


@given(ANY_JSON | st.lists(st.fixed_dictionaries(dict.fromkeys(ONE.__dict__, ANY_JSON)), max_size=2))
def test_nothing_that_is_anticipated_crashes(told: object) -> None:
    try:
        read_anticipated(told)
    except GuestError as error:
        assert error.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize(
    "wrong",
    [
        {"request": ""},
        {"request": "x" * (MAX_REQUEST + 1)},
        {"head": ""},
        {"head": "x" * (MAX_HEAD + 1)},
        {"head": "\u0100"},
        {"path": ""},
        {"path": "a\0b"},
        {"offset": -1},
        {"count": 0},
        {"count": True},
        {"size": 0},
        {"mtime_ns": 1 << 62},
        {"more": 1},
    ],
    ids=str,
)
def test_what_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(GuestError):
        read_anticipated([{**write_anticipated([ONE])[0], **wrong}])


def test_not_too_many() -> None:
    assert len(read_anticipated(write_anticipated([ONE] * MAX_ANTICIPATED))) == MAX_ANTICIPATED
    with pytest.raises(GuestError):
        read_anticipated(write_anticipated([ONE] * (MAX_ANTICIPATED + 1)))


def test_not_too_much() -> None:
    large = replace(ONE, request=b"x" * MAX_REQUEST, path="y" * 4000)
    assert len(read_anticipated(write_anticipated([large] * 5))) == 5
    with pytest.raises(GuestError, match="6 requests of 73"):
        read_anticipated(write_anticipated([large] * 6))
    assert len(list(within_limits([large] * 6))) == 5
    assert len(list(within_limits([ONE] * 100))) == MAX_ANTICIPATED


def test_which_of_them_it_is() -> None:
    told = [replace(ONE, request=b"GET /%d HTTP\n\n" % number) for number in (1, 2, 30)]
    assert find(told, 0, b"GET /1 HTTP\n\n") == 0
    assert find(told, 0, b"GET /2 HTTP\n\nGET /30 HTTP\n\n") == 1
    assert find(told, 1, b"GET /30 HTTP\n\n") == 2
    for part in (b"G", b"GET /2 HTTP\n", b"GET /3"):
        assert find(told, 0, part) is None
    for other in (b"HEAD", b"GET /1 HTTP\r\n\r\n", b"GET /4", b"get /1"):
        with pytest.raises(LookupError):
            find(told, 0, other)
    with pytest.raises(LookupError):  # that one was left out
        find(told, 2, b"GET /2 HTTP\n\n")
    with pytest.raises(LookupError):
        find(told, 3, b"GET /30 HTTP\n\n")
