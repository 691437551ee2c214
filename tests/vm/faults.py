# SPDX-License-Identifier: Apache-2.0
"""Faults from outside the product, for tests.

    python -m tests.vm.faults PID SOCKET      cut_connection, in the PID namespace of the process"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
from pathlib import Path

_PIDFD_GETFD = 438
"""Number of the system call on x86-64 (pidfd_getfd(2))."""
_libc = ctypes.CDLL(None, use_errno=True)


def cut_connection(pid: int, peer: str) -> None:
    """Shut down the Unix connection of a process to the socket `peer`, as if something between had broken. Raises LookupError."""
    handle = os.pidfd_open(pid)
    try:
        for number in sorted(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()):
            if _is_connected_to(handle, number, peer):
                return
    finally:
        os.close(handle)
    raise LookupError(f"process {pid} has no connection to {peer}")


def _is_connected_to(handle: int, number: int, peer: str) -> bool:
    """And if so, it is no longer."""
    copy = _libc.syscall(_PIDFD_GETFD, handle, number, 0)
    if copy < 0:
        return False
    with contextlib.suppress(OSError), socket.socket(fileno=copy) as sock:
        if sock.family == socket.AF_UNIX and sock.getpeername() == peer:
            sock.shutdown(socket.SHUT_RDWR)
            return True
    return False


if __name__ == "__main__":
    cut_connection(int(sys.argv[1]), sys.argv[2])
