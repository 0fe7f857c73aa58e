"""One ublk block device in a worker: the engine serves its queues.

A new device is started. One that another worker served before is recovered: when the process of that worker has ended,
the driver gives the requests again that it has not answered. A worker that is to be replaced leaves them for the next.
On the event loop only; what waits for the driver runs on threads, because the driver may wait for what the engine
serves.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from blkloom import _engine
from blkloom.errors import AttachError, ListenError, UsageError
from blkloom.export.block_device_server import BlockDeviceServer
from blkloom.export.exporter import Client
from blkloom.export.ublk.driver import Driver, queues_path_of
from blkloom.export.ublk.endpoints import CONTROL
from blkloom.export.ublk.state import UblkDetails
from blkloom.export.ublk.structures import DeviceInfo, Feature, Parameters, State
from blkloom.units import SECTOR

_log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 0.05
"""Between two questions whether the driver has noticed that the former worker has ended: it sends no message."""
_LAST_REPLIES: Final = 5.0
"""Seconds in which requests in flight may end when an export is taken away."""
_QUIESCE_SECONDS: Final = 1.0
"""For a tag of each queue to become free before a hand-over. Without that, the driver gives requests to this process
until it ends, and then to the next one.
"""
_LARGEST_BLOCK: Final = 4096
"""Bytes of a logical block that every kernel takes."""


class UblkExportServer(BlockDeviceServer):
    """See `export.exporter.ExportServer`."""

    def _open(self) -> None:
        self._quiesced = False
        """The driver sends no more requests to this process."""
        self._queues: dict[int, _engine.Transport] = {}
        self._ended = asyncio.Event()
        self._details = UblkDetails.of(self._state)
        self._driver = Driver(self._descriptors[CONTROL])
        self._node = _engine.UblkNode(self._export)

    # moving to another worker

    async def pause(self, timeout: float | None) -> list[Client]:
        """Requests that come from now on wait in the driver, if it can do that; otherwise at the device, which is about
        to be suspended. When this process ends, the driver gives them to the next one.
        """
        self._paused = True
        self._node.leave_unanswered(True)
        if self._details.quiesces and self._queues:
            self._quiesced = True
            try:
                await asyncio.to_thread(self._driver.quiesce, self._details.number, timeout=_QUIESCE_SECONDS)
            except AttachError as error:
                _log.info("%s: requests go to this worker until it ends: %s", self._state.path, error)
        return []

    def go_on(self, clients: Iterable[Client] = ()) -> None:
        """Serves again, or goes on for a worker that has ended or is about to."""
        for _, descriptor, _ in clients:
            os.close(descriptor)
        self._paused = False
        if not self._quiesced:
            self._node.leave_unanswered(False)
        if self._quiesced or (not self._queues and self._starting is None):
            self._starting = self._in_background(self._recover(), "it is not served")

    async def end(self) -> None:
        """Answers what is in flight, and serves no more; of a paused one, leaves that to the next worker."""
        await self._end_tasks()
        if not self._paused:
            for queue in self._queues.values():
                queue.detach()
            if not await self._wait(_LAST_REPLIES):
                _log.error("%s: requests in flight had not ended after %g s", self._state.path, _LAST_REPLIES)
        self._finish()

    # serving

    async def _start(self) -> None:
        """Starts the block device, or recovers it. Raises AttachError, ListenError."""
        number = self._details.number
        found = await asyncio.to_thread(self._driver.find, number)
        if found is None or found.tag != self._details.tag:
            raise AttachError("was removed", path=self._state.path, errno=errno.ENODEV)
        if found.state == State.DEAD:
            if self._device.suspended:
                what = "a suspended device cannot become a block device, which udev reads at once"
                raise AttachError(what, path=self._state.path, errno=errno.EBUSY, cure="resume it first")
            await asyncio.to_thread(self._driver.set_parameters, number, self._parameters())
            # A death of this process while the driver reads the partition table would block the driver for ever.
            self._serve(privileged=Feature.NO_AUTO_PART_SCAN in Feature(found.flags))
            await asyncio.to_thread(self._driver.start, number)
            return
        await self._wait_for_former(found)
        self._serve()
        await asyncio.to_thread(self._driver.end_recovery, number)
        await self._take_over_size()

    async def _recover(self) -> None:
        """As `_start`; where that fails, requests must not wait any longer."""
        try:
            if self._quiesced:  # of a hand-over that has failed: the driver needs the queues to be closed
                for queue in self._queues.values():
                    queue.detach()
                await self._wait(None)
                self._quiesced = False
                self._node.leave_unanswered(False)
            await self._start()
        except (AttachError, ListenError, UsageError):
            self._gone = True
            with suppress(AttachError):
                await asyncio.to_thread(self._driver.stop, self._details.number)
            self._on_change()
            raise

    async def _wait_for_former(self, found: DeviceInfo) -> None:
        """Until the former worker has ended and the driver has taken back what it had. Raises AttachError."""
        try:
            async with asyncio.timeout(self._state.recovery_timeout):
                await _ended(found.server)
                while True:
                    try:
                        await asyncio.to_thread(self._driver.start_recovery, self._details.number)
                    except AttachError as error:
                        if error.errno != errno.EBUSY:
                            raise
                        await asyncio.sleep(_LOOK_SECONDS)
                    else:
                        return
        except TimeoutError as error:
            what = f"its former server, process {found.server}, has not ended for {self._state.recovery_timeout:g} s"
            raise AttachError(what, path=self._state.path, errno=errno.ETIMEDOUT) from error

    def _serve(self, *, privileged: bool = True) -> None:
        """Serves the queues. Only the engine has them open from then on. privileged: see `_engine.serve_ublk`. Raises
        ListenError.
        """
        path = queues_path_of(self._details.number)
        try:
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                for queue in range(self._details.queues):
                    token = next(self._tokens)
                    self._queues[token] = _engine.serve_ublk(
                        self._engine,
                        self._node,
                        device,
                        self._notices,
                        token,
                        queue=queue,
                        depth=self._details.depth,
                        payload=self._details.most_bytes,
                        privileged=privileged,
                    )
            finally:
                os.close(device)
        except OSError as error:
            number = error.errno or errno.EIO
            raise ListenError(f"{path} cannot be served: {os.strerror(number)}", errno=number) from error

    def _parameters(self) -> Parameters:
        limits = getattr(self._device, "limits", None)
        logical, optimal = (limits.logical, limits.optimal) if limits else (SECTOR, _LARGEST_BLOCK)
        if logical > _LARGEST_BLOCK:
            what = f"a ublk device has blocks of {_LARGEST_BLOCK} bytes at most, and this one wants {logical}"
            raise UsageError(what, cure="export it another way")
        block = max(logical, _LARGEST_BLOCK)
        return Parameters(
            size=self._device.size,
            logical=logical,
            physical=block,
            minimum=block,
            optimal=max(optimal, block),
            most_bytes=self._details.most_bytes,
            discard=max(limits.discard, block) if limits else block,
            read_only=self._state.read_only,
            rotational=getattr(self._device, "rotational", False),
        )

    async def _take_over_size(self) -> None:
        """Tells the driver the size of the device, if it has changed. Logs an error where the driver cannot change it:
        the block device is served with its former size. Raises AttachError.
        """
        found = await asyncio.to_thread(_size_of, self._details.number)
        if found == self._device.size // SECTOR or self._ending:
            return
        if not Feature.UPDATE_SIZE & await asyncio.to_thread(self._driver.features):
            what = "keeps its size of %d bytes, the device has %d: this kernel cannot change it (Linux 6.16 can)"
            _log.error(f"%s {what}", self._state.path, found * SECTOR, self._device.size)
            return
        await asyncio.to_thread(self._driver.update_size, self._details.number, self._device.size // SECTOR)

    def _take_notices(self) -> None:
        for token, reason, _ in self._notices.take():
            self._queues.pop(token, None)
            if reason == "removed":
                self._gone |= not self._paused  # the driver returns all tags also when it is quiesced
            elif not (self._ending or self._quiesced):
                _log.error("%s: a queue has ended: %s", self._state.path, reason)
        self._ended.set()
        if self._gone and not self._queues:
            self._on_change()

    async def _wait(self, timeout: float | None) -> bool:
        """Whether it is not served any more by then."""
        try:
            async with asyncio.timeout(timeout):
                while self._queues:
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            return False
        return True


async def _ended(process: int) -> None:
    """Waits for the end of a process, unless it is this one."""
    if process <= 0 or process == os.getpid():
        return
    try:
        pidfd = os.pidfd_open(process)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def _size_of(number: int) -> int:
    """Sectors of the block device."""
    with open(f"/sys/block/ublkb{number}/size", encoding="ascii") as file:
        return int(file.read())
