"""Base of the export servers of block devices that a driver of the kernel makes. On the event loop only."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING

from blkloom import _engine
from blkloom.errors import ListenError
from blkloom.export import memory_pressure
from blkloom.export.served_export import ServedExport
from blkloom.printing import described

if TYPE_CHECKING:
    from blkloom.control.states import ExportState

_log = logging.getLogger(__name__)


class BlockDeviceServer(ServedExport):
    """The methods of `export.exporter.ExportServer` that are the same for all of them."""

    def __init__(
        self,
        state: ExportState,
        device: _engine.Device,
        engine: _engine.Engine,
        descriptors: Mapping[str, int],
        on_change: Callable[[], None],
        *,
        paused: bool = False,
    ) -> None:
        """Raises ListenError if the descriptors are missing."""
        self._state = state
        self._device = device
        self._engine = engine
        self._descriptors = dict(descriptors)
        self._on_change = on_change
        self._paused = paused
        self._ending = False
        self._tokens = itertools.count(1)
        self._starting: asyncio.Task[None] | None = None
        """Brings the block device up, for the first time or again."""
        self._tasks: set[asyncio.Task[None]] = set()
        if not self._descriptors:
            what = f"the descriptors of {state.address} were lost"
            raise ListenError(what, cure="add the export again", errno=errno.EBADF)
        try:
            self._notices = _engine.Notices()
            self._export = _engine.Export(device, name=state.name, read_only=state.read_only)
            self._open()
        except BaseException:
            self._close()
            raise
        asyncio.get_running_loop().add_reader(self._notices.fileno(), self._take_notices)
        if lacks := memory_pressure.lacks():
            what = f"this process {lacks}: with a file system on it the machine may hang when memory runs out"
            _log.warning("%s: %s", state.path, what)
        if not paused:
            self._starting = self._in_background(self._start(), "it is not served")

    @property
    def connections(self) -> int:
        """None: the driver does not tell who uses the block device."""
        return 0

    @property
    def descriptors(self) -> dict[str, int]:
        """Those of the driver."""
        return dict(self._descriptors)

    def rename(self, name: str) -> None:
        """The device is called `name` now; the block device keeps its path."""

    def device_changed(self) -> None:
        """The driver is told the size, where it can be."""
        self._in_background(self._take_over_size(), "its size cannot be changed")

    async def ready(self) -> None:
        """Waits until the block device is served and has its size. Raises AttachError, ListenError."""
        if self._starting is not None:
            await self._starting

    # of subclasses

    def _open(self) -> None:
        """The part of the constructor that may fail. Raises ListenError."""

    async def _start(self) -> None:
        """Serves the block device. Raises AttachError, ListenError."""

    async def _take_over_size(self) -> None:
        """Tells the driver the size of the device. Raises AttachError."""

    def _take_notices(self) -> None:
        """Notices of the engine have come."""

    # shared

    async def _end_tasks(self) -> None:
        self._ending = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _finish(self) -> None:
        """The last step of `end`."""
        asyncio.get_running_loop().remove_reader(self._notices.fileno())
        self._close()

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _in_background(self, work: Coroutine[None, None, None], what: str) -> asyncio.Task[None]:
        """Starts it, and logs what fails."""

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.error("%s: %s: %s", self._state.path, what, described(error))

        task = asyncio.create_task(work, name=self._state.path)
        self._tasks.add(task)
        task.add_done_callback(done)
        return task
