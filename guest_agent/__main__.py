# SPDX-License-Identifier: Apache-2.0
"""`streamlift-agent`: the command line of the guest's agent."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys

from guest_agent import __version__, manual
from guest_agent.agent import DEFAULT_PORT, DEFAULT_SOCKET, DEFAULT_THRESHOLD, Settings, run
from guest_agent.handoff.backend import NAMES
from guest_agent.install import InstallError, install, uninstall

DESCRIPTION = """
Servers in this guest ask the agent to send files; the agent hands their clients' live TCP connections to the service of the
hypervisor (streamlift(1)), over the virtio port that the VM was given, and takes them back afterwards.

install makes the agent a service of systemd and mounts the share at /srv/share; with --media-port the example media server
serves what is there. uninstall undoes it. run, the default, is what the service does. man prints this page.
"""
EXAMPLES = """
# from the share, as the host's 'streamlift attach' left it there; the example server at port 8080
python3 /srv/share/streamlift-agent.pyz install --media-port 8080
# what systemd runs; here for web servers that run as www-data
streamlift-agent --allow www-data
# remove it
streamlift-agent uninstall
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="streamlift-agent",
        description="hands live TCP connections of this guest's servers to the hypervisor",
        epilog=f"examples:{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command",
        nargs="?",
        default="run",
        choices=("run", "install", "uninstall", "man"),
        help="run the agent (the default), make it a service, remove it, print the manual page",
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
    parser.add_argument("--media-port", type=int, help="install: the example media server too, at this port")
    parser.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"], help="what is logged (%(default)s)"
    )
    parser.add_argument("--version", action="version", version=__version__, help="print the version")
    return parser


def main() -> int:
    """Entry point; the exit status."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.command == "man":
        print(manual.page(parser, description=DESCRIPTION, examples=EXAMPLES), end="")
    elif arguments.command == "run":
        return _run(arguments)
    else:
        return _change(arguments)
    return 0


def _run(arguments: argparse.Namespace) -> int:
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


def _change(arguments: argparse.Namespace) -> int:
    try:
        print(install(arguments.media_port) if arguments.command == "install" else uninstall())
    except InstallError as error:
        print(f"streamlift-agent: {error}\n  {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
