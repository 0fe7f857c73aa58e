"""Errors of images: inconsistent metadata, damaged data, features that blkloom does not support."""

from __future__ import annotations

import errno as _errno

from blkloom.errors import BackingError


class CorruptImage(BackingError):
    """Inconsistent metadata of an image. `what` names the position and the value."""

    exit_code = 65  # EX_DATAERR

    def __init__(self, what: str, *, path: str, cure: str = "", errno: int = _errno.EIO) -> None:
        super().__init__(what, path=path, errno=errno, cure=cure or "see what qemu-img check says of it")


class DamagedCluster(BackingError):
    """Compressed data that does not decompress to its cluster. The metadata may be right: only this cluster is lost."""

    exit_code = 65  # EX_DATAERR

    def __init__(self, what: str, *, path: str) -> None:
        super().__init__(
            what, path=path, errno=_errno.EIO, cure="restore it from a backup; writing all of the cluster replaces it"
        )


class UnsupportedImage(BackingError):
    """A valid image with features that blkloom does not support."""

    exit_code = 65  # EX_DATAERR

    def __init__(self, what: str, *, path: str, cure: str = "") -> None:
        super().__init__(what, path=path, errno=_errno.ENOTSUP, cure=cure)
