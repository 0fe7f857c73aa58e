"""What `blkloom loop` does to devices: sets them up, changes and detaches them.

Every change is a table that is loaded and swapped in, so that clients stay. The words are losetup's.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import click

from blkloom.cli.loop_devices import (
    LoopDevice,
    LoopTable,
    backing_path,
    backing_size,
    find_loop,
    free_names,
    loop_devices,
    loop_name,
    of_file,
)
from blkloom.cli.loop_options import LoopFailed, LoopOptions
from blkloom.cli.loop_partitions import (
    beyond,
    partitions_of,
    remove_partitions,
    remove_unused,
    update_partitions,
)
from blkloom.control.states import DeviceInfo, LoopNotes
from blkloom.errors import BackingError, BlkloomError, DeviceExists, NoSuchDevice
from blkloom.units import Sectors, to_bytes

if TYPE_CHECKING:
    from blkloom.cli.session import Session

_NOT_WRITABLE: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY})
"""What opening for writing says where reading may yet do."""


@contextmanager
def _failing(task: str) -> Iterator[None]:
    """Errors in the block as losetup tells them, behind "DEVICE: TASK failed" and the like."""
    try:
        yield
    except (BlkloomError, OSError) as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise LoopFailed(f"{task}: {why}", what=str(error)) from error


def warn(text: str) -> None:
    """On standard error."""
    click.echo(f"blkloom: {text}", err=True)


def first_free(session: Session) -> str:
    """The name `-f` would take."""
    return next(iter(free_names(session)))


def set_up(session: Session, options: LoopOptions, word: str | None, file: str) -> None:
    """A device on `file`. word: its name; None: the first that is free. Prints the name with --show."""
    path = backing_path(file)
    session.start()
    sizelimit = options.sizelimit or 0
    offset = options.offset or 0
    name = None if word is None else loop_name(session, word)
    if "nooverlap" in options and (used := _used_already(session, options, file, offset, sizelimit)) is not None:
        if name is not None:
            raise LoopFailed(f"{file}: overlapping loop device exists", what=f"it is {used.name}")
        session.client.retain(used.name)
        _show_name(options, used.name)
        return
    read_only = "read-only" in options
    table = LoopTable(Sectors(0), path, offset).with_options(
        mode=options.block_map or ("direct_io" if options.direct_io else ""),
        read_only=read_only,
        block_size=options.block_size,
    )
    with _failing(f"{file}: failed to set up loop device"):
        size = backing_size(path)
        table = replace(table, length=table.size_of(size, sizelimit))
        _check_length(table, size, sizelimit)
        notes = LoopNotes(sizelimit=sizelimit, partscan="partscan" in options, shared="shared" in options)
        try:
            info = _create(session, name, table, notes, autoclear="autoclear" in options)
        except OSError as error:
            if read_only or error.errno not in _NOT_WRITABLE:
                raise
            info = _create(session, name, table.with_options(read_only=True), notes, autoclear="autoclear" in options)
            reason = os.strerror(error.errno)
            warn(f"{file}: Warning: cannot be written to ({reason}); the loop device is read-only.")
    _show_name(options, info.name)
    _warn_of_size(file, min(size - offset, sizelimit or size), table.block_size)
    if notes.partscan:
        for warning in update_partitions(session, info, table.block_size):
            warn(f"{info.name}: {warning}")


def _show_name(options: LoopOptions, name: str) -> None:
    if "show" in options:
        click.echo(name)


def _check_length(table: LoopTable, size: int, sizelimit: int) -> None:
    if table.length:
        return
    limit = f" up to a limit of {sizelimit}" if sizelimit else ""
    raise BackingError(
        f"no whole block of {table.block_size} bytes from byte {table.offset} on{limit}: it has {size} bytes",
        path=table.path,
        errno=errno.EINVAL,
        cure=f"make it longer (truncate -s {table.offset + table.block_size})",
    )


def _warn_of_size(file: str, size: int, block: int) -> None:
    if size % block:
        warn(
            f"{file}: Warning: file does not end on a {block}-byte sector boundary; "
            "the remaining end of the file will be ignored."
        )


def _create(session: Session, name: str | None, table: LoopTable, notes: LoopNotes, *, autoclear: bool) -> DeviceInfo:
    """Under the name, or the first that nobody has taken by then."""
    for tried in [name] if name is not None else free_names(session):
        try:
            return session.client.create(
                tried,
                table=table.text(),
                source=table.path,
                read_only=table.read_only,
                shared=notes.shared,
                autoclear=autoclear,
                loop=notes,
            )
        except DeviceExists:
            if name is not None:
                raise
    raise LoopFailed(f"cannot find an unused loop device: {os.strerror(errno.ENODEV)}")


def _used_already(session: Session, options: LoopOptions, file: str, offset: int, sizelimit: int) -> LoopDevice | None:
    """The device that has exactly this piece of the file. Raises LoopFailed for one that overlaps."""
    for device in of_file(loop_devices(session), file):
        assert device.table is not None, "it has a file"
        other, limit = device.table.offset, device.notes.sizelimit
        if (other, limit) == (offset, sizelimit):
            if device.info.read_only and "read-only" not in options:
                raise LoopFailed(f"{file}: overlapping read-only loop device exists", what=f"it is {device.name}")
            return device
        if (limit and offset >= other + limit) or (sizelimit and offset + sizelimit <= other):
            continue
        raise LoopFailed(f"{file}: overlapping loop device exists", what=f"it is {device.name}")
    return None


# changes


def set_capacity(session: Session, word: str) -> None:
    """The size its file has now; and its partitions anew."""
    device = find_loop(session, word)
    with _failing(f"{word}: set capacity failed"):
        table, size = _table_of(device), _size_of(device)
        wanted = replace(table, length=table.size_of(size, device.notes.sizelimit))
        _check_length(wanted, size, device.notes.sizelimit)
        if wanted != table:
            if wanted.length < table.length:
                remove_unused(session, device.name, beyond(session, device.name, wanted.length))
            _swap(session, device, wanted)
    if device.notes.partscan:
        (info,) = session.client.info(device.name)
        for warning in update_partitions(session, info, table.block_size):
            warn(f"{device.name}: {warning}")


def change_file(session: Session, word: str, file: str) -> None:
    """Another file of the same size under a read-only device (LOOP_CHANGE_FD)."""
    device = find_loop(session, word)
    path = backing_path(file)
    with _failing(f"{word}: change of the backing file failed"):
        table = _table_of(device)
        if not device.info.read_only:
            raise BackingError(
                f"device {device.name!r} can be written to: its contents would change under its clients",
                path=file,
                errno=errno.EINVAL,
                cure="set it up with --read-only",
            )
        length = table.size_of(backing_size(path), device.notes.sizelimit)
        if length != table.length:
            raise BackingError(
                f"the device would have {to_bytes(length)} bytes, and has {to_bytes(table.length)}",
                path=file,
                errno=errno.EINVAL,
                cure="take a file of the same size",
            )
        _swap(session, device, replace(table, path=path), same_file=False)


def modify(session: Session, options: LoopOptions, word: str) -> None:
    """Another way to the bytes, or another block size."""
    device = find_loop(session, word)
    task = "set block size" if options.block_size is not None else "set direct io"
    with _failing(f"{word}: {task if options.block_map is None else 'set block map'} failed"):
        table = _table_of(device)
        mode = options.block_map
        if options.direct_io is not None:
            mode = "direct_io" if options.direct_io else ""
        wanted = table.with_options(mode=mode, block_size=options.block_size)
        wanted = replace(wanted, length=wanted.size_of(_size_of(device), device.notes.sizelimit))
        if wanted != table:
            _swap(session, device, wanted)


def _table_of(device: LoopDevice) -> LoopTable:
    if device.table is None:
        raise BackingError(
            "the device's table is not that of a loop device any more",
            path=device.name,
            errno=errno.ENXIO,
            cure=f"blkloom load {device.name}",
        )
    return device.table


def _size_of(device: LoopDevice) -> int:
    """Bytes of the file that it has open, wherever that is now."""
    if device.file is None:
        raise BackingError(
            "the device has no file open", path=device.name, errno=errno.ENXIO, cure=f"blkloom resume {device.name}"
        )
    return device.file.size


def _swap(session: Session, device: LoopDevice, table: LoopTable, *, same_file: bool = True) -> None:
    """Clients stay. A table that is refused leaves the device as it was. same_file: the one that is open, wherever the
    table's path leads now.
    """
    client = session.client
    client.load(
        device.name,
        table.text(),
        source=table.path,
        read_only=device.info.read_only,
        shared=device.notes.shared,
        same_files=same_file,
    )
    try:
        client.resume(device.name)
    except BaseException:
        client.clear(device.name)
        raise


# the end


def detach(session: Session, words: Sequence[str]) -> None:
    """Each: its partitions, then itself; what is in use goes with its last user. Raises LoopFailed of the
    last that failed; the others are told before.
    """
    failed: LoopFailed | None = None
    for word in words:
        try:
            _detach(session, find_loop(session, word), word)
        except LoopFailed as error:
            if failed is not None:
                click.echo(failed.text(), err=True)
            failed = error
    if failed is not None:
        raise failed


def detach_all(session: Session) -> None:
    """Every loop device."""
    failed: LoopFailed | None = None
    for device in loop_devices(session):
        try:
            _detach(session, device, device.name)
        except LoopFailed as error:
            if failed is not None:
                click.echo(failed.text(), err=True)
            failed = error
    if failed is not None:
        raise failed


def _detach(session: Session, device: LoopDevice, word: str) -> None:
    with _failing(f"{word}: detach failed"):
        remove_partitions(session, partitions_of(session, device.name), deferred=True)
        try:
            session.client.remove(device.name, deferred=True)
        except NoSuchDevice:
            return  # it went with the last of its partitions
