"""`VhostUserServed`: a device of this process as a socket over vhost-user, served on a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from blkloom import Device
from blkloom.control.states import ExportState
from blkloom.export.vhost_user.endpoints import VhostUserEndpoints
from blkloom.export.vhost_user.export_server import VhostUserExportServer

T = TypeVar("T")


class VhostUserServed:
    """Served from `__enter__` to `__exit__`, by the engine of the device."""

    def __init__(self, path: Path, device: Device, *, read_only: bool = False) -> None:
        self.path = path
        self._device = device
        self._read_only = read_only
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vhost-user")

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self.run(self._start())
        return self

    async def _start(self, descriptors: dict[str, int] | None = None) -> VhostUserExportServer:
        state = ExportState(id="e1", name="disk", kind="vhost-user", path=str(self.path), read_only=self._read_only)
        paused = descriptors is not None
        if descriptors is None:
            descriptors = await VhostUserEndpoints().open(state, allow_remote=False)
        return VhostUserExportServer(state, self._device, self._device.engine, descriptors, lambda: None, paused=paused)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def call(self, function: Callable[[], T]) -> T:
        """Calls a function there."""

        async def called() -> T:
            return function()

        return self.run(called())

    @property
    def server(self) -> VhostUserExportServer:
        """What serves at present."""
        return self._server

    def hand_over(self) -> None:
        """Another server takes over, as another worker does."""
        clients = self.run(self._server.pause(60))
        descriptors = {key: os.dup(descriptor) for key, descriptor in self._server.descriptors.items()}
        former = self._server
        self._server = self.run(self._start(descriptors))
        self.call(lambda: self._server.go_on(clients))
        self.run(former.end())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.run(self._server.end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.path.unlink(missing_ok=True)
