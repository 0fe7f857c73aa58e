"""Sets up, changes and detaches loop devices.

Every change loads a new table and swaps it in, so that clients stay connected. The messages are those of losetup.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import click

from blkloom.cli.attaching import NO_SURVIVAL
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
from blkloom.cli.loop_partitions import remove_unused, update_partitions
from blkloom.cli.partition_devices import beyond, partitions_of, remove_partitions
from blkloom.control.states import DeviceInfo, LoopNotes, NodeOptions
from blkloom.errors import BackingError, BlkloomError, CannotAttach, DeviceExists, NoSuchDevice
from blkloom.image.registry import looks_like
from blkloom.partitions import block_size_of
from blkloom.printing import described
from blkloom.units import Sectors, to_bytes

if TYPE_CHECKING:
    from blkloom.cli.session import Session

_NOT_WRITABLE: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY})
"""Errors of an open for writing after which an open for reading may still succeed."""


@contextmanager
def _failing(task: str) -> Iterator[None]:
    """Turns errors in the block into losetup messages such as "DEVICE: TASK failed"."""
    try:
        yield
    except (BlkloomError, OSError) as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise LoopFailed(f"{task}: {why}", what=described(error)) from error


def warn(text: str) -> None:
    """Prints to standard error."""
    click.echo(f"blkloom: {text}", err=True)


def first_free(session: Session) -> str:
    """The name that `-f` would use."""
    return next(iter(free_names(session)))


def set_up(session: Session, options: LoopOptions, word: str | None, file: str) -> None:
    """Makes a device on `file`. word: its name; None: the first free one. Prints the name with --show."""
    path = backing_path(file)
    session.start()
    name = None if word is None else loop_name(session, word)
    with _setting_up(session, alone="nooverlap" in options):
        _set_up(session, options, name, file, path)


@contextmanager
def _setting_up(session: Session, *, alone: bool) -> Iterator[None]:
    """Context in which a device is searched and made. alone: no other command makes one at the same time. If several
    commands want the same part of a file, one makes the device and the others find it.
    """
    directory = os.open(session.client.run_dir.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(directory)


def _set_up(session: Session, options: LoopOptions, name: str | None, file: str, path: str) -> None:
    sizelimit = options.sizelimit or 0
    offset = options.offset or 0
    if "nooverlap" in options and (used := _used_already(session, options, file, offset, sizelimit)) is not None:
        if name is not None:
            raise LoopFailed(f"{file}: overlapping loop device exists", what=f"it is {used.name}")
        session.client.retain(used.name)
        _show(options, used.info.node.path if used.info.node else used.name)
        return
    read_only = "read-only" in options
    table = LoopTable(Sectors(0), path, offset).with_options(
        mode=options.block_map or ("direct_io" if options.direct_io else ""),
        read_only=read_only,
        block_size=options.block_size,
    )
    with _failing(f"{file}: failed to set up loop device"):
        size = backing_size(path)
        # Before the device exists: later it may lock the file.
        looks_like, gpt_block = _look_at(path, offset, min(size - offset, sizelimit or size))
        if options.block_size is None and gpt_block is not None:
            table = table.with_options(block_size=gpt_block)
        table = replace(table, length=table.size_of(size, sizelimit))
        _check_length(table, size, sizelimit)
        notes = LoopNotes(sizelimit=sizelimit, partscan="partscan" in options, shared="shared" in options)
        try:
            info = _create(session, name, table, notes, options)
        except OSError as error:
            if read_only or error.errno not in _NOT_WRITABLE:
                raise
            info = _create(session, name, table.with_options(read_only=True), notes, options)
            reason = os.strerror(error.errno)
            warn(f"{file}: Warning: cannot be written to ({reason}); the loop device is read-only.")
        place = _attach(session, options, info.name) if _shall_attach(options) else info.name
    _show(options, place)
    _warn_of_format(file, looks_like)
    _warn_of_size(file, min(size - offset, sizelimit or size), table.block_size)
    if notes.partscan:
        (info,) = session.client.info(info.name)
        for warning in update_partitions(session, info, table.block_size):
            warn(f"{info.name}: {warning}")


def _show(options: LoopOptions, place: str) -> None:
    if "show" in options:
        click.echo(place)


def _shall_attach(options: LoopOptions) -> bool:
    """Ordinary users may attach no block devices."""
    return options.attach and os.geteuid() == 0


def _attach(session: Session, options: LoopOptions, name: str) -> str:
    """Makes a node of the device; its path, or its name where this machine has none. Where it fails, the device is
    removed, and the error raised.
    """
    partitions, shared = "partscan" in options, "shared" in options
    try:
        made = session.client.attach(name, block_device=True, partitions=partitions, shared=shared)
    except CannotAttach as error:
        warn(f"{name}: not attached: {error}")
        return name
    except BaseException:
        session.client.remove(name, force=True)
        raise
    if not made.survives:
        warn(f"{name}: Warning: {NO_SURVIVAL}")
    return made.node.path


def _check_length(table: LoopTable, size: int, sizelimit: int) -> None:
    if table.length:
        return
    limit = f" up to a limit of {sizelimit}" if sizelimit else ""
    if size >= (needed := table.offset + table.block_size):
        cure = f"give --sizelimit {table.block_size} or more"
    else:
        cure = f"make it longer (truncate -s {needed})"
    raise BackingError(
        f"no whole block of {table.block_size} bytes from byte {table.offset} on{limit}: it has {size} bytes",
        path=table.path,
        errno=errno.EINVAL,
        cure=cure,
    )


def _look_at(path: str, offset: int, size: int) -> tuple[str | None, int | None]:
    """Detects the image format of the file, and the block size of a GPT in this part of a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return looks_like(descriptor), None

        def read(at: int, length: int) -> bytes:
            data = os.pread(descriptor, length, offset + at)
            return data + bytes(length - len(data))  # the file may have become shorter

        return looks_like(descriptor), block_size_of(size, read)
    finally:
        os.close(descriptor)


