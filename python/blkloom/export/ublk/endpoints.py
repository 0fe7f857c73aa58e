"""ublk block devices as the supervisor makes and removes them.

The supervisor makes the device and keeps a descriptor of /dev/ublk-control, never one of /dev/ublkcN: the driver lets
another worker serve the device only when no process has that open. A worker starts the block device. When it ends,
requests wait in the driver until the next worker has begun recovery. What may wait runs on threads.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec

from blkloom.control.states import ExportState, Role
from blkloom.errors import AttachError, UsageError
from blkloom.export import block_device
from blkloom.export.fuse.users import users_of
from blkloom.export.ublk.state import OnFailure, UblkDetails, UblkOptions, is_of, new_tag

if TYPE_CHECKING:
    from blkloom.control.messages import AddExport
    from blkloom.control.rundir import RunDir
    from blkloom.export.ublk.driver import Driver
    from blkloom.export.ublk.structures import DeviceInfo, Feature

CONTROL: Final = "control"
"""Key of the descriptor of /dev/ublk-control."""
_MOST_QUEUES: Final = 8
_DEPTH: Final = 64
_MEMORY: Final = 64 << 20
"""Bytes of the buffers of all queues together, at most."""
_LARGEST: Final = 256 << 10
"""Bytes of a read or write, at most."""
_GONE_SECONDS: Final = 5.0
"""For a worker to close the queues of a device that was stopped."""
_STOP_SECONDS: Final = 3.0
"""For requests in flight to end before the block device is removed by force without that."""
_DEVICES: Final = Path("/sys/class/ublk-char")


class UblkEndpoints:
    """See `export.exporter.Endpoints`."""

    role: ClassVar[Role] = "export"
    may_be_busy: ClassVar[bool] = True

    def automatic(self, run_dir: RunDir, device: str) -> ExportState | None:
        """No device has one unasked."""
        return None

    def wanted(self, run_dir: RunDir, device: str, call: AddExport) -> ExportState:
        """The driver chooses the number. Raises UsageError."""
        if call.path:
            raise UsageError("the ublk driver chooses the path of a block device", cure="give no path")
        try:
            options = msgspec.convert(call.options, UblkOptions)
        except msgspec.ValidationError as error:
            raise UsageError(f"options of a ublk device: {error}", cure="see blkloom.export.ublk.state") from error
        state = ExportState(id="", name=device, kind="ublk", read_only=call.read_only)
        UblkDetails(tag=new_tag(run_dir), on_failure=options.on_failure).put(state)
        return state

    async def open(self, state: ExportState, *, allow_remote: bool) -> dict[str, int]:
        """Makes the device, or finds the one that was made for it before. Raises AttachError."""
        return await asyncio.to_thread(open_device, state)

    async def close(self, state: ExportState, *, force: bool) -> None:
        """Removes the block device and the device. Raises AttachError: EBUSY where it is in use, but for `force`."""
        if not force:
            await block_device.written_and_unused(state, check_unused)
        await asyncio.to_thread(close_device, state, force=force)

    def give_up(self, state: ExportState) -> None:
        """Has what waits for a worker fail: the block device is removed, on a thread."""
        block_device.remove_on_thread(state.path, lambda: close_device(state, force=True))

    def survives(self, state: ExportState) -> bool:
        """The next worker begins recovery."""
        return True

    def moves(self, state: ExportState) -> bool:
        """As after a death: the next worker begins recovery when the former has ended."""
        return True

    def is_gone(self, state: ExportState) -> bool:
        """It was removed, or its block device."""
        return not _has_block_device(state)

    def rename(self, state: ExportState, run_dir: RunDir, device: str) -> None:
        """Its path stays."""
        state.name = device

    def reap(self, run_dir: RunDir, exports: Collection[ExportState], *, alone: bool) -> Iterator[str]:
        """Devices that were made for this run directory. Raises AttachError."""
        if not alone or not _is_loaded():
            return
        from blkloom.export.ublk.driver import Driver, open_control, path_of

        used = {UblkDetails.of(export).tag for export in exports}
        control = open_control()
        try:
            for entry in sorted(_DEVICES.glob("ublkc*")):
                number = int(entry.name.removeprefix("ublkc"))
                try:
                    found = Driver(control).find(number)
                except AttachError:  # a device of an ordinary user, which is not ours
                    continue
                if found is not None and is_of(run_dir, found.tag) and found.tag not in used:
                    Driver(control).stop(number)
                    _delete(Driver(control), number)
                    yield f"block device {path_of(number)}"
        finally:
            os.close(control)


def open_device(state: ExportState) -> dict[str, int]:
    """Make the device; `state` learns its path and number. The descriptors by key. Raises AttachError."""
    from blkloom.export.ublk.driver import Driver, open_control, path_of
    from blkloom.export.ublk.structures import NEW, DeviceInfo, Feature

    details = UblkDetails.of(state)
    control = open_control()
    try:
        found = _find(control, details)
        if found is None:
            queues = min(len(os.sched_getaffinity(0)), _MOST_QUEUES)
            flags = _flags(Driver(control).features(), details.on_failure)
            wanted = DeviceInfo(
                queues=queues,
                depth=_DEPTH,
                most_bytes=min(_LARGEST, _MEMORY // (queues * _DEPTH)),
                number=NEW if details.number < 0 else details.number,
                flags=flags,
                tag=details.tag,
            )
            found = _add(Driver(control), wanted)
    except BaseException:
        os.close(control)
        raise
    details.number, details.queues, details.depth = found.number, found.queues, found.depth
    details.most_bytes = found.most_bytes
    details.quiesces = bool(found.flags & Feature.QUIESCE)
    details.put(state)
    state.path = path_of(found.number)
    return {CONTROL: control}


def _flags(features: Feature, on_failure: OnFailure) -> Feature:
    """Of a new device."""
    from blkloom.export.ublk.structures import Feature

    of_failure = Feature.USER_RECOVERY_REISSUE if on_failure == "reissue" else Feature(0)
    return Feature.USER_RECOVERY | of_failure | features & (Feature.QUIESCE | Feature.NO_AUTO_PART_SCAN)


def check_unused(state: ExportState) -> None:
    """Write what is cached of an unused block device. Raises AttachError (EBUSY) where it is mounted, open, or used by
    another device.
    """
    if _has_block_device(state):
        block_device.check_unused(state.path, list(users_of(state.path)))


def close_device(state: ExportState, *, force: bool) -> None:
    """Remove block device and device. force: its requests may wait in a worker, which is asked next to end them. Raises
    AttachError.
    """
    from blkloom.export.ublk.driver import SECONDS, Driver, open_control

    details = UblkDetails.of(state)
    if details.number < 0 or not _is_loaded():
        return
    control = open_control()
    try:
        if _find(control, details) is None:
            return
        try:
            Driver(control).stop(details.number, timeout=_STOP_SECONDS if force else SECONDS)
        except AttachError as error:
            if not (force and error.errno == errno.ETIMEDOUT):
                raise
            return
        _delete(Driver(control), details.number)
    finally:
        os.close(control)


def _is_loaded() -> bool:
    """Whether there is a driver at all: without, there are no devices."""
    return _DEVICES.is_dir()


def _has_block_device(state: ExportState) -> bool:
    from blkloom.export.ublk.driver import open_control
    from blkloom.export.ublk.structures import State

    if not _is_loaded():
        return False
    control = open_control()
    try:
        found = _find(control, UblkDetails.of(state))
        return found is not None and found.state != State.DEAD
    finally:
        os.close(control)


def _find(control: int, details: UblkDetails) -> DeviceInfo | None:
    """The export's device, and not another one of that number."""
    from blkloom.export.ublk.driver import Driver

    found = Driver(control).find(details.number) if details.number >= 0 else None
    return found if found is not None and found.tag == details.tag else None


def _add(driver: Driver, wanted: DeviceInfo) -> DeviceInfo:
    """With another number where another device has that one meanwhile."""
    from blkloom.export.ublk.structures import NEW

    try:
        return driver.add(wanted)
    except AttachError as error:
        if error.errno != errno.EEXIST or wanted.number == NEW:
            raise
        return driver.add(msgspec.structs.replace(wanted, number=NEW))


def _delete(driver: Driver, number: int) -> None:
    """Where a process still has its queues open, it goes when that ends."""
    try:
        driver.delete(number, timeout=_GONE_SECONDS)
    except AttachError as error:
        if error.errno not in {errno.ETIMEDOUT, errno.ENODEV}:
            raise
