"""Kernel NBD devices as the supervisor makes and removes them.

The supervisor makes an empty device with the first sockets, and keeps a copy of the worker's ends. The worker sets the
size and serves. When it ends, the next worker closes those ends and gives the kernel other sockets, as `export_server`
describes. The supervisor keeps no copy of these, so the kernel notices when their worker dies. What may wait runs on
threads.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec

from blkloom.control.states import ExportState, Role
from blkloom.errors import UsageError
from blkloom.export import block_device
from blkloom.export.fuse.users import users_of
from blkloom.export.kernel_nbd.state import (
    KernelNbdDetails,
    KernelNbdOptions,
    another_tag,
    is_of,
    new_tag,
    usual_connections,
)

if TYPE_CHECKING:
    from blkloom.control.messages import AddExport
    from blkloom.control.rundir import RunDir

_BUFFER: Final = 1 << 20
"""Bytes that a socket takes in each direction: several requests of the block layer."""


class KernelNbdEndpoints:
    """See `export.exporter.Endpoints`. Descriptors: the worker's ends of the first sockets; keys "0", "1", ..."""

    role: ClassVar[Role] = "export"
    may_be_busy: ClassVar[bool] = True

    def automatic(self, run_dir: RunDir, device: str) -> ExportState | None:
        """No device has one unasked."""
        return None

    def wanted(self, run_dir: RunDir, device: str, call: AddExport) -> ExportState:
        """The kernel chooses the number. Raises UsageError."""
        if call.path:
            raise UsageError("the kernel chooses the path of an NBD device", cure="give no path")
        try:
            options = msgspec.convert(call.options, KernelNbdOptions)
        except msgspec.ValidationError as error:
            cure = "see blkloom.export.kernel_nbd.state"
            raise UsageError(f"options of a kernel NBD device: {error}", cure=cure) from error
        state = ExportState(id="", name=device, kind="kernel-nbd", read_only=call.read_only)
        connections = options.connections or usual_connections()
        KernelNbdDetails(tag=new_tag(run_dir), timeout=options.timeout, connections=connections).put(state)
        return state

    async def open(self, state: ExportState, *, allow_remote: bool) -> dict[str, int]:
        """Makes the device, or finds the one that was made for it before. Raises AttachError."""
        return await asyncio.to_thread(open_device, state)

    async def close(self, state: ExportState, *, force: bool) -> None:
        """Removes the device. Raises AttachError: EBUSY where it is in use, but for `force`."""
        if not is_there(state):
            return
        if not force:
            await block_device.written_and_unused(state, check_unused)
        await asyncio.to_thread(close_device, state)

    def give_up(self, state: ExportState) -> None:
        """Makes requests fail, on a thread. The next device of this export is another one."""
        given_up = msgspec.structs.replace(state)
        details = KernelNbdDetails.of(state)
        details.tag = another_tag(details.tag)
        details.put(state)
        block_device.remove_on_thread(given_up.path, lambda: close_device(given_up))

    def survives(self, state: ExportState) -> bool:
        """The next worker gives the kernel other sockets."""
        return True

    def moves(self, state: ExportState) -> bool:
        """The sockets are handed over."""
        return True

    def is_gone(self, state: ExportState) -> bool:
        """It was disconnected, and its last user has closed it."""
        return not is_there(state)

    def rename(self, state: ExportState, run_dir: RunDir, device: str) -> None:
        """Its path stays."""
        state.name = device

    def reap(self, run_dir: RunDir, exports: Collection[ExportState], *, alone: bool) -> Iterator[str]:
        """Devices that were made for this run directory. Raises AttachError."""
        from blkloom.export.kernel_nbd.driver import connected, disconnect, path_of

        if not alone:
            return
        used = {KernelNbdDetails.of(export).tag for export in exports}
        for number, tag in connected():
            if is_of(run_dir, tag) and tag not in used:
                disconnect(number)
                yield f"block device {path_of(number)}"


def dead_timeout(state: ExportState) -> int:
    """For how many seconds requests wait while no worker serves the device, before they fail."""
    return max(1, math.ceil(state.recovery_timeout))


def open_device(state: ExportState) -> dict[str, int]:
    """Make the device; `state` learns its path and number. The descriptors by key. Raises AttachError."""
    from blkloom.export.kernel_nbd import driver

    details = KernelNbdDetails.of(state)
    if is_there(state):  # its sockets are dead, as this one is
        ours, other = socket.socketpair()
        other.close()
        return {"0": ours.detach()}
    pairs = [connected_pair() for _ in range(details.connections)]
    try:
        driver.check()
        details.number = driver.connect(
            tag=details.tag,
            flags=driver.READ_ONLY if state.read_only else driver.WRITABLE,
            timeout=details.timeout,
            dead_timeout=dead_timeout(state),
            sockets=[kernels.fileno() for _, kernels in pairs],
        )
    except BaseException:
        for ours, _ in pairs:
            ours.close()
        raise
    finally:
        for _, kernels in pairs:
            kernels.close()
    details.put(state)
    state.path = driver.path_of(details.number)
    return {str(index): ours.detach() for index, (ours, _) in enumerate(pairs)}


def close_device(state: ExportState) -> None:
    """Make all requests fail and remove the device, after its last use. Raises AttachError."""
    from blkloom.export.kernel_nbd.driver import disconnect

    if is_there(state):
        disconnect(KernelNbdDetails.of(state).number)


def check_unused(state: ExportState) -> None:
    """Write what is cached of an unused block device. Raises AttachError (EBUSY) where it is in use."""
    block_device.check_unused(state.path, list(users_of(state.path)))


def is_there(state: ExportState) -> bool:
    """Whether the kernel has the export's device, and not another one of that number."""
    from blkloom.export.kernel_nbd.driver import tag_of

    details = KernelNbdDetails.of(state)
    return details.number >= 0 and tag_of(details.number) == details.tag


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """A worker's end and the kernel's end of a connection."""
    ours, kernels = socket.socketpair()
    for end in (ours, kernels):
        with suppress(PermissionError):  # in the tests of an ordinary user
            end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
    ours.setblocking(False)
    return ours, kernels


_SO_SNDBUFFORCE: Final = 32
"""As SO_SNDBUF, for root beyond net.core.wmem_max."""
