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
from ipaddress import ip_address

from guest_agent.handoff.errors import GuestError, HandoffError, HostError, Reason
from guest_agent.handoff.snapshot import CLOSE_WAIT, ESTABLISHED, Endpoint, Snapshot, decode
from guest_agent.handoff.wire import Header
from hypervisor_svc.ring import Join, OnLag
from hypervisor_svc.schedule import PRIORITIES
from hypervisor_svc.splice import Framing, SessionOptions, SinkOptions

_TOKEN = re.compile(r"[0-9a-f]{32}")
_LARGEST = 1 << 62
_HAND_OUT_FIELDS = frozenset({"type", "token", "path", "inode", "offset", "count", "priority", "snapshot"})
_SINK_FIELDS = frozenset({"priority", "join", "on_lag", "lag_soft", "lag_hard_ms", "begin"})
_RELAY_JOIN_FIELDS = frozenset({"type", "token", "relay", "role", "snapshot"}) | _SINK_FIELDS
_RELAY_UDP_FIELDS = frozenset({"type", "token", "relay", "local", "peer"}) | _SINK_FIELDS
_RING_FIELDS = ("ring_entries", "entry_bytes", "budget_ms", "max_sinks")
_LOOK_FIELDS = frozenset({"type", "token", "path"})
_RELAY_OPEN_FIELDS = frozenset(
    {"type", "token", "source", "path", "inode", "offset", "port", "framing", "first", "rest", *_RING_FIELDS}
)

_SYS_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_NAME = os.O_PATH | os.O_CLOEXEC
_RESOLVE = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
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


@dataclass(frozen=True)
class RelayJob(Job):
    """A connection that becomes the source of a relay (`role`), or a sink."""

    relay: str
    role: str
    options: SinkOptions


@dataclass(frozen=True)
class UdpJob:
    """A UDP sink of a relay: datagrams from one of the VM's own addresses to a peer of its choice."""

    token: str
    relay: str
    local: Endpoint
    peer: Endpoint
    options: SinkOptions


@dataclass(frozen=True)
class RelayPlan:
    """A relay to open. `source`: "connection" (it is still to come), "file" or "ring" (`path`, `inode`, `offset`), or "udp"
    (`port`)."""

    token: str
    source: str
    path: str
    inode: int
    offset: int
    port: int
    options: SessionOptions


def read_relay_plan(header: Header) -> RelayPlan:
    """Check the form of a `relay_open` message. Raises GuestError."""
    _exactly(header, _RELAY_OPEN_FIELDS)
    source = header["source"]
    if source not in ("connection", "file", "ring", "udp"):
        raise GuestError(Reason.BAD_REQUEST, f"source: {source!r:.40} is none of connection, file, ring, udp")
    sizes = {name: _number(name, header[name], 0) for name in _RING_FIELDS}
    first = _number("first", header["first"], 0)
    try:
        options = SessionOptions(framing=Framing(header["framing"]), first=first, rest=_bytes("rest", header["rest"]), **sizes)
    except ValueError as error:
        raise GuestError(Reason.BAD_REQUEST, str(error)) from None
    return RelayPlan(
        token=read_token(header),
        source=str(source),
        path=_path(header["path"]) if source in ("file", "ring") else "",
        inode=_number("inode", header["inode"], 0),
        offset=_number("offset", header["offset"], 0),
        port=_number("port", header["port"], 0),
        options=options,
    )


def read_relay_job(header: Header, body: bytes) -> RelayJob:
    """Check the form of a `relay_join` message. Raises GuestError."""
    _exactly(header, _RELAY_JOIN_FIELDS)
    role = header["role"]
    if role not in ("source", "sink"):
        raise GuestError(Reason.BAD_REQUEST, f"role: {role!r:.40} is none of source, sink")
    relay = _relay(header)
    job = RelayJob(
        token=read_token(header),
        path=f"{role} of relay {relay[:8]}",
        inode=0,
        offset=0,
        count=0,
        priority=_priority(header["priority"]),
        snapshot=decode(header["snapshot"], body),
        relay=relay,
        role=str(role),
        options=_sink_options(header),
    )
    if job.snapshot.state not in (ESTABLISHED, CLOSE_WAIT):
        raise GuestError(Reason.HALF_CLOSED, "the server has closed its side: nothing can be sent")
    return job


def read_udp_job(header: Header) -> UdpJob:
    """Check the form of a `relay_udp` message. Raises GuestError."""
    _exactly(header, _RELAY_UDP_FIELDS)
    return UdpJob(
        token=read_token(header),
        relay=_relay(header),
        local=_endpoint("local", header["local"]),
        peer=_endpoint("peer", header["peer"]),
        options=_sink_options(header),
    )


def _sink_options(header: Header) -> SinkOptions:
    begin = header["begin"]
    try:
        return SinkOptions(
            priority=PRIORITIES.index(_priority(header["priority"])),
            join=Join(header["join"]),
            on_lag=OnLag(header["on_lag"]),
            lag_soft=_number("lag_soft", header["lag_soft"], 0),
            lag_hard_ms=_number("lag_hard_ms", header["lag_hard_ms"], 0),
            begin=None if begin is None else _number("begin", begin, 0),
        )
    except ValueError as error:
        raise GuestError(Reason.BAD_REQUEST, str(error)) from None


def _relay(header: Header) -> str:
    relay = header.get("relay")
    if type(relay) is not str or not _TOKEN.fullmatch(relay):
        raise GuestError(Reason.BAD_REQUEST, "relay is not 32 hexadecimal digits")
    return relay


