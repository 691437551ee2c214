# SPDX-License-Identifier: Apache-2.0
"""A VM that lies, floods and races, beside one that is honest: every attempt is refused with its reason, and the honest VM's
clients notice nothing."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from guest_agent.handoff.snapshot import VERSION, Endpoint
from guest_agent.handoff.wire import HELLO_TAG, MAX_BODY, MAX_HEADER, encode_frame
from tests.client import make_content
from tests.guest_agent.handoff.test_wire import prefix
from tests.namespaces import capture
from tests.namespaces.deployment import Deployment, deployed, wait_for
from tests.namespaces.hostile import ADDRESS, CLIENT, HostileGuest, hand_out
from tests.namespaces.topology import routed

pytestmark = pytest.mark.root

SECRET = b"the neighbour's secret " * 50
VM = """
[policy]
max_frames_per_second = 2000
[[vm]]
name = "hostile"
channel = "{folder}/hostile.sock"
share = "{folder}/own"
addresses = ["10.77.1.66"]
"""
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    make_content(str(folder), (1000, 70_000, 1_400_000))
    return folder


@pytest.fixture
def scene(share: Path, tmp_path: Path) -> Iterator[tuple[Deployment, HostileGuest]]:
    """An honest VM, whose clients are at it all the time, and a hostile one. In the end the honest one must be unharmed."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "file").write_bytes(b"mine" * 1000)
    (tmp_path / "secret").write_bytes(SECRET)
    with routed() as network, HostileGuest(tmp_path / "hostile.sock") as hostile:
        network.keep_order()
        network.guest.run("ip", "address", "add", f"{ADDRESS}/24", "dev", "eth0")
        with deployed(network, tmp_path, share, extra=VM.format(folder=tmp_path)) as deployment:
            hostile.connect()
            with capture.captured(network.client, tmp_path / "link.pcap"), _clients(deployment) as report:
                yield deployment, hostile
            packets = list(capture.read(tmp_path / "link.pcap"))
            servers = {(address, 80) for address in network.guest_address.values()}
            assert capture.judge((p for p in packets if p.source[0] != ADDRESS), servers) == []
            assert not any(SECRET[:20] in packet.payload for packet in packets)
            assert (report["errors"], report["first_errors"]) == (0, [])
            wait_for(lambda: not deployment.call("connections")["connections"], "nothing is out")
            honest = next(machine for machine in deployment.status()["machines"] if machine["name"] == "guest")
            assert honest["refused"] == {} and honest["handed_back"] == honest["handed_out"] > 0


@contextlib.contextmanager
def _clients(deployment: Deployment) -> Iterator[dict[str, Any]]:
    """Requests of the honest VM's clients, from before the block until after it."""
    report: dict[str, Any] = {"errors": 0, "first_errors": []}
    over = threading.Event()

    def run() -> None:
        while True:
            one = deployment.load(requests=100, connections=4)
            report["errors"] += one["errors"]
            report["first_errors"] += one["first_errors"]
            if over.is_set():
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield report
    finally:
        over.set()
        thread.join()


def refusals(deployment: Deployment) -> dict[str, int]:
    """Of the hostile VM, by reason."""
    found = next(machine for machine in deployment.status()["machines"] if machine["name"] == "hostile")
    return dict(found["refused"])


def expect(deployment: Deployment, reason: str, count: int = 1) -> None:
    wait_for(lambda: refusals(deployment).get(reason, 0) >= count, f"{count} x {reason}, there is {refusals(deployment)}")


Scene = tuple[Deployment, HostileGuest]


def test_connections_of_others(scene: Scene) -> None:
    """The neighbour's addresses, the host's, and the VM's own as a client."""
    deployment, hostile = scene
    for local in ("10.77.1.2", "10.77.1.1", "10.77.2.1", "127.0.0.1", "192.0.2.1", "fd77:1::2"):
        peer = Endpoint("fd77:2::2" if ":" in local else CLIENT, 4000)
        answer = hostile.offer("file", snapshot=replace(hostile.snapshot(), local=Endpoint(local, 80), peer=peer))
        assert (answer["type"], answer["reason"]) == ("refused", "foreign_address")
    answer = hostile.offer("file", snapshot=replace(hostile.snapshot(), peer=Endpoint(ADDRESS, 4000)))
    assert (answer["type"], answer["reason"]) == ("refused", "foreign_address")
    assert refusals(deployment) == {"foreign_address": 7}