def _warn_of_format(file: str, found: str | None) -> None:
    if found == "QCOW2":
        cure = f"for the disk in it: blkloom create NAME {shlex.quote(file)} --format qcow2."
    else:
        cure = "for the disk in it, convert it first: qemu-img convert."
    if found:
        warn(f"{file}: Warning: it looks like a {found} image, and the device is the image file itself; {cure}")


def _warn_of_size(file: str, size: int, block: int) -> None:
    if size % block:
        warn(
            f"{file}: Warning: file does not end on a {block}-byte sector boundary; "
            "the remaining end of the file will be ignored."
        )


def _create(session: Session, name: str | None, table: LoopTable, notes: LoopNotes, options: LoopOptions) -> DeviceInfo:
    """Makes the device under this name, or under the first unused name."""
    for tried in [name] if name is not None else free_names(session):
        try:
            return session.client.create(
                tried,
                table=table.text(),
                source=table.path,
                read_only=table.read_only,
                shared=notes.shared,
                autoclear="autoclear" in options,
                loop=notes,
                node=NodeOptions(scan="no-scan" not in options),
            )
        except DeviceExists:
            if name is not None:
                raise
    raise LoopFailed(f"cannot find an unused loop device: {os.strerror(errno.ENODEV)}")


def _used_already(session: Session, options: LoopOptions, file: str, offset: int, sizelimit: int) -> LoopDevice | None:
    """Finds the device of exactly this part of the file. Raises LoopFailed if a device overlaps it."""
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
    """Updates the device to the present size of its file, and its partitions."""
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
    """Replaces the file of a read-only device by one of the same size (LOOP_CHANGE_FD)."""
    device = find_loop(session, word)
    path = backing_path(file)
    with _failing(f"{word}: change of the backing file failed"):
        table = _table_of(device)
        if not device.info.read_only:
            raise BackingError(
                f"device '{device.name}' can be written to: its contents would change under its clients",
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
    """Changes the I/O mode or the block size of a device."""
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
    """Size in bytes of the file that it has open, even if the file was moved."""
    if device.file is None:
        raise BackingError(
            "the device has no file open", path=device.name, errno=errno.ENXIO, cure=f"blkloom resume {device.name}"
        )
    return device.file.size


def _swap(session: Session, device: LoopDevice, table: LoopTable, *, same_file: bool = True) -> None:
    """Loads and swaps in a table. Clients stay connected; if the table is refused, nothing changes. same_file: use the
    open file, even if the path in the table now leads to another one.
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
    """Detaches devices, each after its partitions; a device in use is removed after its last use. Raises the last
    LoopFailed, and prints the ones before.
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
    """Detaches every loop device."""
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
            return  # it was removed with the last of its partitions
