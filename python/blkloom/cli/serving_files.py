"""FUSE files and nodes of `blkloom serve`: made at the start, removed at the end."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

import msgspec
from typing_extensions import override

from blkloom import _engine
from blkloom.attach.private_directory import PrivateDirectory, remove_abandoned
from blkloom.attach.process import in_process
from blkloom.attach.registry import choose
from blkloom.attach.way import NodeSpec, Way
from blkloom.cli.devices import Served
from blkloom.cli.partition_devices import partition_name
from blkloom.cli.serving import FileRequest, NodeRequest
from blkloom.control.rundir import user_runtime
from blkloom.control.states import ExportState, NodeState
from blkloom.device.device import Device
from blkloom.device_names import mangle
from blkloom.errors import DeviceBusy, MountError
from blkloom.export.fuse.endpoints import close_file, details_for, open_file
from blkloom.export.fuse.export_server import FuseExportServer
from blkloom.export.fuse.state import FuseOptions

_log = logging.getLogger("blkloom.serve")
_NO_SCAN = ".no-scan"
"""End of the path of a file whose loop device udev does not scan; `udev/60-blkloom.rules` has it, too."""


class ServedEach(ABC):
    """What is made for each device in `__aenter__`, all or nothing, and removed in `__aexit__`."""

    def __init__(self, served: Served) -> None:
        self._devices = served.devices
        self._partitions = served.partitions

    async def __aenter__(self) -> Self:
        """Raises MountError."""
        try:
            for name, device in self._devices.items():
                await self._serve(name, device)
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._end()

    @abstractmethod
    async def _serve(self, name: str, device: Device) -> None:
        """Makes that of one device."""

    @abstractmethod
    async def _end(self) -> None:
        """Removes all that was made."""


class ServedFiles(ServedEach):
    """Serves the files from `__aenter__` to `__aexit__`, which unmounts them. It unmounts open files too, and logs
    this.
    """

    def __init__(
        self,
        engine: _engine.Engine,
        served: Served,
        files: FileRequest,
    ) -> None:
        super().__init__(served)
        self._engine = engine
        self._files = files
        self._servers: list[FuseExportServer] = []

    @property
    def exports(self) -> dict[str, _engine.Export]:
        """By path."""
        return {server.state.path: server.export for server in self._servers}

    @override
    async def _serve(self, name: str, device: Device) -> None:
        path = os.path.abspath(self._files.path)  # noqa: ASYNC240 - it asks for the working directory only
        whole, number = self._partitions.get(name, (name, 0))
        if len(self._devices) - len(self._partitions) > 1:
            os.makedirs(path, exist_ok=True)
            path = os.path.join(path, mangle(whole))
        path = partition_name(path, number) if number else path
        options = msgspec.convert(self._files.options, FuseOptions)
        self._servers.append(await _serve_file(name, device, self._engine, path, options))

    @override
    async def _end(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            await _end_file(server)


class ServedNodes(ServedEach):
    """Serves nodes from `__aenter__` to `__aexit__`, which removes them, also those in use, and logs this. They are
    made in a private directory, as in a supervisor's run directory.
    """

    def __init__(self, engine: _engine.Engine, served: Served, nodes: NodeRequest) -> None:
        super().__init__(served)
        self._engine = engine
        self._nodes = nodes
        self._directory: PrivateDirectory
        self._way: Way
        self._served: list[tuple[NodeState, FuseExportServer]] = []

    @override
    async def __aenter__(self) -> Self:
        """Makes the nodes, after the removal of what killed servers have left. Raises CannotAttach, AttachError,
        MountError.
        """
        self._way, _ = choose(self._nodes.via, export="fuse")
        for line in await remove_abandoned(user_runtime(os.environ)):
            _log.info("left by a server that was killed, and removed: %s", line)
        self._directory = PrivateDirectory.make(user_runtime(os.environ))
        return await super().__aenter__()

    @property
    def exports(self) -> dict[str, _engine.Export]:
        """By path of the node."""
        return {node.path: server.export for node, server in self._served}

    @override
    async def _serve(self, name: str, device: Device) -> None:
        partitions = any(whole == name for whole, _ in self._partitions.values())
        if self._way.is_block_device and name in self._partitions:  # the kernel makes its node
            return
        run_dir = self._directory.run_dir
        path = self._way.path_of_export(run_dir) or str(run_dir.file(name or "device"))
        if self._way.is_block_device and not self._nodes.scan:
            path += _NO_SCAN
        server = await _serve_file(name, device, self._engine, path, FuseOptions())
        node = NodeState(via=self._way.name, export=server.state.id)
        self._served.append((node, server))
        block = device.limits.logical
        spec = NodeSpec(name=name, block_size=block, read_only=device.read_only, partitions=partitions)
        await self._way.attach(run_dir, node, server.state, spec)
        if partitions and self._way.is_block_device:
            await in_process("update_partitions", file=node.path, block_size=block, link="")

    @override
    async def _end(self) -> None:
        served, self._served = self._served, []
        for node, server in served:
            try:
                await self._way.detach(self._directory.run_dir, node, lazy=False)
            except DeviceBusy as error:
                _log.warning("%s: requests of its users fail from now on", error.what)
                await self._way.detach(self._directory.run_dir, node, lazy=True)
            except OSError as error:
                _log.error("%s", error)
            await _end_file(server)
        self._directory.close()


async def _serve_file(
    name: str, device: Device, engine: _engine.Engine, path: str, options: FuseOptions
) -> FuseExportServer:
    state = ExportState(id="file", name=name or os.path.basename(path), kind="fuse", path=path)
    state.read_only = device.read_only
    details_for(path, options).put(state)
    descriptors = await asyncio.to_thread(open_file, state)
    try:
        return FuseExportServer(state, device, engine, descriptors, _nothing)
    except BaseException:
        close_file(state, force=True)
        raise


async def _end_file(server: FuseExportServer) -> None:
    try:
        await asyncio.to_thread(close_file, server.state, force=False)
    except MountError as error:
        if error.errno == errno.EBUSY:
            _log.warning("%s %s: requests of its users fail from now on", error.path, error.what)
            await asyncio.to_thread(close_file, server.state, force=True)
        else:
            _log.error("%s", error)
    await server.end()


def _nothing() -> None:
    """No action: `serve` does not count how often a file is open."""
