"""Sockets for virtual machines (vhost-user) of `blkloom serve`: made at the start, removed at the end."""

from __future__ import annotations

import os

from typing_extensions import override

from blkloom import _engine
from blkloom.cli.devices import Served
from blkloom.cli.partition_devices import partition_name
from blkloom.cli.serving_files import ServedEach
from blkloom.control.states import ExportState, SocketPermissions
from blkloom.device.device import Device
from blkloom.device_names import mangle
from blkloom.export.vhost_user.endpoints import VhostUserEndpoints
from blkloom.export.vhost_user.export_server import VhostUserExportServer


class ServedMachines(ServedEach):
    """Serves a socket for each device from `__aenter__` to `__aexit__`. path: of the socket; for several devices, of a
    directory. permissions: of the sockets.
    """

    def __init__(self, engine: _engine.Engine, served: Served, path: str, permissions: SocketPermissions) -> None:
        super().__init__(served)
        self._engine = engine
        self._path = os.path.abspath(path)
        self._permissions = permissions
        self._endpoints = VhostUserEndpoints()
        self._servers: list[VhostUserExportServer] = []

    @property
    def exports(self) -> dict[str, _engine.Export]:
        """By path."""
        return {server.state.path: server.export for server in self._servers}

    @override
    async def _serve(self, name: str, device: Device) -> None:
        path = self._path
        whole, number = self._partitions.get(name, (name, 0))
        if len(self._devices) - len(self._partitions) > 1:
            os.makedirs(path, exist_ok=True)
            path = os.path.join(path, mangle(whole))
        path = partition_name(path, number) if number else path
        state = ExportState(
            id="socket", name=name or os.path.basename(path), kind="vhost-user", path=path, socket=self._permissions
        )
        state.read_only = device.read_only
        descriptors = await self._endpoints.open(state, allow_remote=False)
        self._servers.append(VhostUserExportServer(state, device, self._engine, descriptors, _nothing))

    @override
    async def _end(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            await self._endpoints.close(server.state, force=True)
            await server.end()


def _nothing() -> None:
    """No action: `serve` does not count virtual machines."""
