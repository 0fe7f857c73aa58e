"""Endpoints of FUSE exports: the supervisor mounts a FUSE file for each, and unmounts it.

The supervisor mounts the file, answers INIT and keeps the descriptor of the connection: requests wait in the kernel
while no worker serves. A file for which the user names no path is mounted in the run directory under a fixed name; a
link with the name of the device refers to it, because a mount cannot be renamed. Calls that may wait run on threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec

from blkloom.control.states import ExportState, Role
from blkloom.errors import MountError, UsageError
from blkloom.export.fuse.mountinfo import mounted_at
from blkloom.export.fuse.state import FuseDetails, FuseOptions
from blkloom.export.fuse.uring import check_available, not_available

if TYPE_CHECKING:
    from blkloom.control.messages import AddExport
    from blkloom.control.rundir import RunDir

_log = logging.getLogger(__name__)

DEVICE: Final = "device"
"""Key of the connection's descriptor."""
RECORD: Final = "record"
"""Key of a memfd in which the engine records changes of owner and mode."""
FIRST_MODE: Final = 0o600
NO_RESEND: Final = "this kernel cannot send requests again (FUSE_NOTIFY_RESEND, Linux 6.9)"


class FuseEndpoints:
    """See `export.exporter.Endpoints`."""

    role: ClassVar[Role] = "export"
    may_be_busy: ClassVar[bool] = True

    def automatic(self, run_dir: RunDir, device: str) -> ExportState | None:
        """Returns None: there is no automatic FUSE file."""
        return None

    def wanted(self, run_dir: RunDir, device: str, call: AddExport) -> ExportState:
        """The state for a call; without a path, of the file in the run directory. Raises UsageError."""
        if call.path and not os.path.isabs(call.path):
            raise UsageError(f"{call.path}: the path of a file must be absolute", cure="begin it with /")
        try:
            options = msgspec.convert(call.options, FuseOptions)
        except msgspec.ValidationError as error:
            raise UsageError(f"options of a FUSE file: {error}", cure="see blkloom.export.fuse.state") from error
        if options.allow_other and not call.path:
            what = f"other users cannot reach a file in {run_dir.files}"
            raise UsageError(what, cure="name a path that they can reach: --fuse PATH --allow-other")
        details = details_for(call.path or str(run_dir.mounts / os.urandom(6).hex()), options)
        state = ExportState(
            id="",
            name=device,
            kind="fuse",
            path=call.path or str(run_dir.file(device)),
            read_only=call.read_only,
            automatic=not call.path,
        )
        details.put(state)
        return state

    async def open(self, state: ExportState, *, allow_remote: bool) -> dict[str, int]:
        """Mounts the file. Raises MountError."""
        return await asyncio.to_thread(open_file, state)

    def survives(self, state: ExportState) -> bool:
        """True if the kernel can resend the requests that a killed worker has read."""
        return FuseDetails.of(state).survives

    def moves(self, state: ExportState) -> bool:
        """True unless the requests come over io_uring."""
        return not FuseDetails.of(state).uring

    async def close(self, state: ExportState, *, force: bool) -> None:
        """Unmounts the file. Raises MountError: EBUSY while the file is open, unless `force`."""
        await asyncio.to_thread(close_file, state, force=force)

    def is_gone(self, state: ExportState) -> bool:
        """Whether the file was unmounted."""
        return not is_mounted(FuseDetails.of(state))

    def give_up(self, state: ExportState) -> None:
        """Makes all requests to the mount fail (ENOTCONN): a worker that was killed and cannot end has descriptors."""
        from blkloom.export.fuse.mount import Mount, abort

        details = FuseDetails.of(state)
        if is_mounted(details) and not abort(Mount(details.mounted), details.number):
            _log.warning("%s: its users wait as long as a former worker has it open", state.path)

    def rename(self, state: ExportState, run_dir: RunDir, device: str) -> None:
        """Renames the link. Raises OSError."""
        path = str(run_dir.file(device))
        with contextlib.suppress(FileNotFoundError):
            os.rename(state.path, path)
        state.path, state.name = path, device

    def reap(self, run_dir: RunDir, exports: Collection[ExportState], *, alone: bool) -> Iterator[str]:
        """Removes mounts without a server, and links to files that do not exist. Raises MountError, OSError."""
        from blkloom.export.fuse.mount import KIND, Mount, answers, unmount

        used = {FuseDetails.of(export).mounted for export in exports}
        for path in sorted(run_dir.mounts.iterdir()):
            if str(path) in used:
                continue
            found = mounted_at(str(path))
            if found is not None and (found.kind != KIND or answers(str(path)) is not False):
                continue
            if found is not None:
                unmount(Mount(str(path)), lazy=True)
            if found is not None or alone:  # otherwise a mount on it may be in progress
                path.unlink(missing_ok=True)
                yield f"mount {path}"
        links = {export.path for export in exports}
        for path in sorted(run_dir.files.iterdir()):
            if str(path) in links or mounted_at(to := os.readlink(path)):  # it may have no server
                continue
            if not os.path.lexists(to):
                path.unlink(missing_ok=True)
                yield f"link {path}"


