"""Whether a file given by its path alone is to be served as a QCOW2 image, and how long its disk is.

A guest may write a QCOW2 header into a raw image and name any backing file in it; so contents never decide. A name
does (`.qcow2`, `.qcow`), or whoever says the format. May fail: CorruptImage, UnsupportedImage, OSError.
"""

from __future__ import annotations

import os
from typing import Final

from blkloom.units import Bytes

_ENDINGS: Final = (".qcow2", ".qcow")
_MAGIC: Final = b"QFI\xfb"


def is_image_name(path: str) -> bool:
    """Whether a file of that name is taken for an image."""
    return path.lower().endswith(_ENDINGS)


def looks_like_image(fd: int) -> bool:
    """Whether it begins like an image: worth a warning when it is served raw."""
    return begins_like_image(os.pread(fd, len(_MAGIC), 0))


def begins_like_image(data: bytes) -> bool:
    """Whether the bytes are those of an image's beginning."""
    return data.startswith(_MAGIC)


def image_length(fd: int, path: str) -> Bytes:
    """Bytes of the disk in the image open as `fd`."""
    # Here, because a command that serves no image need not wait for NumPy.
    from blkloom.qcow2.header import read_header
    from blkloom.qcow2.storage import FileStorage

    return Bytes(read_header(FileStorage(fd, path)).size)