def test_live_connection_of_the_neighbour(scene: Scene, share: Path) -> None:
    """Its exact four-tuple, while it is out."""
    deployment, hostile = scene
    live = wait_for(lambda: deployment.call("connections")["connections"], "the neighbour has something out")
    for row in live:
        client, port = row["client"].rsplit(":", 1)
        snapshot = replace(hostile.snapshot(), local=Endpoint("10.77.1.2", 80), peer=Endpoint(client, int(port)))
        assert hostile.offer("file", snapshot=snapshot)["reason"] == "foreign_address"
        for kind in ("restored", "restore_failed", "standing_by", "abort", "late", "resume"):
            hostile.say({"type": kind, "token": row["token"], "message": "x", "ready": True, "frozen": False})
        expect(deployment, "unknown_transfer", 1)


PATHS = [
    ("../secret", "outside_share"),
    ("/etc/passwd", "outside_share"),
    ("link", "outside_share"),
    ("folder/../../secret", "outside_share"),
    ("folder/link", "outside_share"),
    ("self", "outside_share"),
    ("missing", "no_such_file"),
    ("file/below", "no_such_file"),
    ("x" * 300, "no_such_file"),
    ("folder", "not_a_regular_file"),
    (".", "not_a_regular_file"),
    ("fifo", "not_a_regular_file"),
    ("", "bad_request"),
    ("a\0b", "bad_request"),
    ("x" * 5000, "bad_request"),
]


def test_paths_outside_the_share(scene: Scene, tmp_path: Path) -> None:
    deployment, hostile = scene
    own = tmp_path / "own"
    (own / "folder").mkdir()
    (own / "link").symlink_to(tmp_path / "secret")
    (own / "folder" / "link").symlink_to("../../secret")
    (own / "self").symlink_to("file")  # none is followed, wherever it leads
    os.mkfifo(own / "fifo")
    for path, reason in PATHS:
        answer = hostile.offer(path)
        assert (answer["type"], answer.get("reason")) == ("refused", reason), path
        assert hostile.look(path).keys() == {"type", "token", "errno"}, path
    assert hostile.look("file")["size"] == 4000
    looks = [(path, reason) for path, reason in PATHS if reason in ("outside_share", "bad_request")]
    counts = {reason: sum(1 for _, one in PATHS + looks if one == reason) for _, reason in PATHS}
    assert refusals(deployment) == counts


