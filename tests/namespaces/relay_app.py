# SPDX-License-Identifier: Apache-2.0
"""An application in the guest that uses `offload.publish` in ways that the live server does not; told what to do on its command
line, it prints what it saw as JSON lines.

    udp FILE ADDRESS FIRST_PORT COUNT    a growing file to UDP sinks, until standard input ends
    back_and_forth FILE PORT             one client that is called home and sent out again, entry by entry
    unmovable KIND FILE PORT CERTIFICATE standard input by a file or a ring (KIND) to three clients: of TLS at PORT, of Multipath
                                         TCP at the next, of TCP at the one after
    ring FILE PORT                       standard input by a ring to two clients, in one relay of it after the other"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import sys
from dataclasses import asdict
from typing import IO

from guest_agent import offload

IPPROTO_MPTCP = 262


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


async def standard_input() -> None:
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


async def udp(path: str, address: str, first: int, count: int) -> None:
    with open(path, "rb") as file:
        relay = await offload.publish(file, framing="mpegts", entry_bytes=1316, budget_ms=20, ring_entries=4096)
    sinks = []
    for port in range(first, first + count):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((address, port))
            sinks.append(await relay.add_sink(sock, join="oldest"))
    say(path=relay.path, reason=relay.reason, sinks=len(sinks))
    await standard_input()
    status = await relay.status()
    ending = await relay.remove_sink(sinks[0])
    say(status=status, ending=asdict(ending))
    await relay.close()
    say(left=sum(sink.over for sink in sinks))


async def back_and_forth(path: str, port: int) -> None:
    """The client's words and ours pass between the stays at the host, on the same socket."""
    with open(path, "rb") as file, socket.create_server(("", port)) as listener:
        relay = await offload.publish(file, framing="mpegts", entry_bytes=1316, ring_entries=65536)
        say(path=relay.path, reason=relay.reason)
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        client, _ = await loop.sock_accept(listener)
        client.setblocking(False)
        cursor: int | None = 0
        endings = []
        with client:
            for _ in range(10):
                sink = await relay.add_sink(client, begin=cursor)
                await asyncio.sleep(0.05)
                ending = await relay.remove_sink(sink)
                endings.append(asdict(ending))
                cursor = ending.cursor
                await loop.sock_sendall(client, b"<pause>")
            await loop.sock_sendall(client, b"<end>")
            say(endings=endings, heard=(await loop.sock_recv(client, 100)).decode())
        await relay.close()


async def unmovable(kind: str, path: str, port: int, certificate: str) -> None:
    """Those that the host cannot take are served from here."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        made: IO[bytes] | offload.Ring = offload.Ring(path, size=1 << 20) if kind == "ring" else open(path, "w+b", 0)  # noqa: SIM115
        stack.enter_context(made)
        listeners = [stack.enter_context(_listening(port + 1, IPPROTO_MPTCP)), stack.enter_context(_listening(port + 2, 0))]
        relay = await offload.publish(made)
        ciphers = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ciphers.load_cert_chain(certificate)
        met: asyncio.Future[asyncio.StreamWriter] = loop.create_future()
        server = await asyncio.start_server(lambda _, writer: met.set_result(writer), "", port, ssl=ciphers)
        say(path=relay.path, reason=relay.reason)
        targets: list[offload.Target] = [await met, *[(await loop.sock_accept(one))[0] for one in listeners]]
        for target in targets[1:]:
            target.setblocking(False)  # type: ignore[union-attr]
        made.write(sys.stdin.buffer.read(100_000))
        sinks = [await relay.add_sink(target, join="oldest") for target in targets]
        say(paths=[sink.path for sink in sinks], status=await relay.status())
        while data := await loop.run_in_executor(None, sys.stdin.buffer.read, 20_000):
            made.write(data)
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.3)
        say(endings=[asdict(await relay.remove_sink(sink)) for sink in sinks])
        for target in targets:
            target.close()
        await asyncio.sleep(0.1)
        await relay.close()
        server.close()


def _listening(port: int, protocol: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", port))
    sock.listen()
    sock.setblocking(False)
    return sock


async def ring(path: str, port: int) -> None:
    """Five relays of one ring, one after the other; the file is not open in between."""
    loop = asyncio.get_running_loop()
    with offload.Ring(path, size=1 << 20) as made, socket.create_server(("", port)) as listener:
        listener.setblocking(False)
        say(ready=True)
        clients = [(await loop.sock_accept(listener))[0] for _ in range(2)]
        for client in clients:
            client.setblocking(False)
        cursors: list[int | None] = [0] * len(clients)
        for stay in range(5):
            begin = min(cursor or 0 for cursor in cursors)
            relay = await offload.publish(made, framing="mpegts", entry_bytes=1316 + 188 * stay, offset=begin)
            sinks = [await relay.add_sink(client, begin=cursor) for client, cursor in zip(clients, cursors, strict=True)]
            for _ in range(20):
                made.write(await loop.run_in_executor(None, sys.stdin.buffer.read, 20_000))
                await asyncio.sleep(0.005)
            endings = [await relay.remove_sink(sink) for sink in sinks]
            cursors = [ending.cursor for ending in endings]
            await relay.close()
            made.close()
            say(path=relay.path, reason=relay.reason, cursors=cursors, written=made.position)
        relay = await offload.publish(made, offset=min(cursor or 0 for cursor in cursors))
        sinks = [await relay.add_sink(client, begin=cursor) for client, cursor in zip(clients, cursors, strict=True)]
        made.end()
        say(ended=await relay.over, endings=[asdict(await sink.wait()) for sink in sinks])
        for client in clients:
            client.close()


def main() -> None:
    what, path, *more = sys.argv[1:]
    if what == "udp":
        asyncio.run(udp(path, more[0], int(more[1]), int(more[2])))
    elif what == "unmovable":
        asyncio.run(unmovable(path, more[0], int(more[1]), more[2]))
    elif what == "ring":
        asyncio.run(ring(path, int(more[0])))
    else:
        asyncio.run(back_and_forth(path, int(more[0])))


if __name__ == "__main__":
    main()
