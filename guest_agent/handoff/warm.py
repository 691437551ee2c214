# SPDX-License-Identifier: Apache-2.0
"""The warm state of a connection: what its TCP has learnt about the path (RFC 5681, RFC 6298), and which the `socket_offload`
module carries. Without it a connection begins anew, in slow start. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

PRIVATE_SIZE = 104
"""Bytes of a congestion control's private state (ICSK_CA_PRIV_SIZE)."""
NEVER = 0xFFFFFFFF
"""`ts_recent_age` of a connection that has seen no timestamp."""


class Warm(NamedTuple):
    """`struct skoff_warm` and what else only the module can set; the units are those of
    `host_module/socket_offload/uapi/socket_offload.h`. Windows in segments, times in microseconds where the name says so."""

    mss_cache: int
    ts_recent: int
    ts_recent_age: int
    ecn: int
    snd_cwnd: int
    snd_ssthresh: int
    snd_cwnd_cnt: int
    srtt_us: int
    mdev_us: int
    mdev_max_us: int
    rttvar_us: int
    rto_us: int
    min_rtt_us: int
    reordering: int
    rate_delivered: int
    rate_interval_us: int
    delivered: int
    lost: int
    rcv_ssthresh: int
    window_clamp: int
    rcvq_space: int
    rcv_rtt_us: int
    ca_state: int
    ca_hz: int
    ca_jiffies: int
    rate_app_limited: int
    ca_clock_us: int
    pacing_rate: int
    bytes_acked: int
    ca_private: bytes


_U32, _U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_MOST = dict.fromkeys(Warm._fields, _U32) | dict.fromkeys(("ca_clock_us", "pacing_rate", "bytes_acked"), _U64)
_MOST |= {"ecn": 1, "mss_cache": 0xFFFF}


def encode(warm: Warm | None) -> list[Any] | None:
    """As JSON has it."""
    return None if warm is None else [*warm[:-1], warm.ca_private.hex()]


def decode(value: object) -> Warm | None:
    """The inverse of `encode`, for input that nobody vouches for. Raises ValueError or TypeError."""
    if value is None:
        return None
    if type(value) is not list or len(value) != len(Warm._fields):
        raise ValueError(f"warm: {len(Warm._fields)} values are needed, or null")
    for name, number in zip(Warm._fields[:-1], value[:-1], strict=True):
        if type(number) is not int or not 0 <= number <= _MOST[name]:
            raise ValueError(f"warm: {name}: {number!r} is not a number from 0 to {_MOST[name]}")
    if type(value[-1]) is not str or len(value[-1]) != 2 * PRIVATE_SIZE:
        raise ValueError(f"warm: ca_private is not {PRIVATE_SIZE} bytes in hexadecimal")
    return Warm._make([*value[:-1], bytes.fromhex(value[-1])])
