# SPDX-License-Identifier: Apache-2.0
"""The life cycle of one handed-over connection, as one table of allowed transitions. Pure.

The guest's view and the host's view are two columns of the same story; each side drives its own machine::

    guest: HOME -> FROZEN -> OFFERED -> OUT -> RETURNING -> HOME      (-> CARRIED -> OFFERED: to the next host, with its VM)
    host:  OFFERED -> RESTORED -> REDIRECTED -> SERVING -> FROZEN -> RETURNING -> GONE             (or PASSED: to the next host)

A step that fails goes back through ROLLED_BACK; an impossible move raises `ImpossibleTransition`: it is always a defect
of the program, never of its input.
"""

from __future__ import annotations

from enum import Enum


class Guest(Enum):
    """Where the guest's original socket stands."""

    HOME = "home"  # the application's own, thawed
    FROZEN = "frozen"  # hears nothing, says nothing; nobody else knows yet
    OFFERED = "offered"  # the snapshot was sent; the host may own it (in doubt)
    OUT = "out"  # the host owns it; ours is a silent place-holder
    RETURNING = "returning"  # restored in place, frozen until the host lets go
    CARRIED = "carried"  # the same, and let go by the host that the VM leaves: for the next one
    DEAD = "dead"  # the connection ended while it was away


class Host(Enum):
    """Where the host's copy stands."""

    OFFERED = "offered"  # a snapshot has come
    RESTORED = "restored"  # a frozen socket exists
    REDIRECTED = "redirected"  # packets come to it
    SERVING = "serving"  # thawed and committed: the host owns the connection
    FROZEN = "frozen"  # stopped at a byte boundary, to go home
    RETURNING = "returning"  # its snapshot is on the way; still the only copy that packets reach
    PASSED = "passed"  # its snapshot is on the way to the host that the VM moves to; nobody else has it if the VM stays
    GONE = "gone"  # closed silently, or ended with the client


GUEST_MOVES: dict[Guest, frozenset[Guest]] = {
    Guest.HOME: frozenset({Guest.FROZEN}),
    Guest.FROZEN: frozenset({Guest.HOME, Guest.OFFERED}),
    Guest.OFFERED: frozenset({Guest.HOME, Guest.OUT, Guest.RETURNING, Guest.DEAD}),
    Guest.OUT: frozenset({Guest.RETURNING, Guest.DEAD}),
    Guest.RETURNING: frozenset({Guest.HOME, Guest.CARRIED, Guest.DEAD}),
    Guest.CARRIED: frozenset({Guest.OFFERED, Guest.HOME, Guest.DEAD}),
    Guest.DEAD: frozenset(),
}

HOST_MOVES: dict[Host, frozenset[Host]] = {
    Host.OFFERED: frozenset({Host.RESTORED, Host.GONE}),
    Host.RESTORED: frozenset({Host.REDIRECTED, Host.GONE}),
    Host.REDIRECTED: frozenset({Host.SERVING, Host.GONE}),
    Host.SERVING: frozenset({Host.FROZEN, Host.GONE}),
    Host.FROZEN: frozenset({Host.RETURNING, Host.PASSED, Host.SERVING, Host.GONE}),
    Host.RETURNING: frozenset({Host.SERVING, Host.GONE}),
    Host.PASSED: frozenset({Host.SERVING, Host.GONE}),
    Host.GONE: frozenset(),
}


class ImpossibleTransition(RuntimeError):
    """The program tried a move that the table does not allow."""


def move_guest(now: Guest, to: Guest) -> Guest:
    """Return `to` if the guest's table allows the move, else raise `ImpossibleTransition`."""
    if to not in GUEST_MOVES[now]:
        raise ImpossibleTransition(f"guest: {now.value} -> {to.value}")
    return to


def move_host(now: Host, to: Host) -> Host:
    """Return `to` if the host's table allows the move, else raise `ImpossibleTransition`."""
    if to not in HOST_MOVES[now]:
        raise ImpossibleTransition(f"host: {now.value} -> {to.value}")
    return to
