"""The exports of one device in a worker, and their clients. Runs on the event loop."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from blkloom import _engine
from blkloom.control.states import ExportState
from blkloom.device.device import Device
from blkloom.errors import BlkloomError, UsageError
from blkloom.export.exporter import Client, ExportServer
from blkloom.export.nbd.export_server import NbdExportServer
from blkloom.export.registry import DEFAULT, endpoints, export_server
from blkloom.stats import without_tails

_log = logging.getLogger(__name__)

_LAST_REPLIES: Final = 5.0
"""Seconds for requests in flight to end when the worker is told to end."""


class DeviceExports:
    """The exports of `device`, by id. name: of the device. on_clients: called when the clients have changed."""

    def __init__(self, device: Device, name: str, engine: _engine.Engine, on_clients: Callable[[], None]) -> None:
        self._device = device
        self._name = name
        self._engine = engine
        self._on_clients = on_clients
        self._servers: dict[str, ExportServer] = {}

    def __iter__(self) -> Iterator[ExportServer]:
        return iter(list(self._servers.values()))

    @property
    def states(self) -> list[ExportState]:
        """The state of each export."""
        return [server.state for server in self]

    @property
    def connections(self) -> int:
        """Clients in transmission."""
        return sum(server.connections for server in self)

    @property
    def gone(self) -> list[str]:
        """Ids of exports that a user has unmounted."""
        return [server.state.id for server in self if server.gone]

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters of each export."""
        return {id: without_tails(server.stats()) for id, server in self._servers.items()}

    def serve(self, state: ExportState, descriptors: Mapping[str, int], *, paused: bool = False) -> None:
        """Adds an export with the descriptors of its endpoint, and owns them. Raises UsageError, ListenError."""
        try:
            if state.id in self._servers:
                raise UsageError(f"device '{self._name}' has an export '{state.id}' already", cure="give it another id")
            start = export_server(state.kind)
        except UsageError:
            for descriptor in descriptors.values():
                os.close(descriptor)
            raise
        self._servers[state.id] = start(state, self._device, self._engine, descriptors, self._on_clients, paused=paused)

    async def ready(self, id: str) -> None:
        """Waits until clients find a new export. Raises AttachError, ListenError; the export is ended then."""
        try:
            await self._servers[id].ready()
        except BaseException:
            await self._servers.pop(id).end()
            raise

    async def unserve(self, id: str) -> None:
        """Disconnects the clients of an export and ends it. Raises UsageError."""
        if id not in self._servers:
            known = ", ".join(f"'{known}'" for known in self._servers) or "none"
            raise UsageError(f"device '{self._name}' has no export '{id}'", cure=f"there are: {known}")
        await self._servers.pop(id).end()

    def reload_tls(self) -> None:
        """Reads the TLS credentials of the exports again. Raises UsageError if none has TLS, or they cannot be used."""
        have_tls, refused = False, None
        for server in self:
            try:
                have_tls |= isinstance(server, NbdExportServer) and server.reload_tls()
            except UsageError as error:  # the others read theirs nevertheless
                refused = refused or error
        if refused is not None:
            raise refused
        if not have_tls:
            cure = "blkloom export DEVICE --listen 10809 --tls=require --tls-psk FILE"
            raise UsageError(f"no export of device '{self._name}' has TLS", cure=cure)

    async def stop_serving(self, id: str) -> None:
        """Like `unserve`, but does nothing if there is no such export."""
        if id in self._servers:
            await self.unserve(id)

    def rename(self, name: str) -> None:
        """Follows the new name of the device."""
        self._name = name
        for server in self:
            server.rename(name)

    def device_changed(self) -> None:
        """Tells clients that size or limits of the device may have changed, where that is possible."""
        for server in self:
            server.device_changed()

    # hand-over

    async def end_handshakes(self) -> None:
        """Accepts no client until `go_on`; clients in their handshake have a short time to end it."""
        await asyncio.gather(*(server.end_handshakes() for server in self))

    async def detach_clients(self, timeout: float | None) -> tuple[list[Client], TimeoutError | None]:
        """Takes all clients out of the engine and numbers them. Waits for requests in flight, at most `timeout`
        seconds; if some have not ended then, also returns the TimeoutError that names their clients.
        """
        clients: list[Client] = []
        late: TimeoutError | None = None
        for paused in await asyncio.gather(*(server.pause(timeout) for server in self), return_exceptions=True):
            if isinstance(paused, TimeoutError):
                late = paused
            elif isinstance(paused, BaseException):
                raise paused
            else:
                clients += paused
        for number, (state, _, _) in enumerate(clients):
            state.number = number
        return clients, late

    async def leave_to_next(self) -> None:
        """Leaves the unanswered requests of exports that outlive this worker to the next one. Logs errors. NBD clients
        connect again instead.
        """
        for server in self:
            if server.state.kind != DEFAULT and endpoints(server.state.kind).survives(server.state):
                try:
                    for _, descriptor, _ in await server.pause(_LAST_REPLIES):
                        os.close(descriptor)
                except (OSError, BlkloomError) as error:
                    _log.error("%s: its requests cannot be left to another worker: %s", server.state.address, error)

    def go_on(self, clients: Sequence[Client]) -> None:
        """Serves these clients, which were detached here or in another worker, and accepts new ones."""
        for id, server in self._servers.items():
            server.go_on([client for client in clients if client[0].export == id])
        for state, descriptor, _ in clients:
            if state.export not in self._servers:
                _log.error("device '%s': a client of its former export '%s' is cut", self._name, state.export)
                os.close(descriptor)

    async def end(self) -> None:
        """Disconnects all clients, after their requests in flight, and ends all exports."""
        servers, self._servers = list(self), {}
        await asyncio.gather(*(server.end() for server in servers))
