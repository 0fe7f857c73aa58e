"""One FUSE export of a device in a worker: the engine serves the descriptor of the FUSE connection.

The supervisor has mounted the file and keeps copies of the descriptors, so requests wait in the kernel while no worker
serves. When another worker continues, the kernel resends the requests that were read but not answered. A kernel that
cannot do so gets them from the hand-over, as bytes. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from blkloom import _engine
from blkloom.control.rundir import RunDir
from blkloom.control.states import ConnectionState, ExportState
from blkloom.errors import ListenError
from blkloom.export import memory_pressure
from blkloom.export.exporter import Client, Unfinished
from blkloom.export.fuse.endpoints import DEVICE, RECORD
from blkloom.export.fuse.state import FuseDetails
from blkloom.export.fuse.uring import FORBIDDEN
from blkloom.export.served_export import ServedExport

_log = logging.getLogger(__name__)
_LAST_REPLIES: Final = 5.0
"""Seconds for requests in flight to end when an export is removed."""


class FuseExportServer(ServedExport):
    """See `export.exporter.ExportServer`. One descriptor of the connection is served, by one event loop."""

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
        """Raises ListenError if a descriptor is missing."""
        self._state = state
        self._engine = engine
        self._descriptors = dict(descriptors)
        self._on_change = on_change
        self._paused = paused
        self._ending = False
        self._resends = self._moves = True
        self._unserved = b""
        self._tokens = itertools.count(1)
        self._transport: _engine.Transport | None = None
        self._ended = asyncio.Event()
        self._notices = _engine.Notices()
        try:
            if missing := {DEVICE, RECORD} - self._descriptors.keys():
                what = f"descriptors of {state.address} were lost: {', '.join(sorted(missing))}"
                raise ListenError(what, cure="add the export again", errno=errno.EBADF)
            details = FuseDetails.of(state)
            negotiated = bytes.fromhex(details.negotiated)
            self._resends = _engine.fuse_can_resend(negotiated)
            self._moves = not details.uring
            self._export = _engine.Export(device, name=state.name, read_only=state.read_only)
            record = self._descriptors[RECORD]
            self._file = _engine.FuseFile(self._export, negotiated, details.owner, record=record)
            if not paused:
                self._serve_first()
        except BaseException:
            self._close()
            raise
        asyncio.get_running_loop().add_reader(self._notices.fileno(), self._take_notices)
        if lacks := memory_pressure.lacks():
            what = f"this process {lacks}: with a file system on it the machine may hang when memory runs out"
            # Only root mounts what is in the file, or has a loop device on it.
            _log.log(logging.WARNING if os.geteuid() == 0 else logging.INFO, "%s: %s", state.path, what)

    @property
    def connections(self) -> int:
        """Number of times that the file is open."""
        return self._file.users

    @property
    def descriptors(self) -> dict[str, int]:
        """The descriptor of the connection, and that of the record of owner and mode."""
        return dict(self._descriptors)

    def rename(self, name: str) -> None:
        """Follows the new name of the device, as the link in the run directory does."""
        if self._state.automatic:
            self._state.name = name
            self._state.path = str(RunDir(Path(self._state.path).parents[1]).file(name))

    def device_changed(self) -> None:
        """Makes the kernel forget size and cached pages. On a thread: the kernel may first write mapped pages to this
        server.
        """
        descriptor = os.dup(self._descriptors[DEVICE])

        def invalidate() -> None:
            try:
                _engine.fuse_invalidate(descriptor)
            except OSError as error:
                _log.error("%s: the kernel could not be told that the device has changed: %s", self._state.path, error)
            finally:
                os.close(descriptor)

        threading.Thread(target=invalidate, name="blkloom-fuse-invalidate", daemon=True).start()

    # moving to another worker

    async def pause(self, timeout: float | None) -> list[Client]:
        """Stops reading requests, and answers those that were begun. Raises ListenError (EBUSY) if they come over
        io_uring: the supervisor closes such a file before a hand-over.
        """
        if not self._moves:
            raise ListenError(f"{self._state.path} is served over io_uring", cure="remove it first", errno=errno.EBUSY)
        self._paused = True
        if self._transport is not None:
            self._transport.detach()
        if not await self._wait(timeout):
            raise TimeoutError(errno.ETIMEDOUT, self._state.path)
        if self._resends:
            return []
        state = ConnectionState(export=self._state.id, number=0)
        return [(state, os.dup(self._descriptors[DEVICE]), Unfinished(initial=self._unserved))]

    def go_on(self, clients: Iterable[Client] = ()) -> None:
        """Reads requests again."""
        self._paused = False
        for _, descriptor, unfinished in clients:
            os.close(descriptor)
            self._unserved = unfinished.initial
        if self._transport is None:
            self._serve_again()

    async def end(self) -> None:
        """Answers the requests in flight, and serves no more. Later requests wait until the supervisor has closed its
        descriptors, too.
        """
        self._ending = True
        if self._transport is not None:
            self._transport.detach()
        if not await self._wait(_LAST_REPLIES):
            _log.error("%s: requests in flight had not ended after %g s", self._state.path, _LAST_REPLIES)
        asyncio.get_running_loop().remove_reader(self._notices.fileno())
        self._close()

    # serving

    def _serve_first(self) -> None:
        """Raises ListenError."""
        try:
            self._serve()
        except OSError as error:
            if self._moves:
                raise
            what = f"{self._state.path} cannot be served over io_uring: {os.strerror(error.errno or errno.EIO)}"
            cure = f"see {FORBIDDEN} and limits of this process, or export it without --fuse-uring"
            raise ListenError(what, cure=cure, errno=error.errno or errno.EIO) from error

    def _serve(self) -> None:
        self._transport = _engine.serve_fuse(
            self._engine,
            self._file,
            self._descriptors[DEVICE],
            self._notices,
            next(self._tokens),
            unserved=self._unserved,
        )
        self._unserved = b""

    def _serve_again(self) -> None:
        """Serves the connection after another worker, or this one, has stopped."""
        try:
            if self._resends:
                _engine.fuse_resend(self._descriptors[DEVICE])
            self._serve()
        except OSError as error:  # it was unmounted meanwhile
            _log.error("%s is not served any more: %s", self._state.path, error)
            self._gone = True
            self._on_change()

    def _take_notices(self) -> None:
        for _, result, error in self._notices.take():
            if isinstance(result, int):
                self._on_change()
                continue
            self._transport = None
            if isinstance(result, _engine.DetachedFuse):
                os.close(result.take_descriptor())
                self._unserved = result.unserved
                if not (self._paused or self._ending):  # it took longer than `pause` has waited
                    self._serve_again()
            else:
                self._gone = result == "unmounted"
                level = logging.INFO if self._ending or self._gone else logging.ERROR
                _log.log(level, "%s: %s", self._state.path, result or os.strerror(error))
            self._ended.set()
            self._on_change()

    async def _wait(self, timeout: float | None) -> bool:
        """Waits until the connection is not served any more, or until the deadline. Returns whether that is so."""
        try:
            async with asyncio.timeout(timeout):
                while self._transport is not None:
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
