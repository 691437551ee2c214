# SPDX-License-Identifier: Apache-2.0
"""Whether a guest works with its host, as one table of allowed transitions. Pure; both sides drive it.

    HERE ──▶ LETTING_GO ──▶ LOOSE ──▶ LEAVING ──▶ AWAY ──▶ RETURNING ──▶ HERE
      └───────────┼───────────┼──────────▶┘                    ▲
                  └───────────┴───────────┴────────────────────┘         cancelled, or somebody did not let go

A mounted share blocks migration and saving to disk: one that is LOOSE can be copied, while the host goes on serving; only one that
is AWAY can stop, unless its host passes all to the next (`hypervisor_svc/passing.py`). Whoever fails goes back to HERE: a guest
that is left alone, or meets another host's service than the one that it left, returns by itself."""

from __future__ import annotations

from enum import Enum


class Presence(str, Enum):
    """As in `streamlift status`."""

    HERE = "here"  # connections are handed out
    LETTING_GO = "letting_go"  # files are let go, shares are being unmounted
    LOOSE = "loose"  # no share is mounted; connections are handed out, and the host reads the files
    LEAVING = "leaving"  # none goes out any more, those that are out come home, files are let go
    AWAY = "away"  # nothing is out, no share is mounted
    RETURNING = "returning"  # shares are being mounted; connections are handed out, and the host reads the files


HANDING_OUT = frozenset({Presence.HERE, Presence.LETTING_GO, Presence.LOOSE, Presence.RETURNING})
"""In these the host takes connections, if there is one."""
PRESENCE_MOVES: dict[Presence, frozenset[Presence]] = {
    Presence.HERE: frozenset({Presence.LETTING_GO, Presence.LEAVING}),
    Presence.LETTING_GO: frozenset({Presence.LOOSE, Presence.LEAVING, Presence.RETURNING}),
    Presence.LOOSE: frozenset({Presence.LEAVING, Presence.RETURNING}),
    Presence.LEAVING: frozenset({Presence.AWAY, Presence.RETURNING}),
    Presence.AWAY: frozenset({Presence.RETURNING}),
    Presence.RETURNING: frozenset({Presence.HERE, Presence.LETTING_GO, Presence.LEAVING}),
}


def move_presence(now: Presence, to: Presence) -> Presence:
    """Return `to` if the table allows the move, else raise RuntimeError: a defect of the program."""
    if to not in PRESENCE_MOVES[now]:
        raise RuntimeError(f"presence: {now.value} -> {to.value}")
    return to
