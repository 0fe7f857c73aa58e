"""Partitions of loop devices, with losetup's errors: updates them, as devices and in the kernel."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from blkloom.cli import partition_devices
from blkloom.cli.loop_options import LoopFailed
from blkloom.errors import BlkloomError
from blkloom.printing import described

if TYPE_CHECKING:
    from blkloom.cli.session import Session
    from blkloom.control.states import DeviceInfo


def update_partitions(session: Session, whole: DeviceInfo, block: int) -> list[str]:
    """See `partition_devices.update_partitions`; also updates the kernel's partitions of the node. Raises LoopFailed if
    a partition that must change is in use.
    """
    try:
        warnings = partition_devices.update_partitions(session, whole, block)
        if whole.node is not None and whole.node.partitions:
            session.client.scan_partitions(whole.name)
    except BlkloomError as error:
        raise _reread_failed(whole.name, error) from error
    return warnings


def remove_unused(session: Session, whole: str, infos: list[DeviceInfo]) -> None:
    """Removes all of them or none. Raises LoopFailed if one is in use."""
    try:
        partition_devices.remove_unused(session, infos)
    except BlkloomError as error:
        raise _reread_failed(whole, error) from error


def _reread_failed(name: str, error: BlkloomError) -> LoopFailed:
    """The losetup error for partitions that could not be updated."""
    why = os.strerror(error.errno) if error.errno else error.what
    return LoopFailed(f"{name}: failed to reread partitions: {why}", what=described(error))
