"""NBD servers and supervisors for tests."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from blkloom import Client, Device, Engine, Export, NbdExport, NbdServer
from blkloom.control.own_supervisor import own_supervisor

_T = TypeVar("_T")

_STOP_SECONDS: Final = 60.0


class NbdThread:
    """An NBD server of this process: on a Unix socket, on a thread of its own. Exports come and go. Close it when done.

    engine: serves what clients ask for. path: of the socket. Raises ListenError.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        self.path = path
        self._server = NbdServer(engine)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="NBD server of a test", daemon=True)
        self._thread.start()
        try:
            self._call(self._server.listen_unix(path))
        except BaseException:
            self._end()
            raise

    @contextmanager
    def exported(self, device: Device, name: str, *, read_only: bool = False) -> Iterator[str]:
        """The NBD URI of the device, for clients that connect inside of the block. name: the export's."""
        export = NbdExport(name, Export(device, name=name, read_only=read_only or device.read_only))

        async def add() -> str:
            self._server.add_export(export)
            (uri,) = self._server.uris(name)
            return uri

        async def remove() -> None:
            self._server.remove_export(name)

        uri = self._call(add())
        try:
            yield uri
        finally:
            self._call(remove())

    def close(self) -> None:
        """Clients' requests end, clients are disconnected, the socket is removed."""
        try:
            self._call(self._server.stop())
        finally:
            self._end()

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_STOP_SECONDS)

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def served(device: Device, *, name: str = "disk", read_only: bool = False) -> Iterator[str]:
    """Serves a device of this process over NBD inside of the block; its URI. name: the export's. Clients that are still
    connected afterwards are disconnected. Raises ListenError.
    """
    with tempfile.TemporaryDirectory(prefix="blk") as folder:
        server = NbdThread(device.engine, Path(folder, "nbd.sock"))
        try:
            with server.exported(device, name, read_only=read_only) as uri:
                yield uri
        finally:
            server.close()


@contextmanager
def supervised() -> Iterator[Client]:
    """A client of a supervisor of its own, which has no devices yet. Inside of the block `client.run_dir` is its run
    directory: `client.run_dir.device("NAME")` is the NBD socket of a device, and `Client(client.run_dir.path)` connects
    once more. Afterwards all devices have been removed and all processes have ended. Raises NoSupervisor.
    """
    with own_supervisor() as run_dir, Client(run_dir.path) as client:
        yield client
