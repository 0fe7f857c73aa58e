"""One export of a device over vhost-user in a worker: one virtual machine at a time.

The supervisor has made the listening socket and keeps it: a virtual machine that connects while there is no worker, or
while another one is connected, waits in its backlog. The next virtual machine is accepted only when all requests of the
one before have ended, because it may be the same one, which sends them again. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from blkloom import _engine
from blkloom.control.rundir import RunDir
from blkloom.control.states import ConnectionState, ExportState
from blkloom.errors import BlkloomError, ListenError
from blkloom.export.exporter import Client, Unfinished
from blkloom.export.limited_log import LimitedLog
from blkloom.export.served_export import ServedExport
from blkloom.export.vhost_user import parcel
from blkloom.export.vhost_user.configuration import LARGEST_BLOCK, Disk
from blkloom.export.vhost_user.connection import Connection, readable
from blkloom.export.vhost_user.endpoints import CACHE
from blkloom.export.vhost_user.messages import ProtocolError
from blkloom.export.vhost_user.session import Session
from blkloom.export.vhost_user.write_cache import WriteCache
from blkloom.printing import described

_log = logging.getLogger(__name__)

_LAST_REPLIES: Final = 5.0
"""Seconds for requests in flight to end when the export is removed."""
_RETRY: Final = 1.0
"""Seconds before accept is tried again with no descriptor free: there is no event for that."""


class VhostUserExportServer(ServedExport):
    """See `export.exporter.ExportServer`."""

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
        """Raises ListenError if the socket is missing."""
        if missing := {"", CACHE} - descriptors.keys():
            for descriptor in descriptors.values():
                os.close(descriptor)
            what = f"descriptors of {state.address} were lost: {', '.join(sorted(repr(key) for key in missing))}"
            raise ListenError(what, cure="add the export again", errno=errno.EBADF)
        self._state = state
        self._device = device
        self._engine = engine
        self._on_change = on_change
        self._listening = socket.socket(fileno=descriptors[""])
        self._cache = WriteCache(descriptors[CACHE])
        try:
            self._listening.setblocking(False)
            self._export = _engine.Export(device, name=state.name, read_only=state.read_only)
            self._engine_disk = _engine.VhostUserDisk(self._export, os.fsencode(state.name))
        except BaseException:
            self._listening.close()
            self._cache.close()
            raise
        self._log = LimitedLog(_log, lambda: self._state.path, "front-ends")
        self._session: Session | None = None
        self._late = False
        """Pausing the session took too long; its queues are not served."""
        self._failure = ""
        """Why the session cannot be served here; some of its queues may be."""
        self._task: asyncio.Task[None] | None = None
        """Accepts and serves virtual machines."""
        if not paused:
            self._begin()

    @property
    def connections(self) -> int:
        """1 while a virtual machine is connected."""
        return int(self._session is not None)

    @property
    def descriptors(self) -> dict[str, int]:
        """The listening socket, and the switch of the write cache."""
        return {"": self._listening.fileno(), CACHE: self._cache.descriptor}

    def rename(self, name: str) -> None:
        """Follows the new name of the device if the socket is in the run directory."""
        if self._state.automatic:
            self._state.name = name
            self._state.path = str(RunDir(Path(self._state.path).parents[1]).vhost_socket(name))

    def device_changed(self) -> None:
        """Tells the virtual machine to read size and limits again."""
        if self._session is not None:
            self._session.configuration_changed()

    # moving to another worker

    async def pause(self, timeout: float | None) -> list[Client]:
        """Takes the virtual machine out of the engine; it does not notice. Requests that wait stay in flight."""
        await self._stop()
        if self._session is None:
            return []
        try:
            await self._session.pause(timeout)
        except TimeoutError as error:
            self._late = True
            raise TimeoutError(errno.ETIMEDOUT, self._state.path) from error
        session, self._session, self._failure = self._session, None, ""
        try:
            descriptor, data = parcel.pack(session)
        except BaseException:
            self._session = session
            raise
        return [(ConnectionState(export=self._state.id, number=0), descriptor, Unfinished(initial=data))]

    def go_on(self, clients: Iterable[Client] = ()) -> None:
        """Serves a virtual machine that was paused, here or in another worker, and accepts others after it."""
        try:
            for _, descriptor, unfinished in clients:
                self._session = parcel.unpack(descriptor, unfinished.initial, self._new_session)
                self._session.adopt()
        except (BlkloomError, OSError) as error:
            self._log.error("its virtual machine is disconnected: %s", described(error))
            self._failure = described(error) if self._session is not None else ""
        self._begin()

    async def end(self) -> None:
        """Disconnects the virtual machine, after its requests in flight, and accepts no more."""
        await self._stop()
        self._listening.close()
        if self._session is not None and not await self._session.end(drain=_LAST_REPLIES):
            self._log.error("requests in flight had not ended after %g s", _LAST_REPLIES)
        self._session = None
        self._cache.close()
        self._log.close()

    # serving

    def _begin(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._serve(), name=f"vhost-user {self._state.path}")
            self._task.add_done_callback(self._served)

    async def _stop(self) -> None:
        """Accepts no virtual machine, and handles no request of the present one."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _served(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("%s: serves no virtual machine any more", self._state.path, exc_info=error)

    async def _serve(self) -> None:
        while True:
            if self._session is None:
                self._session = await self._next_session()
                self._on_change()
            reason = await self._run(self._session)
            level = logging.INFO if reason == "left" else logging.ERROR
            self._log.log(level, "the front-end has %s", _past(reason))
            session = self._session
            await session.end(drain=0)
            self._session, self._late, self._failure = None, False, ""
            self._on_change()
            await session.closed()

    async def _run(self, session: Session) -> str:
        """Handles the requests of a session. Returns why it has ended."""
        if self._failure:
            return f"dropped: {self._failure}"
        try:
            if self._late:
                await session.resume()
                self._late = False
            return await session.run()
        except ProtocolError as error:
            return f"dropped: {error}"
        except Exception as error:
            self._log.log(logging.CRITICAL, "a front-end is dropped because of an error of blkloom", error=error)
            return "dropped"

    async def _next_session(self) -> Session:
        while True:
            connected = await self._accepted()
            try:
                return self._new_session(Connection(connected))
            except OSError as error:
                self._log.error("cannot serve a front-end: %s", described(error))
                connected.close()

    async def _accepted(self) -> socket.socket:
        while True:
            try:
                return self._listening.accept()[0]
            except BlockingIOError:
                await readable(self._listening)
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._log.error("cannot accept: %s", described(error))
                await asyncio.sleep(_RETRY)

    def _new_session(self, connection: Connection) -> Session:
        return Session(connection, self._disk, self._cache, self._engine, self._engine_disk, self._log)

    def _disk(self) -> Disk:
        limits = getattr(self._device, "limits", None)
        read_only = self._state.read_only or bool(getattr(self._device, "read_only", False))
        if limits is None:
            return Disk(size=self._device.size, read_only=read_only)
        logical = min(limits.logical, LARGEST_BLOCK)  # drivers know no larger blocks; the engine needs no alignment
        return Disk(
            size=self._device.size,
            logical=logical,
            optimal=limits.optimal,
            discard=limits.discard,
            read_only=read_only,
            raw=bool(getattr(self._device, "is_raw", False)),
        )


def _past(reason: str) -> str:
    return reason if reason == "left" else f"been {reason}"
