# SPDX-License-Identifier: Apache-2.0
"""A guest that has no share for a while asks what lies there: `guest_agent/look.py` has the words. It is told of what it could open
if the share were there, and of nothing else."""

from __future__ import annotations

import errno
from dataclasses import asdict

from guest_agent.handoff.errors import HandoffError, HostError, Reason
from guest_agent.handoff.wire import Header
from hypervisor_svc.connection import Guest
from hypervisor_svc.policy import Seen, look_at, read_look, read_token


class LookWords:
    """A guest's message, as `guests.py` dispatches it."""

    def on_look(self, guest: Guest, header: Header, body: bytes) -> None:
        """It is always answered; what no correct guest asks is counted, too."""
        token = read_token(header)
        try:
            seen = _look(guest, header)
        except HandoffError as error:
            guest.send({"type": "seen", "token": token, "errno": error.errno or errno.EINVAL})
            if error.reason in (Reason.BAD_REQUEST, Reason.OUTSIDE_SHARE):
                raise
        else:
            guest.send({"type": "seen", "token": token, **asdict(seen)})


def _look(guest: Guest, header: Header) -> Seen:
    path, share = read_look(header), guest.machine.share
    if share is None:
        raise HostError(Reason.NOT_ON_SHARE, "this VM has no share on the host", errno=errno.ENODEV)
    try:
        return look_at(share, path)
    except OSError as error:
        raise HostError(Reason.NO_SUCH_FILE, f"the share {share}: {error.strerror}", errno=errno.EIO) from None