def _exchange(one: Path, other: Path) -> None:
    """renameat2(2): both names change hands at once."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2")


def test_symlink_races(scene: Scene, tmp_path: Path) -> None:
    """A folder becomes a link to a folder outside while its files are opened: what is taken is what lies inside."""
    deployment, hostile = scene
    own, outside = tmp_path / "own", tmp_path / "outside"
    (own / "race").mkdir()
    outside.mkdir()
    (own / "race" / "file").write_bytes(b"inside" * 1000)
    (outside / "file").write_bytes(SECRET)
    (own / "other").symlink_to(outside)
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            _exchange(own / "race", own / "other")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        answers = [hostile.offer("race/file") for _ in range(300)]
    finally:
        over.set()
        thread.join()
    kinds = {(answer["type"], answer.get("reason")) for answer in answers}
    assert kinds - {("refused", "no_such_file")} == {("taken", None), ("refused", "outside_share")}
    wait_for(lambda: not _out(deployment), "the client resets what it never had", patience=30)


def _out(deployment: Deployment) -> int:
    found = next(machine for machine in deployment.status()["machines"] if machine["name"] == "hostile")
    return int(found["connections_out"])


def _frame(raw: bytes) -> Callable[[HostileGuest], bytes]:
    """A frame of the session around a header that may be anything."""
    return lambda hostile: prefix(hostile.session.peer_nonce, len(raw), 0, crc32(raw)) + raw


FRAMES: dict[str, tuple[Callable[[HostileGuest], bytes], str]] = {
    "noise": (lambda hostile: os.urandom(4096), "bad_frame"),
    "zeros": (lambda hostile: bytes(100_000), "bad_frame"),
    "a header too long": (lambda hostile: prefix(hostile.session.peer_nonce, MAX_HEADER + 1, 0, 0), "bad_frame"),
    "a body too long": (lambda hostile: prefix(hostile.session.peer_nonce, 2, MAX_BODY + 1, 0), "bad_frame"),
    "lengths that overflow": (lambda hostile: prefix(hostile.session.peer_nonce, 2**32 - 1, 2**32 - 1, 0), "bad_frame"),
    "a wrong checksum": (lambda hostile: prefix(hostile.session.peer_nonce, 2, 0, 1) + b"{}", "bad_frame"),
    "another session": (lambda hostile: encode_frame(b"12345678", {"type": "hand_out"}), "bad_frame"),
    "a hello with a body": (lambda hostile: prefix(HELLO_TAG, 2, 10, 0) + b"{}" + bytes(10), "bad_frame"),
    "no JSON": (_frame(b"]["), "bad_frame"),
    "not UTF-8": (_frame(b'{"type":"\xff"}'), "bad_frame"),
    "not an object": (_frame(b"[1]"), "bad_frame"),
    "no type": (_frame(b'{"token":1}'), "bad_frame"),
    "a number as type": (_frame(b'{"type":7}'), "bad_frame"),
    "not a number": (_frame(b'{"type":"late","token":NaN}'), "bad_frame"),
    "deep nesting": (_frame(b'{"type":' + b"[" * 8000), "bad_frame"),
    "an unknown type": (_frame(b'{"type":"hand_out_all"}'), "bad_request"),
    "a private name": (_frame(b'{"type":"_init__"}'), "bad_request"),
    "no token": (_frame(b'{"type":"hand_out"}'), "bad_request"),
    "a list as token": (_frame(b'{"type":"restored","token":[]}'), "bad_request"),
    "an object as token": (_frame(b'{"type":"resume","token":{"a":1}}'), "bad_request"),
    "version 0": (lambda hostile: _hello(0), "bad_version"),
    "version 999": (lambda hostile: _hello(999), "bad_version"),
    "no version": (lambda hostile: _hello(None), "bad_version"),
}


def _hello(version: object) -> bytes:
    return encode_frame(HELLO_TAG, {"type": "hello", "v": version, "nonce": "11" * 8, "answer": ""})


def test_malformed_frames(scene: Scene) -> None:
    """Each costs a frame or the session, and the next session works."""
    deployment, hostile = scene
    for name, (make, reason) in FRAMES.items():
        before = refusals(deployment).get(reason, 0)
        hostile.raw(make(hostile))
        expect(deployment, reason, before + 1)
        hostile.session.start()
        hostile.meet()
        assert hostile.offer("missing")["reason"] == "no_such_file", name


def test_half_a_frame(scene: Scene) -> None:
    """Its rest never comes: the session starts anew by itself."""
    _, hostile = scene
    message, body = hand_out("0" * 32, "file", hostile.snapshot())
    frame = encode_frame(hostile.session.peer_nonce, message, body)
    hostile.raw(frame[: len(frame) // 2])
    hostile.session.start()
    hostile.meet()
    assert hostile.offer("missing")["reason"] == "no_such_file"


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"token": "short"}, "bad_request"),
    ({"token": "g" * 32}, "bad_request"),
    ({"offset": -1}, "bad_request"),
    ({"offset": 1 << 62}, "bad_request"),
    ({"offset": 1e3}, "bad_request"),
    ({"offset": 10_000}, "file_changed"),
    ({"inode": 4711}, "file_changed"),
    ({"count": 0}, "bad_request"),
    ({"count": "1000"}, "bad_request"),
    ({"count": True}, "bad_request"),
    ({"priority": "highest"}, "bad_request"),
    ({"priority": ["high"]}, "bad_request"),
    ({"path": 7}, "bad_request"),
    ({"path": ["file"]}, "bad_request"),
    ({"surprise": 1}, "bad_request"),
    ({"snapshot": None}, "bad_snapshot"),
    ({"snapshot": {"version": 0}}, "bad_version"),
    ({"snapshot": {"version": 999}}, "bad_version"),
    ({"snapshot": {"version": VERSION}}, "bad_snapshot"),
]


def test_bad_offers(scene: Scene) -> None:
    deployment, hostile = scene
    for changes, reason in BAD_FIELDS:
        before = refusals(deployment).get(reason, 0)
        message, body = hand_out(os.urandom(16).hex(), "file", hostile.snapshot())
        hostile.say(message | changes, body)
        expect(deployment, reason, before + 1)
        assert refusals(deployment)[reason] == before + 1, changes
    message, body = hand_out("1" * 32, "file", hostile.snapshot())
    hostile.say(message, body + bytes(1))
    expect(deployment, "bad_snapshot", refusals(deployment)["bad_snapshot"])
    assert _out(deployment) == 0


RELAY = {"source": "file", "path": "file", "inode": 0, "offset": 0, "port": 0}
RING = {"framing": "raw", "ring_entries": 64, "entry_bytes": 4096, "budget_ms": 0, "max_sinks": 10, "first": 0, "rest": ""}
SINK = {"priority": "normal", "join": "latest", "on_lag": "head_drop", "lag_soft": 0, "lag_hard_ms": 0, "begin": None}
BAD_RELAYS: list[tuple[dict[str, Any], str]] = [
    ({"source": "device"}, "bad_request"),
    ({"source": 7}, "bad_request"),
    ({"path": "../secret"}, "outside_share"),
    ({"path": "missing"}, "no_such_file"),
    ({"offset": 1 << 40}, "file_changed"),
    ({"source": "udp", "port": 53}, "foreign_address"),
    ({"framing": "mp4"}, "bad_request"),
    ({"ring_entries": 1 << 40}, "bad_request"),
    ({"entry_bytes": -1}, "bad_request"),
    ({"budget_ms": 1e3}, "bad_request"),
    ({"max_sinks": 1 << 40}, "bad_request"),
    ({"source": "connection", "ring_entries": 65536, "entry_bytes": 65536}, "table_full"),
    ({"more": 1}, "bad_request"),
]
BAD_SINKS: list[tuple[dict[str, Any], str]] = [
    ({"relay": "0" * 32}, "unknown_relay"),
    ({"relay": "nonsense"}, "bad_request"),
    ({"local": ["10.77.1.2", 80]}, "foreign_address"),
    ({"local": ["127.0.0.1", 80]}, "foreign_address"),
    ({"local": [ADDRESS, 0]}, "bad_request"),
    ({"local": [ADDRESS]}, "bad_request"),
    ({"peer": [CLIENT, "x"]}, "bad_request"),
    ({"peer": {}}, "bad_request"),
    ({"join": "first"}, "bad_request"),
    ({"on_lag": []}, "bad_request"),
    ({"lag_soft": 1 << 40}, "bad_request"),
    ({"begin": -1}, "bad_request"),
    ({"priority": "highest"}, "bad_request"),
]


def test_bad_relays(scene: Scene) -> None:
    """Each is refused with its reason; what a guest may have of them is limited, and they are nobody else's."""
    deployment, hostile = scene
    for changes, reason in BAD_RELAYS:
        token = os.urandom(16).hex()
        hostile.say({"type": "relay_open", "token": token, **RELAY, **RING} | changes)
        assert hostile.hear("relay_refused", token=token)["reason"] == reason, changes
    relay = os.urandom(16).hex()
    hostile.say({"type": "relay_open", "token": relay, **RELAY, **RING})
    wait_for(lambda: deployment.call("relays")["relays"], "one is open")
    udp = {"type": "relay_udp", "relay": relay, "local": [ADDRESS, 5000], "peer": [CLIENT, 5000], **SINK}
    for changes, reason in BAD_SINKS:
        token = os.urandom(16).hex()
        hostile.say(udp | {"token": token} | changes)
        assert hostile.hear("relay_refused", token=token)["reason"] == reason, changes
    header, body = hand_out(os.urandom(16).hex(), "file", hostile.snapshot())
    join = {"type": "relay_join", "token": header["token"], "relay": relay, "role": "sink", **SINK, "snapshot": header["snapshot"]}
    roles = [({"relay": "0" * 32}, "unknown_relay"), ({"role": "owner"}, "bad_request"), ({"role": "source"}, "duplicate_token")]
    for changes, reason in roles:
        hostile.say(join | changes, body)
        assert hostile.hear("refused", token=header["token"])["reason"] == reason, changes
    for number in range(11):
        hostile.say(udp | {"token": f"{number:032x}", "peer": [CLIENT, 5000 + number]})
    assert hostile.hear("relay_refused", token=f"{10:032x}")["reason"] == "table_full"
    for _ in range(70):
        hostile.say({"type": "relay_open", "token": os.urandom(16).hex(), **RELAY, **RING})
    wait_for(lambda: len(deployment.call("relays")["relays"]) == 64, "as many as it may have")
    for kind in ("relay_close", "relay_remove", "relay_status", "relay_udp_remove"):
        hostile.say({"type": kind, "token": os.urandom(16).hex(), "relay": [relay]})
    hostile.say({"type": "relay_close", "token": relay})
    wait_for(lambda: len(deployment.call("relays")["relays"]) == 63, "it closes one")
    hostile.connect()
    assert len(deployment.call("relays")["relays"]) == 63, "the same agent came back"
    hostile.session.about["instance"] = "1"
    hostile.connect()
    wait_for(lambda: not deployment.call("relays")["relays"], "another agent has none")


