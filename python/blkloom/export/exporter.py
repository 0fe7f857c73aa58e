"""The two halves of a kind of export: `Endpoints`, which the supervisor makes, and an `ExportServer` in a worker.

An endpoint is what clients find: a listening socket, a mounted file. The supervisor opens it and keeps its descriptors,
so that it outlives the worker; a worker gets copies of them and serves. A new kind is a package under `export/` with
one class of each, and one line in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import msgspec

if TYPE_CHECKING:
    from blkloom import _engine
    from blkloom.control.messages import AddExport
    from blkloom.control.rundir import RunDir
    from blkloom.control.states import ConnectionState, ExportState, Role


class Unfinished(msgspec.Struct, frozen=True):
    """Unfinished bytes of a client during a hand-over. initial: received, but not served. unsent: replies that the
    client has not read. skipping: see `_engine.Detached`.
    """

    initial: bytes = b""
    unsent: bytes = b""
    skipping: tuple[int, bytes] | None = None


Client = tuple["ConnectionState", int, Unfinished]
"""A client during a hand-over: its state (its number is set later), its descriptor, its unfinished bytes."""


class Endpoints(Protocol):
    """Endpoints of one kind. Runs in the supervisor, on its event loop; opens no device and imports no engine."""

    role: ClassVar[Role]
    """The role of its descriptors in the descriptor store."""
    may_be_busy: ClassVar[bool]
    """Whether `close` is refused while clients use it. It is then called before the worker ends its `ExportServer`."""

    def automatic(self, run_dir: RunDir, device: str) -> ExportState | None:
        """The automatic export of a device of that name. None: this kind has no automatic export."""

    def wanted(self, run_dir: RunDir, device: str, call: AddExport) -> ExportState:
        """The state of the export that a call describes, without an id. Raises UsageError."""

    async def open(self, state: ExportState, *, allow_remote: bool) -> dict[str, int]:
        """Makes the endpoint and sets its address in `state`. Returns the descriptors by key; the caller owns them.
        allow_remote: other hosts may reach it. Raises ListenError, UsageError.
        """

    async def close(self, state: ExportState, *, force: bool) -> None:
        """Removes the socket or file, if it exists. The caller still owns the descriptors, which are open. force: also
        while clients use it. Raises OSError: EBUSY without `force`.
        """

    def give_up(self, state: ExportState) -> None:
        """Makes the endpoint of a failed device, whose descriptors are closed, refuse clients: they must not wait. Does
        not wait. Raises OSError.
        """

    def survives(self, state: ExportState) -> bool:
        """Whether another worker can continue with the descriptors after a worker was killed. If not, they are closed,
        and the endpoint is opened again.
        """

    def moves(self, state: ExportState) -> bool:
        """Whether a worker can hand it over to another one. If not, it is closed before a hand-over, which is refused
        while clients use it, and opened again afterwards.
        """

    def reap(self, run_dir: RunDir, exports: Collection[ExportState], *, alone: bool) -> Iterator[str]:
        """Removes stale sockets and files in the run directory: those of none of `exports`, which are all exports of
        this kind. Yields a line for each. alone: no export is being made at the same time. Any thread; may wait.
        Raises OSError.
        """

    def is_gone(self, state: ExportState) -> bool:
        """Whether a user has removed the socket or file. Any thread; may wait."""

    def rename(self, state: ExportState, run_dir: RunDir, device: str) -> None:
        """Renames an automatic export with its device. The descriptors stay valid. Raises ListenError, OSError."""


class ExportServer(Protocol):
    """One export of a device in a worker. Runs on the event loop. Owns its descriptors."""

    @property
    def state(self) -> ExportState:
        """The state of the export."""

    @property
    def connections(self) -> int:
        """Number of clients."""

    @property
    def descriptors(self) -> dict[str, int]:
        """Its descriptors by key; it still owns them."""

    @property
    def gone(self) -> bool:
        """Whether a user has removed the socket or file: nothing is served any more."""

    def stats(self) -> dict[str, Any]:
        """Counters since its start; see `Export.stats`."""

    def rename(self, name: str) -> None:
        """Follows the new name of the device."""

    def device_changed(self) -> None:
        """Called when another table has become active, perhaps of another size. Does not wait."""

    async def ready(self) -> None:
        """Waits until clients find it, after a start that was not paused. Raises AttachError, ListenError."""

    async def end_handshakes(self) -> None:
        """Accepts no client until `go_on`; clients in their handshake have a short time to end it."""

    async def pause(self, timeout: float | None) -> list[Client]:
        """Takes all clients out of the engine; they do not notice. The caller owns the returned descriptors. timeout:
        seconds for requests in flight to end. Raises TimeoutError, which names clients with requests still in flight.
        """

    def go_on(self, clients: Iterable[Client] = ()) -> None:
        """Serves these clients, owns their descriptors from now on, and accepts new clients."""

    async def end(self) -> None:
        """Disconnects the clients, after their requests in flight, and accepts no more."""


class StartExportServer(Protocol):
    """The constructor of an `ExportServer`."""

    def __call__(
        self,
        state: ExportState,
        device: _engine.Device,
        engine: _engine.Engine,
        descriptors: Mapping[str, int],
        on_change: Callable[[], None],
        *,
        paused: bool = False,
    ) -> ExportServer:
        """Serves at once; if `paused`, from `go_on` on. descriptors: those of `Endpoints.open`; they are closed if this
        raises. on_change: called when clients have connected or left. Raises ListenError.
        """