def _endpoint(name: str, value: object) -> Endpoint:
    """[address, port]"""
    refusal = GuestError(Reason.BAD_REQUEST, f"{name} is not an address and a port")
    if type(value) is not list or len(value) != 2:
        raise refusal
    address, port = value
    if type(address) is not str or type(port) is not int or not 1 <= port <= 65535:
        raise refusal
    try:
        return Endpoint(str(ip_address(address)), port)
    except ValueError:
        raise refusal from None


def _exactly(header: Header, fields: frozenset[str]) -> None:
    if header.keys() != fields:
        raise GuestError(Reason.BAD_REQUEST, f"{header['type']}: fields {sorted(header.keys() ^ fields)}")


def read_job(header: Header, body: bytes, *, least: int = 1) -> Job:
    """Check the form of a `hand_out` message; `least`: bytes. Raises GuestError."""
    _exactly(header, _HAND_OUT_FIELDS)
    job = Job(
        token=read_token(header),
        path=_path(header["path"]),
        inode=_number("inode", header["inode"], 0),
        offset=_number("offset", header["offset"], 0),
        count=_number("count", header["count"], least),
        priority=_priority(header["priority"]),
        snapshot=decode(header["snapshot"], body),
    )
    if job.snapshot.state not in (ESTABLISHED, CLOSE_WAIT):
        raise GuestError(Reason.HALF_CLOSED, "the server has closed its side: nothing can be sent")
    return job


def read_look(header: Header) -> str:
    """Check the form of a `look` message; the path. Raises GuestError."""
    _exactly(header, _LOOK_FIELDS)
    return _path(header["path"])


def read_token(header: Header) -> str:
    """The transfer's identity, 32 hexadecimal digits. Raises GuestError."""
    token = header.get("token")
    if type(token) is not str or not _TOKEN.fullmatch(token):
        raise GuestError(Reason.BAD_REQUEST, "token is not 32 hexadecimal digits")
    return token


def _path(value: object) -> str:
    refusal = GuestError(Reason.BAD_REQUEST, "path is not a file name of at most 4095 bytes")
    if type(value) is not str or not value or "\0" in value:
        raise refusal
    try:
        raw = os.fsencode(value)
    except UnicodeEncodeError:
        raise refusal from None
    if len(raw) > 4095:
        raise refusal
    return value


def _number(name: str, value: object, least: int) -> int:
    if type(value) is not int or not least <= value < _LARGEST:
        raise GuestError(Reason.BAD_REQUEST, f"{name}: {value!r} is out of range")
    return value


def _bytes(name: str, value: object) -> bytes:
    """Hexadecimal digits."""
    if type(value) is not str or len(value) > 4096:
        raise GuestError(Reason.BAD_REQUEST, f"{name} is not a short string of hexadecimal digits")
    try:
        return bytes.fromhex(value)
    except ValueError:
        raise GuestError(Reason.BAD_REQUEST, f"{name} is not hexadecimal") from None


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


def open_file(share: str, job: Job | RelayPlan) -> int:
    """Open the job's file beneath `share` for reading, without following any symbolic link (openat2(2)).

    Raises GuestError: OUTSIDE_SHARE, NO_SUCH_FILE, NOT_A_REGULAR_FILE, FILE_CHANGED; HostError for what is ours."""
    fd = _open_beneath(share, job.path, _READ)
    try:
        _check_file(os.fstat(fd), job)
    except BaseException:
        os.close(fd)
        raise
    return fd


@dataclass(frozen=True)
class Seen:
    """What a file of the share is. `public`: everybody may read it, by the permissions of it and of all folders above it."""

    size: int
    mtime_ns: int
    inode: int
    public: bool


def look_at(share: str, path: str) -> Seen:
    """The same file that `open_file` would open, unopened. Raises what that does; a folder has errno EISDIR."""
    facts = _status_beneath(share, path)
    if not stat.S_ISREG(facts.st_mode):
        number = errno.EISDIR if stat.S_ISDIR(facts.st_mode) else errno.EINVAL
        raise GuestError(Reason.NOT_A_REGULAR_FILE, f"{path!r} is not a regular file", errno=number)
    above = [path[:at] for at, letter in enumerate(path) if letter == "/" and path[:at]]
    folders = (_status_beneath(share, folder) for folder in (".", *above))
    public = bool(facts.st_mode & stat.S_IROTH) and all(folder.st_mode & stat.S_IXOTH for folder in folders)
    return Seen(facts.st_size, max(0, facts.st_mtime_ns), facts.st_ino, public)


def _status_beneath(share: str, path: str) -> os.stat_result:
    fd = _open_beneath(share, path, _NAME)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _open_beneath(share: str, path: str, flags: int) -> int:
    root = os.open(share, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    how = struct.pack("=QQQ", flags, 0, _RESOLVE)
    try:
        fd: int = _libc.syscall(_SYS_OPENAT2, root, os.fsencode(path), how, len(how))
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


def _check_file(status: os.stat_result, job: Job | RelayPlan) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise GuestError(Reason.NOT_A_REGULAR_FILE, f"{job.path!r} is not a regular file")
    if job.inode and job.inode != status.st_ino:
        raise GuestError(Reason.FILE_CHANGED, f"{job.path!r} is another file than the guest has open")
    if isinstance(job, RelayPlan) and job.source == "ring":
        return  # its offset is a position of the stream, and the reader's to check
    grows = isinstance(job, RelayPlan)
    if job.offset > status.st_size or (job.offset == status.st_size and not grows):
        raise GuestError(Reason.FILE_CHANGED, f"{job.path!r} ends at {status.st_size}, before offset {job.offset}")