def test_bad_anticipations(scene: Scene) -> None:
    """Of a transfer that is its own, of one that never was, and of the neighbour's."""
    deployment, hostile = scene
    live = wait_for(lambda: deployment.call("connections")["connections"], "the neighbour has something out")
    one = {"request": "GET", "head": "x", "path": "../secret", "offset": 0, "count": 5, "size": 5, "mtime_ns": 5}
    bodies = (b"", b"[", b"[5]", json.dumps([{**one, "count": -1}]).encode(), json.dumps([one] * 33).encode())
    for body in bodies:
        hostile.say({"type": "anticipate", "token": live[0]["token"], "first": 0, "more": False, "everything": True}, body)
    hostile.say({"type": "anticipate", "token": live[0]["token"], "first": 0, "more": False, "everything": "?"}, b"[]")
    expect(deployment, "bad_request", len(bodies) + 1)
    for token in (live[0]["token"], "0" * 32):
        header = {"type": "anticipate", "token": token, "first": 0, "more": False, "everything": True}
        hostile.say(header, json.dumps([one]).encode())


def test_replies_to_requests_never_made(scene: Scene) -> None:
    deployment, hostile = scene
    kinds = ("restored", "restore_failed", "late")
    for kind in kinds:
        hostile.say({"type": kind, "token": os.urandom(16).hex(), "message": "x" * 1000})
    expect(deployment, "unknown_transfer", len(kinds))
    token = os.urandom(16).hex()
    hostile.say({"type": "resume", "token": token, "age": -1, "frozen": "yes"})
    assert hostile.hear("refused", token=token)["reason"] == "host_lost"
    for kind in ("standing_by", "abort"):
        hostile.say({"type": kind, "token": os.urandom(16).hex()})
    assert hostile.offer("missing")["reason"] == "no_such_file"


