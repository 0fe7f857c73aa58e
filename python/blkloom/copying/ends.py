"""The two ends of a copy: what a path, a table or a server is, and how a new target is made.

An end is described here without being opened for I/O, except for a new target, which is made: empty, claimed against
other programs meanwhile. May fail: BackingError, BusyError, UsageError, OSError.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import msgspec

from blkloom import open_files
from blkloom.copying.lower import Number, below, number_of
from blkloom.device.open_device import whole_file
from blkloom.errors import BackingError, UsageError
from blkloom.image.registry import FORMATS, format_named, format_of_name, looks_like
from blkloom.table import Table
from blkloom.targets.claim import Claim
from blkloom.units import format_size, round_up_to_sector, to_bytes

_NAMES = ("device", "server")
"""Parts of an identity that nothing else has."""
Part = Number | str
"""What an end is made of: a file, a block device, or a device of a supervisor by its part of the identity."""


class End(msgspec.Struct, frozen=True, kw_only=True):
    """An end of a copy. name: for messages. table: of a device with its contents. size: bytes. identity: what tells it
    from others, in a journal. path: of the file or block device, "" for neither. format: raw or that of an image. file:
    a regular file. number: of the file or block device. below: all that is below it, so far as that is known:
    files, block devices and devices of a supervisor.
    """

    name: str
    table: Table
    size: int
    identity: dict[str, Any]
    path: str = ""
    format: str = "raw"
    file: bool = False
    number: Number | None = None
    below: frozenset[Part] = frozenset()

    @property
    def itself(self) -> frozenset[Part]:
        """The numbers and names of the file, block device, device of a supervisor or server."""
        names = [self.identity[name] for name in _NAMES if name in self.identity]
        return frozenset([*names, *([] if self.number is None else [self.number])])


def file_end(
    path: str,
    *,
    name: str = "",
    format: str = "auto",
    option: str = "--source-format",
    contents: bool = True,
    allow_backing: Iterable[str] = (),
    device: str = "",
) -> End:
    """The file, block device or image at `path`. format: auto: by the name, checked against the contents. option: that
    says the format, for messages. contents: its time of change is a part of its identity. device: of a
    supervisor, of which `path` is a node or file. Raises BackingError,
    UsageError.
    """
    status = _status(path)
    name = name or path
    form = _format(path, format, option)
    table = whole_file(path, format=form, allow_backing=allow_backing)
    is_file = stat.S_ISREG(status.st_mode)
    size = int(to_bytes(table.segments[-1].end)) if table.segments else 0
    if is_file and form == "raw":
        size = status.st_size
    identity: dict[str, Any] = {"path": os.path.realpath(path), "format": form}
    if device:
        identity = {"device": device}
    elif is_file:
        identity |= inode_at(path)
    if contents:
        identity["size"] = size
        if is_file and not device:
            identity["changed"] = status.st_mtime_ns
    return End(
        name=name,
        table=table,
        size=size,
        identity=identity,
        path=path,
        format=form,
        file=is_file and not device,
        number=number_of(status),
        below=below(number_of(status)),
    )


def table_end(name: str, table: Table, identity: dict[str, Any]) -> End:
    """An end that is a table: a server, for example."""
    size = int(to_bytes(table.segments[-1].end)) if table.segments else 0
    return End(name=name, table=table, size=size, identity=identity | {"size": size})


def _status(path: str) -> os.stat_result:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None) or errno.EINVAL
        raise BackingError(os.strerror(number), path=path, errno=number, cure="check the path") from error
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        raise BackingError(
            "must be a regular file or a block device",
            path=path,
            errno=errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL,
            cure="pipes and directories cannot be copied",
        )
    return status


def inode_of(descriptor: int) -> dict[str, Any]:
    """The part of an identity that tells a file from others, also from a later one with the same inode number."""
    return {"inode": os.fstat(descriptor).st_ino, "generation": open_files.generation(descriptor)}


def inode_at(path: str) -> dict[str, Any]:
    """The same of the file at a path. Raises BackingError."""
    try:
        descriptor = open_files.open_file(path, writable=False)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        return inode_of(descriptor)
    finally:
        os.close(descriptor)


def _unreadable(path: str, error: OSError) -> BackingError:
    what = f"could not be opened: {error.strerror}"
    return BackingError(what, path=path, errno=error.errno or errno.EIO, cure="allow reading")


def _format(path: str, format: str, option: str) -> str:
    """The format of an existing file. A name decides, not the contents: a guest can write the header of an image into
    its raw disk. But a file that looks like an image and is not named like one is refused.
    """
    if format != "auto":
        return format
    if (form := format_of_name(path)) != "raw":
        return form
    try:
        descriptor = open_files.open_file(path, writable=False)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        found = looks_like(descriptor)
    finally:
        os.close(descriptor)
    if found is None:
        return "raw"
    known = f"{option} {found.lower()} copies the disk in it, " if found.lower() in FORMATS else ""
    raise UsageError(
        f"{path} looks like a {found} image and is not named like one (a virtual machine could have written that)",
        cure=f"{known}{option} raw the file as it is",
    )


class NewTarget(msgspec.Struct, frozen=True, kw_only=True):
    """A target to make. overwrite: of a file that is not empty, too. size: bytes."""

    path: str
    name: str
    format: str
    size: int
    overwrite: bool = False

    def make(self, made: Callable[[End], None] = lambda _end: None) -> End:
        """Makes the file, or empties it, and gives it its size. made: called with the end before the file is changed.
        Raises BackingError, BusyError, UsageError.
        """
        form = format_of_name(self.path) if self.format == "auto" else self.format
        size = self.size if form == "raw" else int(round_up_to_sector(self.size))  # type: ignore[arg-type]
        start = b"" if form == "raw" else format_named(form).new_image(size)
        try:
            with ExitStack() as stack:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
                descriptor = os.open(self.path, flags, 0o666)
                stack.callback(os.close, descriptor)
                claim = Claim(descriptor, self.path, writable=True)
                stack.callback(claim.release)
                status = os.fstat(descriptor)
                if status.st_size and not self.overwrite:
                    raise exists(self.path)
                identity = {"path": os.path.realpath(self.path), "format": form} | inode_of(descriptor)
                made(
                    End(
                        name=self.name,
                        table=Table(()),
                        size=size,
                        identity=identity,
                        path=self.path,
                        format=form,
                        file=True,
                        number=number_of(status),
                    )
                )
                os.ftruncate(descriptor, 0)  # not before it is noted, which may fail
                if start:
                    _write(descriptor, start)
                else:
                    os.ftruncate(descriptor, size)
        except BackingError:
            raise
        except OSError as error:
            raise BackingError(
                f"could not be made with {format_size(size)}: {error.strerror}",
                path=self.path,
                errno=error.errno or errno.EIO,
                cure=_CURES.get(error.errno or 0, "check the path"),
            ) from error
        return file_end(self.path, name=self.name, format=form, contents=False)


_CURES = {
    errno.ENOSPC: "make room there",
    errno.EFBIG: "its file system has no files of this size",
    errno.EACCES: "allow writing there",
    errno.EROFS: "its file system is read-only",
    errno.EPERM: "this file cannot be emptied; --no-create writes to it as it is",
    errno.EINVAL: "this file cannot be emptied; --no-create writes to it as it is",
}


def exists(path: str) -> UsageError:
    """The error for a target that is a file with contents."""
    return UsageError(
        f"{path} exists and is not empty",
        cure="--force replaces it, --no-create writes to it and keeps its size and format, "
        "--resume continues a copy that was interrupted",
    )


def _write(descriptor: int, data: bytes) -> None:
    view, offset = memoryview(data), 0
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
