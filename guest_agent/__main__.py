# SPDX-License-Identifier: Apache-2.0
"""`streamlift-agent`: the command line of the guest's agent."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys

from guest_agent import __version__
from guest_agent.agent import DEFAULT_PORT, DEFAULT_SOCKET, DEFAULT_THRESHOLD, Settings, run
from guest_agent.handoff.backend import NAMES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="streamlift-agent", description="Hands live TCP connections of this guest's servers to the hypervisor."
    )
    parser.add_argument("--port", default=DEFAULT_PORT, help="virtio port, or unix:PATH to listen on (%(default)s)")
    parser.add_argument("--socket", default=DEFAULT_SOCKET, help="where applications ask (%(default)s)")
    parser.add_argument("--share", action="append", default=[], help="mount point of a share (default: all 9p mounts)")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="USER|@GROUP|*",
        help="who may ask, beside root (default: @streamlift)",
    )
    parser.add_argument(
        "--threshold", type=int, default=DEFAULT_THRESHOLD, help="bytes below which a transfer stays local (%(default)s)"
    )
    parser.add_argument(
        "--backend", default="auto", choices=["auto", *NAMES], help="how sockets are moved (default: the module, if it is loaded)"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def main() -> int:
    """Entry point; the exit status."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=arguments.log_level.upper(), format="%(levelname)s %(message)s", stream=sys.stderr)
    settings = Settings(
        port=arguments.port,
        socket=arguments.socket,
        shares=tuple(arguments.share),
        allowed=frozenset(arguments.allow or ["@streamlift"]),
        threshold=arguments.threshold,
        backend=arguments.backend,
    )
    asyncio.run(run(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