def test_late_packets_are_its_own(scene: Scene) -> None:
    """Packets that it asks to be put on the road carry its own address, and must be packets."""
    deployment, hostile = scene
    offered = hostile.snapshot()
    token = os.urandom(16).hex()
    message, body = hand_out(token, "file", offered)
    hostile.say(message, body)
    hostile.hear("taken", token=token)
    for bad in (b"\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\5hello", (20).to_bytes(4, "big") + bytes(10)):
        before = refusals(deployment).get("bad_request", 0)
        hostile.say({"type": "late", "token": token}, bad)
        expect(deployment, "bad_request", before + 1)
    hostile.say({"type": "late", "token": token}, b"".join((20).to_bytes(4, "big") + bytes(20) for _ in range(5000)))
    assert hostile.offer("missing")["reason"] == "no_such_file"


def test_flood(scene: Scene) -> None:
    """It is read at the pace that the operator allows; the host's memory does not grow with what it says."""
    deployment, hostile = scene
    memory = deployment.status()["memory_bytes"]
    frame = encode_frame(hostile.session.peer_nonce, {"type": "late", "token": "0" * 32}, bytes(1000))
    hostile.channel.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        for _ in range(20_000):
            hostile.channel.sendall(frame)
    expect(deployment, "flood")
    assert deployment.status()["memory_bytes"] < memory + (16 << 20)


def test_channel_comes_and_goes(scene: Scene) -> None:
    deployment, hostile = scene
    files = _descriptors(deployment)
    for _ in range(20):
        hostile.connect()
        assert hostile.offer("../secret")["reason"] == "outside_share"
    wait_for(lambda: _descriptors(deployment) <= files + 8, "no descriptor is left")  # the neighbour's transfers have some


def _descriptors(deployment: Deployment) -> int:
    return len(list(Path(f"/proc/{deployment.status()['pid']}/fd").iterdir()))
