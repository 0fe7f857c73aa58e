"""`blkloom.open`: makes a live device from a table or a path, in one call."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping

from blkloom._engine import Engine
from blkloom.device.device import Device
from blkloom.errors import Place
from blkloom.image.registry import disk_size, format_of_name, looks_like
from blkloom.table import Segment, Table, parse_table
from blkloom.targets.holding import SharedFiles
from blkloom.targets.load_context import LoadContext
from blkloom.targets.registry import all_targets, builtin_targets
from blkloom.targets.spec import TargetSpec
from blkloom.units import SECTOR, Bytes, Sectors, round_up_to_sector, to_sectors


def open(
    table_or_path: Table | str | bytes | os.PathLike[str],
    *,
    name: str = "",
    read_only: bool = False,
    direct_io: bool = False,
    targets: Iterable[type[TargetSpec]] = (),
    engine: Engine | None = None,
    devices: Mapping[str, Device] | None = None,
    shared: bool = False,
    fault_timeout: float = 30.0,
) -> Device:
    """Opens a live device.

    table_or_path: a Table; the text of one (it contains a newline, or begins with a number and a
    space: `"0 2048 zero"`); or the path of a file or block device to serve as a whole.
    targets: `TargetSpec` classes that the table may name besides the built-in and the installed ones.
    The other arguments are those of `Device`. Close the device, or use it in a `with` statement.
    Raises TableError, BackingError, BusyError, ResourceError; then nothing stays open.
    """
    if isinstance(table_or_path, Table):
        table = table_or_path
    elif isinstance(table_or_path, str) and is_table_text(table_or_path):
        table = parse_table(table_or_path, targets=all_targets(targets))
    else:
        table = whole_file(table_or_path)
    return Device(
        table,
        engine=engine,
        name=name,
        fault_timeout=fault_timeout,
        read_only=read_only,
        direct_io=direct_io,
        shared=shared,
        devices=devices,
    )


def is_table_text(text: str) -> bool:
    """Whether `open` takes `text` as a table rather than as a path."""
    return "\n" in text or re.match(r"\s*[0-9]+\s", text) is not None


def served_raw(path: str, found: str) -> str:
    """The warning for a file that is served as a raw disk although it begins like an image of the format `found`."""
    if found == "QCOW2":
        cure = "if it is one, name it .qcow2 or say --format qcow2"
    else:
        cure = f"if it is one, convert it first: qemu-img convert -O qcow2 {shlex.quote(path)} disk.qcow2"
    return f"{path} looks like a {found} image and is served as it is (a guest could have written that); {cure}"


def whole_file(
    path: str | bytes | os.PathLike[str],
    *,
    format: str = "auto",
    allow_backing: Iterable[str | os.PathLike[str]] = (),
) -> Table:
    """The table that serves the whole file or block device at `path`. The last sector may be partly in the file. An
    empty file or image is a device of size 0, with a table without segments.

    format: raw: as a raw disk, through the loop target; the name of an image format (`blkloom.image.registry`): the
    disk in the image; auto: by the suffix of the name. allow_backing: directories that names in the image may lead to,
    besides its own. Raises BackingError, and UsageError for an unknown format.
    """
    name = os.fsdecode(path)
    form = format_of_name(name) if format == "auto" else format
    image = form != "raw"
    allowed = tuple(os.path.abspath(folder) for folder in allow_backing)
    context = LoadContext(SharedFiles(), read_only=True, shared=True)
    try:
        file = context.file(name)
        size = disk_size(file.fileno(), name, form) if image else Bytes(file.size)
        if not image and format == "auto" and (found := looks_like(file.fileno())):
            context.warn(served_raw(name, found))
    finally:
        context.close()
    if image:  # QEMU rounds the size of the disk in an image down
        from blkloom.targets.image import ImageSpec

        kind = builtin_targets().find(form)
        assert issubclass(kind, ImageSpec), "targets of formats are"
        target: TargetSpec = kind(name, allow_backing=allowed)
    else:
        from blkloom.targets.loop import Loop

        target = Loop(name, round_up="round_up" if size % SECTOR else "")
        size = round_up_to_sector(size)
    length = to_sectors(size)
    return Table((Segment(Sectors(0), length, target, Place(name)),) if length else ())
