# SPDX-License-Identifier: Apache-2.0
"""What libvirt is asked, and what is made of its answers."""

from __future__ import annotations

import libvirt
import pytest

from hypervisor_svc.migrate import Plan, _progress, explain


def test_flags() -> None:
    plan = Plan(destination="qemu+ssh://b/system", control="/c")
    always = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER
    assert plan.flags(persistent=False) == always
    kept = libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
    assert plan.flags(persistent=True) == always | kept
    more = Plan(destination="x", control="/c", copy_storage=True, unsafe=True)
    assert more.flags(persistent=False) == always | libvirt.VIR_MIGRATE_NON_SHARED_INC | libvirt.VIR_MIGRATE_UNSAFE


def test_parameters() -> None:
    assert Plan(destination="x", control="/c").parameters() == {}
    plan = Plan(destination="x", control="/c", migrate_uri="unix:///m", bandwidth=7)
    assert plan.parameters() == {libvirt.VIR_MIGRATE_PARAM_URI: "unix:///m", libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: 7}


@pytest.mark.parametrize(
    ("stats", "percent"),
    [
        ({}, 0.0),
        ({"data_total": 1000, "data_remaining": 1000, "data_processed": 0}, 0.0),
        ({"data_total": 1000, "data_remaining": 250, "data_processed": 900}, 75.0),
        ({"data_total": 1000, "data_remaining": 0, "data_processed": 1500}, 100.0),
    ],
)
def test_progress(stats: dict[str, int], percent: float) -> None:
    assert _progress(stats)["percent"] == percent


MOUNTED = (
    "internal error: unable to execute QEMU command 'migrate': Migration is disabled when VirtFS export path '/srv' is mounted"
    " in the guest using mount_tag 'streamlift'"
)


@pytest.mark.parametrize(
    ("code", "words", "fault", "hint"),
    [
        (libvirt.VIR_ERR_OPERATION_ABORTED, "migration job: canceled by client", "cancelled", "streamlift migrate tv1"),
        (libvirt.VIR_ERR_INTERNAL_ERROR, MOUNTED, "has the share mounted", "streamlift leave tv1"),
        (libvirt.VIR_ERR_MIGRATE_UNSAFE, "Unsafe migration: ...", "Unsafe", "--unsafe"),
        (libvirt.VIR_ERR_INTERNAL_ERROR, "qemu: cannot initialize fsdev 'x': No such file", "lacks the share", "make the folder"),
        (libvirt.VIR_ERR_NO_CONNECT, "unable to connect to server", "libvirt at qemu+ssh://b", "virsh -c"),
        (libvirt.VIR_ERR_INTERNAL_ERROR, "whatever else", "whatever else", "logs"),
    ],
)
def test_whose_fault_and_what_next(code: int, words: str, fault: str, hint: str) -> None:
    said, next_command = explain(code, words, "tv1", "qemu+ssh://b/system")
    assert fault in said and hint in next_command
