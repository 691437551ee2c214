# SPDX-License-Identifier: Apache-2.0
"""Why a connection could not be moved, and whose fault it is.

Every failure has a `Reason` (a stable word for programs, counted in `streamlift status`), keeps the kernel's errno where
there was one, and carries a message for people. The class says whose fault it is.
"""

from __future__ import annotations

import errno as errnos
from enum import Enum


class Reason(str, Enum):
    """A stable word for each way in which a handoff can end early."""

    # The socket itself cannot be moved.
    NOT_TCP = "not_tcp"
    MPTCP = "mptcp"
    UPPER_LAYER = "upper_layer_protocol"  # kTLS and every other TCP_ULP
    AUTHENTICATED = "md5_or_ao"
    LISTENING = "listening"
    NOT_ESTABLISHED = "not_established"
    HALF_CLOSED = "half_closed"
    SOCKET_FILTER = "socket_filter"  # the application's own filter would be lost
    URGENT_DATA = "urgent_data"
    QUEUE_TOO_LARGE = "queue_too_large"
    # The file cannot be served by the host.
    NOT_ON_SHARE = "not_on_share"
    TOO_SMALL = "too_small"
    OUTSIDE_SHARE = "outside_share"
    NO_SUCH_FILE = "no_such_file"
    NOT_A_REGULAR_FILE = "not_a_regular_file"
    FILE_CHANGED = "file_changed"
    # The host says no.
    HOST_AWAY = "host_away"
    HOST_LOST = "host_lost"
    FOREIGN_ADDRESS = "foreign_address"
    TABLE_FULL = "table_full"
    DUPLICATE = "duplicate_token"
    DRAINING = "draining"
    RESTORE_FAILED = "restore_failed"
    REDIRECT_FAILED = "redirect_failed"
    TIMED_OUT = "timed_out"
    OPERATOR = "handed_back_by_operator"
    # The transfer ended early.
    PEER_GONE = "peer_gone"
    FILE_SHORT = "file_short"
    READ_ERROR = "read_error"
    KEPT = "kept_by_host"  # the VM moved, and its host sends the rest
    APPLICATION_GONE = "application_gone"
    # A relay.
    UNKNOWN_RELAY = "unknown_relay"
    RELAY_ENDED = "relay_ended"
    LAGGED = "lagged"
    # Somebody spoke nonsense.
    BAD_FRAME = "bad_frame"
    BAD_SNAPSHOT = "bad_snapshot"
    BAD_VERSION = "bad_version"
    BAD_REQUEST = "bad_request"
    FLOOD = "flood"
    UNKNOWN_TRANSFER = "unknown_transfer"


class HandoffError(Exception):
    """A step failed. `reason` is for programs, `str()` for people, `errno` is the kernel's (0: none)."""

    fault = "nobody"

    def __init__(self, reason: Reason, message: str = "", *, errno: int = 0) -> None:
        self.reason = reason
        self.errno = errno
        detail = f" ({errnos.errorcode.get(errno, errno)})" if errno else ""
        super().__init__(f"{message or reason.value.replace('_', ' ')}{detail}")


class NotMovable(HandoffError):
    """The socket is of a kind or in a state that this backend cannot move; it was not touched."""

    fault = "application"


class GuestError(HandoffError):
    """The guest asked for what it may not have, or said what cannot be."""

    fault = "guest"


class PeerGone(HandoffError):
    """The client reset the connection, or it timed out."""

    fault = "client"


class HostError(HandoffError):
    """The host could not do its part: no memory, no port, no file."""

    fault = "host"
