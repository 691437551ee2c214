# SPDX-License-Identifier: Apache-2.0
"""What a guest may ask for. Nothing that it says is believed: the connection must end at an address that belongs to that
VM, the file must lie beneath that VM's share, and every number must be in its range."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
import struct
from dataclasses import dataclass

from guest_agent.handoff.errors import GuestError, HandoffError, HostError, Reason
from guest_agent.handoff.snapshot import CLOSE_WAIT, ESTABLISHED, Snapshot, decode
from guest_agent.handoff.wire import Header
from hypervisor_svc.schedule import PRIORITIES

_TOKEN = re.compile(r"[0-9a-f]{32}")
_LARGEST = 1 << 62
_HAND_OUT_FIELDS = frozenset({"type", "token", "path", "inode", "offset", "count", "priority", "snapshot"})

_SYS_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08
_HOW = struct.pack(
    "=QQQ",
    os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY,
    0,
    _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS,
)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Job:
    """One accepted request: what to send of which file to whom. Offsets and counts in bytes."""

    token: str
    path: str
    inode: int
    offset: int
    count: int
    priority: str
    snapshot: Snapshot


def read_job(header: Header, body: bytes) -> Job:
    """Check the form of a `hand_out` message. Raises GuestError."""
    if header.keys() != _HAND_OUT_FIELDS:
        raise GuestError(Reason.BAD_REQUEST, f"hand_out: fields {sorted(header.keys() ^ _HAND_OUT_FIELDS)}")
    job = Job(
        token=read_token(header),
        path=_path(header["path"]),
        inode=_number("inode", header["inode"], 0),
        offset=_number("offset", header["offset"], 0),
        count=_number("count", header["count"], 1),
        priority=_priority(header["priority"]),
        snapshot=decode(header["snapshot"], body),
    )
    if job.snapshot.state not in (ESTABLISHED, CLOSE_WAIT):
        raise GuestError(Reason.HALF_CLOSED, "the server has closed its side: nothing can be sent")
    return job


def read_token(header: Header) -> str:
    """The transfer's identity, 32 hexadecimal digits. Raises GuestError."""
    token = header.get("token")
    if type(token) is not str or not _TOKEN.fullmatch(token):
        raise GuestError(Reason.BAD_REQUEST, "token is not 32 hexadecimal digits")
    return token


def _path(value: object) -> str:
    if type(value) is not str or not value or len(value.encode("utf-8", "surrogatepass")) > 4095 or "\0" in value:
        raise GuestError(Reason.BAD_REQUEST, "path is not a file name of at most 4095 bytes")
    return value


def _number(name: str, value: object, least: int) -> int:
    if type(value) is not int or not least <= value < _LARGEST:
        raise GuestError(Reason.BAD_REQUEST, f"{name}: {value!r} is out of range")
    return value


def _priority(value: object) -> str:
    if value not in PRIORITIES:
        raise GuestError(Reason.BAD_REQUEST, f"priority: {value!r} is none of {', '.join(PRIORITIES)}")
    return str(value)


def check_flow(snapshot: Snapshot, addresses: tuple[str, ...]) -> None:
    """The connection must end at one of the VM's own addresses. Raises GuestError(FOREIGN_ADDRESS)."""
    if snapshot.local.address not in addresses:
        raise GuestError(Reason.FOREIGN_ADDRESS, f"{snapshot.local.address} does not belong to this VM")
    if snapshot.peer.address in addresses:
        raise GuestError(Reason.FOREIGN_ADDRESS, "the client is the VM itself")


def open_file(share: str, job: Job) -> int:
    """Open the job's file beneath `share` for reading, without following any symbolic link (openat2(2)).

    Raises GuestError: OUTSIDE_SHARE, NO_SUCH_FILE, NOT_A_REGULAR_FILE, FILE_CHANGED; HostError for what is ours."""
    fd = _open_beneath(share, job.path)
    try:
        _check_file(os.fstat(fd), job)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_beneath(share: str, path: str) -> int:
    root = os.open(share, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd: int = _libc.syscall(_SYS_OPENAT2, root, os.fsencode(path), _HOW, len(_HOW))
    finally:
        os.close(root)
    if fd < 0:
        raise _refusal(ctypes.get_errno(), path)
    return fd


def _refusal(number: int, path: str) -> HandoffError:
    if number in (errno.EXDEV, errno.ELOOP):
        return GuestError(Reason.OUTSIDE_SHARE, f"{path!r} leaves the share or passes a symbolic link", errno=number)
    if number in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EAGAIN):
        return GuestError(Reason.NO_SUCH_FILE, f"{path!r} is not on the share", errno=number)
    return HostError(Reason.NO_SUCH_FILE, f"{path!r} cannot be opened", errno=number)


def _check_file(status: os.stat_result, job: Job) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise GuestError(Reason.NOT_A_REGULAR_FILE, f"{job.path!r} is not a regular file")
    if job.inode and job.inode != status.st_ino:
        raise GuestError(Reason.FILE_CHANGED, f"{job.path!r} is another file than the guest has open")
    if job.offset >= status.st_size:
        raise GuestError(Reason.FILE_CHANGED, f"{job.path!r} ends at {status.st_size}, before offset {job.offset}")
