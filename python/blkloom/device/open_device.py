"""`blkloom.open`: from a table or a path to a live device, in one call."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from blkloom._engine import Engine
from blkloom.device.device import Device
from blkloom.errors import Place
from blkloom.qcow2.probing import image_length, is_image_name, looks_like_image
from blkloom.table import Segment, Table, parse
from blkloom.target.base import Target
from blkloom.target.holding import HeldFiles
from blkloom.target.opening import Opening
from blkloom.target.registry import all_targets
from blkloom.units import SECTOR, Bytes, Sectors, round_up_to_sector, to_sectors


def open(
    table_or_path: Table | str | os.PathLike[str],
    *,
    name: str = "",
    read_only: bool = False,
    direct_io: bool = False,
    targets: Iterable[type[Target]] = (),
    engine: Engine | None = None,
    devices: Mapping[str, Device] | None = None,
    shared: bool = False,
    fault_timeout: float = 30.0,
) -> Device:
    """Opens a live device.

    table_or_path: a Table; the text of one (it contains a newline, or begins with a number and a
    space: `"0 2048 zero"`); or the path of a file or block device to serve as a whole.
    targets: Target classes the table may name besides the built-in and the installed ones.
    The other arguments are those of `Device`. Close the device, or use it in a `with` statement.
    Raises TableError, BackingError, BusyError, ResourceError; then nothing stays open.
    """
    if isinstance(table_or_path, Table):
        table = table_or_path
    elif isinstance(table_or_path, str) and is_table_text(table_or_path):
        table = parse(table_or_path, targets=all_targets(targets))
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
    """Whether `open` takes `text` for a table rather than for a path."""
    return "\n" in text or re.match(r"\s*[0-9]+\s", text) is not None


def whole_file(
    path: str | os.PathLike[str],
    *,
    format: Literal["auto", "raw", "qcow2"] = "auto",
    allow_backing: Iterable[str | os.PathLike[str]] = (),
) -> Table:
    """The table that serves the file or block device at `path` from its first sector to its last. A sector that a file
    has a part of only counts; an empty file, or image, is a device of size 0, whose table has no segment.

    format: raw: as it is, through the loop target; qcow2: the disk in the image; auto: qcow2 if its name ends like
    an image's (`blkloom.qcow2.probing`). allow_backing: directories that names in the image may lead to
    besides its own. Raises BackingError.
    """
    name = os.fspath(path)
    image = format == "qcow2" or (format == "auto" and is_image_name(name))
    allowed = tuple(os.path.abspath(folder) for folder in allow_backing)
    opening = Opening(HeldFiles(), read_only=True, shared=True)
    try:
        file = opening.file(name)
        size = image_length(file.fileno(), name) if image else Bytes(file.size)
        if not image and format == "auto" and looks_like_image(file.fileno()):
            opening.warn(
                f"{name} looks like a QCOW2 image and is served as it is (a guest could have written that); "
                "name it .qcow2, or say --format qcow2, if it is one"
            )
    finally:
        opening.close()
    if image:  # QEMU rounds the disk in an image down
        from blkloom.target.qcow2 import Qcow2

        target: Target = Qcow2(name, allow_backing=allowed)
    else:
        from blkloom.target.loop import Loop

        target = Loop(name, round_up="round_up" if size % SECTOR else "")
        size = round_up_to_sector(size)
    length = to_sectors(size)
    return Table((Segment(Sectors(0), length, target, Place(name)),) if length else ())
