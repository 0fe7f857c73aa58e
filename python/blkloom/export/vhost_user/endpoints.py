"""Endpoints of exports over vhost-user: the listening sockets, which the supervisor makes and removes."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, ClassVar, Final

from blkloom.control.states import ExportState, Role
from blkloom.errors import ListenError, UsageError
from blkloom.export.nbd.listening import check_path, is_listening, listen_unix
from blkloom.export.vhost_user.write_cache import make_record

if TYPE_CHECKING:
    from blkloom.control.messages import AddExport
    from blkloom.control.rundir import RunDir

CACHE: Final = "cache"
"""Key of the memory of `WriteCache`."""


class VhostUserEndpoints:
    """See `export.exporter.Endpoints`. Descriptors: the listening socket, key "", and the switch of the write cache."""

    role: ClassVar[Role] = "listen"
    may_be_busy: ClassVar[bool] = False

    def automatic(self, run_dir: RunDir, device: str) -> ExportState | None:
        """Returns None: no device is exported over vhost-user unasked."""
        return None

    def wanted(self, run_dir: RunDir, device: str, call: AddExport) -> ExportState:
        """The state for a call; without a path, of the socket in the run directory. Raises UsageError."""
        if call.path and not os.path.isabs(call.path):
            raise UsageError(f"{call.path}: the path of a socket must be absolute", cure="begin it with /")
        if call.options:
            raise UsageError(f"exports over vhost-user have no options, such as {next(iter(call.options))}")
        return ExportState(
            id="",
            name=device,
            kind="vhost-user",
            path=call.path or str(run_dir.vhost_socket(device)),
            read_only=call.read_only,
            automatic=not call.path,
            socket=call.socket,
        )

    async def open(self, state: ExportState, *, allow_remote: bool) -> dict[str, int]:
        """Listens. Raises ListenError."""
        try:
            record = make_record()
        except OSError as error:
            what = f"no memory for the export at {state.address}: {error.strerror}"
            raise ListenError(what, cure="try again", errno=error.errno or errno.ENOMEM) from error
        try:
            return {"": listen_unix(state.path, state.socket).socket.detach(), CACHE: record}
        except BaseException:
            os.close(record)
            raise

    async def close(self, state: ExportState, *, force: bool) -> None:
        """Removes the file of the socket. Raises OSError."""
        self.give_up(state)

    def is_gone(self, state: ExportState) -> bool:
        """Returns False: users cannot remove a listening socket."""
        return False

    def give_up(self, state: ExportState) -> None:
        """Removes the file of the socket, so that virtual machines do not wait in it. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(state.path)

    def survives(self, state: ExportState) -> bool:
        """Returns True: virtual machines that connect again wait in the socket."""
        return True

    def moves(self, state: ExportState) -> bool:
        """Returns True: a virtual machine is handed over."""
        return True

    def reap(self, run_dir: RunDir, exports: Collection[ExportState], *, alone: bool) -> Iterator[str]:
        """Removes sockets on which no process listens."""
        used = {export.path for export in exports}
        for path in sorted(run_dir.vhost_sockets.iterdir()):
            if str(path) not in used and not is_listening(path):
                path.unlink(missing_ok=True)
                yield f"socket {path}"

    def rename(self, state: ExportState, run_dir: RunDir, device: str) -> None:
        """Renames the file of the socket; a connected virtual machine stays. Raises ListenError, OSError."""
        path = str(run_dir.vhost_socket(device))
        check_path(path)
        with contextlib.suppress(FileNotFoundError):
            os.rename(state.path, path)
        state.path, state.name = path, device
