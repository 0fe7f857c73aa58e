"""One NBD export of a device in a worker: a server of its own on one listening socket.

The socket was bound by the supervisor, which keeps it: clients that connect while no worker accepts
wait in its backlog, and its file is the supervisor's to remove. On the event loop only.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from blkloom import _engine
from blkloom.control.rundir import RunDir
from blkloom.control.states import ConnectionState, ExportState
from blkloom.export.nbd.server import NbdServer
from blkloom.export.nbd.session import Agreed, Moving, NbdExport, Unfinished

_LAST_REPLIES: Final = 5.0
"""Seconds in which requests in flight may end, and clients take their replies, when an export is taken away."""


class ServedExport:
    """Accepts on `listening`, and owns it, from the start on. on_change: clients came or went."""

    def __init__(
        self,
        state: ExportState,
        device: _engine.Device,
        engine: _engine.Engine,
        listening: socket.socket,
        on_change: Callable[[], None],
        *,
        paused: bool = False,
    ) -> None:
        """Raises ListenError for a socket that cannot be served, and closes it. paused: until `go_on`."""
        self._state = state
        self._device = device
        self._listening = listening
        self._export = self._made(state)
        self._server = NbdServer(engine, [self._export], on_change=on_change)
        if paused:
            self._server.hold_back()
        try:
            self._server.adopt(listening)
        except BaseException:
            listening.close()
            raise

    @property
    def state(self) -> ExportState:
        """What the supervisor knows of it."""
        return self._state

    @property
    def connections(self) -> int:
        """Clients in transmission."""
        return self._server.serving

    @property
    def descriptor(self) -> int:
        """The listening socket."""
        return self._listening.fileno()

    def stats(self) -> dict[str, Any]:
        """Its counters since it began."""
        return self._export.export.stats()

    def rename(self, name: str) -> None:
        """The device is called `name` now; so is the export that all devices have, and its socket."""
        if not self._state.automatic:
            return
        run_dir = RunDir(Path(self._state.unix).parents[1])
        former = self._export.name
        self._state = ExportState(
            id=self._state.id,
            name=name,
            unix=str(run_dir.device(name)),
            read_only=self._state.read_only,
            automatic=True,
        )
        self._export = NbdExport(name, self._export.export)
        self._server.rename_export(former, self._export)

    async def end_handshakes(self) -> None:
        """Accepts nobody until `go_on`; handshakes have a moment to end."""
        await self._server.end_handshakes()

    async def pause(self, timeout: float | None) -> list[tuple[ConnectionState, Moving]]:
        """Lets every client go, without their noticing: each with its state, but for its number and what is
        unfinished. Raises TimeoutError, which names them, with requests of clients still in flight.
        """
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
                ),
                client,
            )
            for client in moving
        ]

    def go_on(self, clients: Iterable[tuple[ConnectionState, int, Unfinished]] = ()) -> None:
        """Serves these clients, whose descriptors it owns from now on, and accepts."""
        self._server.go_on(
            Moving(
                self._export.name,
                Agreed(state.structured, state.extended, tuple(state.contexts), state.max_payload),
                descriptor,
                unfinished,
            )
            for state, descriptor, unfinished in clients
        )

    async def end(self) -> None:
        """Disconnects the clients, after what is in flight, and listens no more."""
        await self._server.stop(_LAST_REPLIES)

    def _made(self, state: ExportState) -> NbdExport:
        return NbdExport(
            state.name, _engine.Export(self._device, name=state.name, read_only=state.read_only), description=""
        )