def details_for(mounted: str, options: FuseOptions) -> FuseDetails:
    """The state of a file that is to be mounted at a path."""
    owner = (
        os.geteuid() if options.user is None else options.user,
        os.getegid() if options.group is None else options.group,
        FIRST_MODE if options.mode is None else options.mode,
    )
    return FuseDetails(owner=owner, allow_other=options.allow_other, uring=options.uring, mounted=mounted)


def open_file(state: ExportState) -> dict[str, int]:
    """Mounts the file, answers INIT and updates `state`. Returns the descriptors by key. Raises MountError."""
    from blkloom import _engine
    from blkloom.export.fuse.mount import mount, unmount

    details = FuseDetails.of(state)
    if details.uring:
        check_available(state.path)
    mounted, device = mount(
        details.mounted, source=state.name, allow_other=details.allow_other, read_only=state.read_only
    )
    descriptors = {DEVICE: device}
    try:
        negotiated = _engine.fuse_init(device, uring=details.uring)
        if details.uring and not _engine.fuse_is_over_uring(negotiated):
            raise not_available(state.path)
        descriptors[RECORD] = os.memfd_create("blkloom-fuse-record", os.MFD_CLOEXEC)
        if state.automatic:
            _link(state.path, mounted.path)
    except BaseException as error:
        for descriptor in descriptors.values():
            os.close(descriptor)
        unmount(mounted, lazy=True)
        if isinstance(error, OSError) and not isinstance(error, MountError):
            what = f"cannot be served: {error.strerror or error}"
            raise MountError(what, path=state.path, errno=error.errno or errno.EIO) from error
        raise
    details.mounted, details.made = mounted.path, mounted.made or details.made
    found = mounted_at(mounted.path)
    details.number = found.number if found else ""
    details.negotiated, details.survives = negotiated.hex(), _engine.fuse_can_resend(negotiated)
    details.put(state)
    if not (details.survives or details.uring):
        _log.warning("%s does not survive a worker that is killed: %s", state.path, NO_RESEND)
    return descriptors


def close_file(state: ExportState, *, force: bool) -> None:
    """Unmounts the file, and removes the files made for it. force: also while it is open; root also has all waiting
    requests fail, because the worker may not answer. Raises MountError.
    """
    from blkloom.export.fuse.mount import Mount, answers, remove_file, unmount
    from blkloom.export.fuse.users import users_of

    details = FuseDetails.of(state)
    mounted = Mount(details.mounted, details.made)
    if not is_mounted(details):
        remove_file(mounted)
    else:
        try:
            unmount(mounted, lazy=force or answers(mounted.path) is False, abort=force)
        except MountError as error:
            if not is_mounted(details):  # a user has done so
                remove_file(mounted)
            elif error.errno != errno.EBUSY:
                raise
            else:
                users = ", ".join(users_of(mounted.path)) or f"`fuser -m {mounted.path}` tells by whom"
                cure = "close it first, or use --force: requests of its users fail then"
                raise MountError(f"is open ({users})", path=state.path, errno=errno.EBUSY, cure=cure) from error
    if state.automatic:
        with contextlib.suppress(OSError):
            if os.readlink(state.path) == mounted.path:
                os.unlink(state.path)


def is_mounted(details: FuseDetails) -> bool:
    """Whether this file is mounted, and not another file system in its place."""
    from blkloom.export.fuse.mount import KIND

    found = mounted_at(details.mounted)
    return found is not None and (found.kind, found.number) == (KIND, details.number)


def _link(path: str, to: str) -> None:
    """Makes a link, also in place of a stale one. Raises MountError."""
    if os.path.lexists(path) and not os.path.islink(path):
        raise MountError("exists and is no link", path=path, errno=errno.EEXIST, cure="move it away")
    aside = f"{to}.link"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(aside)
    os.symlink(to, aside)
    os.replace(aside, path)
