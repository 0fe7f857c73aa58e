"""The registry of image formats, one per line, and the detection of files of these and of foreign formats.

A format is imported when an image of it is opened. A guest can write a QCOW2 header into a raw image and name any
backing file in it. So the contents of a file given by its path never decide its format: its name does
(`format_of_name`), or an explicit format. Contents only cause a warning (`looks_like`). May fail: OSError,
CorruptImage, UnsupportedImage.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from blkloom.errors import UsageError
from blkloom.units import Bytes

if TYPE_CHECKING:
    from blkloom.image.format import Format


class FormatEntry(NamedTuple):
    """One format. where: "module:class". endings: suffixes of file names that mean this format. magic: first bytes of a
    backing file of this format, for detection. target: its target in tables, "" if that has the name of the format.
    """

    where: str
    endings: tuple[str, ...] = ()
    magic: bytes = b""
    target: str = ""


FORMATS: Final = {
    "qcow2": FormatEntry("blkloom.image.qcow2.driver:Qcow2Format", (".qcow2", ".qcow"), b"QFI\xfb"),
    "raw": FormatEntry("blkloom.image.raw:Raw", target="loop"),
}

PROBED: Final = 72
"""Bytes at the start of a file from which its format is detected."""
_MAGICS: Final = {
    "QCOW2": (0, b"QFI\xfb"),
    "QED": (0, b"QED\0"),
    "VMDK": (0, b"KDMV"),
    "VMDK descriptor": (0, b"# Disk DescriptorFile"),
    "VDI": (64, b"\x7f\x10\xda\xbe"),
    "VDI little-endian": (64, b"\xbe\xda\x10\x7f"),
    "VHDX": (0, b"vhdxfile"),
    "VHD": (0, b"conectix"),
    "Parallels": (0, b"WithoutFreeSpace"),
    "Parallels extended": (0, b"WithouFreSpacExt"),
}
"""Offset and bytes of each format's magic. Sources: block/{qcow2,qed,vmdk,vdi,vhdx,vpc,parallels}.c of QEMU."""


def format_named(name: str) -> Format:
    """The format with that name, as images store it. Raises UsageError."""
    if name not in FORMATS:
        raise UsageError(f"no image format is named '{name}'", cure=f"there are: {', '.join(FORMATS)}")
    module, _, cls = FORMATS[name].where.partition(":")
    return cast("Format", getattr(import_module(module), cls)())


def format_of_name(path: str) -> str:
    """The format for a file name: raw unless its suffix belongs to another format."""
    name = path.lower()
    return next((format for format, entry in FORMATS.items() if name.endswith(entry.endings or ("\0",))), "raw")


def format_of_start(start: bytes) -> str:
    """The format detected from the first bytes of a file."""
    return next((name for name, entry in FORMATS.items() if entry.magic and start.startswith(entry.magic)), "raw")


def looks_like(fd: int) -> str | None:
    """The image format, possibly a foreign one, detected from the start of the file `fd`; None for no known format."""
    return bytes_look_like(os.pread(fd, PROBED, 0))


def bytes_look_like(data: bytes) -> str | None:
    """As `looks_like`. data: the first `PROBED` bytes of a file."""
    for format, (offset, magic) in _MAGICS.items():
        if data[offset : offset + len(magic)] == magic:
            return format.partition(" ")[0]
    return None


def disk_size(fd: int, path: str, format: str) -> Bytes:
    """Bytes of the disk in the image of that format in the open file `fd`."""
    # Imported here, because a command that serves no image need not wait for NumPy.
    from blkloom.image.storage import FileStorage

    return Bytes(format_named(format).disk_size(FileStorage(fd, path)))
