"""One NBD export of a device in a worker: an NBD server on one listening socket.

The supervisor has made the socket and keeps it: clients that connect while no worker accepts wait in its backlog, and
the supervisor removes its file. Runs on the event loop.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from blkloom import _engine
from blkloom.control.rundir import RunDir
from blkloom.control.states import ConnectionState, ExportState
from blkloom.errors import UsageError
from blkloom.export.exporter import Client
from blkloom.export.nbd.details import NbdDetails
from blkloom.export.nbd.server import NbdServer, ServerLimits
from blkloom.export.nbd.session import Agreed, Moving, NbdExport
from blkloom.export.nbd.tls import Tls

_log = logging.getLogger(__name__)
_LAST_REPLIES: Final = 5.0
"""Seconds for requests in flight to end, and for clients to read their replies, when an export is removed."""


class NbdExportServer:
    """See `export.exporter.ExportServer`. Accepts clients from the listening socket among the descriptors."""

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
        """Raises ListenError if the socket cannot be served, and UsageError if its TLS credentials cannot be used."""
        self._state = state
        self._device = device
        self._listening = listening = socket.socket(fileno=descriptors[""])
        try:
            self._details = NbdDetails.parse(state.details)
            self._export = self._made(state)
            tls = Tls(self._details.tls)
            try:
                tls.reload()
            except UsageError as error:
                if not paused:
                    raise
                # The device of another worker goes on. The export refuses clients until a reload.
                _log.error("export '%s': %s", state.name, error)
            limits = ServerLimits(per_host=self._details.per_host)
            self._server = NbdServer(engine, [self._export], limits=limits, on_change=on_change, tls=tls)
            if paused:
                self._server.hold_back()
            self._server.adopt(listening)
        except BaseException:
            listening.close()
            raise

    @property
    def state(self) -> ExportState:
        """The state of the export."""
        return self._state

    @property
    def connections(self) -> int:
        """Clients in transmission."""
        return self._server.serving

    @property
    def descriptors(self) -> dict[str, int]:
        """The listening socket."""
        return {"": self._listening.fileno()}

    @property
    def gone(self) -> bool:
        """False: users cannot remove a listening socket."""
        return False

    def stats(self) -> dict[str, Any]:
        """Counters since its start."""
        return self._export.export.stats()

    def rename(self, name: str) -> None:
        """Follows the new name of the device if this is the automatic export, as its socket does."""
        if not self._state.automatic:
            return
        run_dir = RunDir(Path(self._state.unix).parents[1])
        former = self._export.name
        self._state = msgspec.structs.replace(self._state, name=name, unix=str(run_dir.device(name)))
        self._export = NbdExport(name, self._export.export, access=self._details.access)
        self._server.rename_export(former, self._export)

    def reload_tls(self) -> bool:
        """Reads the credentials of TLS again. Returns whether it has TLS. Raises UsageError."""
        if self._details.tls.mode == "off":
            return False
        self._server.reload_tls()
        return True

    def device_changed(self) -> None:
        """Does nothing: NBD has no message for this."""

    async def ready(self) -> None:
        """It is from the start."""

    async def end_handshakes(self) -> None:
        """Stops accepting clients until `go_on`; handshakes get a short time to end."""
        await self._server.end_handshakes()

    async def pause(self, timeout: float | None) -> list[Client]:
        """Takes all clients out of the engine; they do not notice."""
        moving = await self._server.pause(timeout)
        return [
            (
                ConnectionState(
                    export=self._state.id,
                    number=0,
                    structured=client.agreed.structured,
                    extended=client.agreed.extended,
                    contexts=list(client.agreed.contexts),
                    max_payload=client.agreed.max_payload,
                    read_only=client.agreed.read_only,
                ),
                client.descriptor,
                client.unfinished,
            )
            for client in moving
        ]

    def go_on(self, clients: Iterable[Client] = ()) -> None:
        """Serves these clients, owns their descriptors from now on, and accepts new clients."""
        self._server.go_on(
            Moving(
                self._export.name,
                Agreed(state.structured, state.extended, tuple(state.contexts), state.max_payload, state.read_only),
                descriptor,
                unfinished,
            )
            for state, descriptor, unfinished in clients
        )

    async def end(self) -> None:
        """Disconnects the clients, after their requests in flight, and stops listening."""
        await self._server.stop(_LAST_REPLIES)

    def _made(self, state: ExportState) -> NbdExport:
        export = _engine.Export(self._device, name=state.name, read_only=state.read_only)
        return NbdExport(state.name, export, access=self._details.access)
