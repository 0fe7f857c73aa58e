"""Endpoints of NBD exports: the listening sockets, which the supervisor makes and removes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, ClassVar

from blkloom.control.states import ExportState, Role
from blkloom.errors import UsageError
from blkloom.export.nbd.details import NbdDetails
from blkloom.export.nbd.listening import check_path, is_listening, listen_tcp, listen_unix

if TYPE_CHECKING:
    from blkloom.control.messages import AddExport
    from blkloom.control.rundir import RunDir


class NbdEndpoints:
    """See `export.exporter.Endpoints`. One descriptor each: the listening socket, key ""."""

    role: ClassVar[Role] = "listen"
    may_be_busy: ClassVar[bool] = False

    def automatic(self, run_dir: RunDir, device: str) -> ExportState:
        """A Unix socket in the run directory."""
        return ExportState(id="", name=device, unix=str(run_dir.device(device)), automatic=True)

    def wanted(self, run_dir: RunDir, device: str, call: AddExport) -> ExportState:
        """The state for a call; without an address, of the automatic socket. Raises UsageError."""
        details = NbdDetails.parse(call.options)
        if call.unix and call.host:
            raise UsageError("an export listens on a Unix socket or on TCP, not on both", cure="make two exports")
        if call.unix and not os.path.isabs(call.unix):
            raise UsageError(f"{call.unix}: the path of a socket must be absolute", cure="begin it with /")
        if not call.unix and not call.host and not call.port:
            if details != NbdDetails():  # they would not be saved with the device
                what = "the automatic socket has neither TLS nor rules about clients"
                raise UsageError(what, cure="give the export an address: --socket PATH or --listen HOST:PORT")
            export = self.automatic(run_dir, device)
            export.read_only, export.socket = call.read_only, call.socket
            return export
        if not call.unix and not call.socket.is_default:
            raise UsageError("a TCP socket has no owner and no permissions", cure="give them to a Unix socket")
        export = ExportState(
            id="",
            name=call.name or device,
            unix=call.unix,
            host=call.host or ("" if call.unix else "localhost"),
            port=call.port,
            read_only=call.read_only,
            socket=call.socket,
        )
        details.put(export)
        return export

    async def open(self, state: ExportState, *, allow_remote: bool) -> dict[str, int]:
        """Listens, and sets the port in `state`. allow_remote: see `listen_tcp`; TLS that proves who
        every client is allows it, too. Raises ListenError, UsageError.
        """
        if state.unix:
            return {"": listen_unix(state.unix, state.socket).socket.detach()}
        allow_remote |= NbdDetails.parse(state.details).tls.requires_proof
        first, *others = await listen_tcp(state.host, state.port, allow_remote=allow_remote)
        for other in others:
            other.close()
        state.host, state.port = first.socket.getsockname()[:2]
        return {"": first.socket.detach()}

    async def close(self, state: ExportState, *, force: bool) -> None:
        """Removes the file of the socket. Raises OSError."""
        self.give_up(state)

    def is_gone(self, state: ExportState) -> bool:
        """Returns False: users cannot remove a listening socket."""
        return False

    def give_up(self, state: ExportState) -> None:
        """Removes the file of the socket, so that clients do not wait in it. Raises OSError."""
        if state.unix:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(state.unix)

    def survives(self, state: ExportState) -> bool:
        """Returns True: clients that connect meanwhile wait in the socket."""
        return True

    def moves(self, state: ExportState) -> bool:
        """Returns True: clients are handed over."""
        return True

    def reap(self, run_dir: RunDir, exports: Collection[ExportState], *, alone: bool) -> Iterator[str]:
        """Removes sockets on which no process listens."""
        used = {export.unix for export in exports}
        for path in sorted(run_dir.devices.iterdir()):
            if str(path) not in used and not is_listening(path):
                path.unlink(missing_ok=True)
                yield f"socket {path}"

    def rename(self, state: ExportState, run_dir: RunDir, device: str) -> None:
        """Renames the file of the socket; connected clients stay. Raises ListenError, OSError."""
        path = str(run_dir.device(device))
        check_path(path)
        with contextlib.suppress(FileNotFoundError):  # it was removed: as before, no client finds it
            os.rename(state.unix, path)
        state.unix, state.name = path, device
