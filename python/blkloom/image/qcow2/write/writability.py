"""The writability of a QCOW2 image: corruption, failed syncs, and the flags of the header.

After wrong metadata was found, or after a failed sync, the image is only read. One thread (the mapper's). May fail:
CorruptImage, FaultError (EIO), OSError of the storage.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from blkloom.errors import FaultError
from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.format.header import Incompatible, encode_fields
from blkloom.image.types import HostOffset

if TYPE_CHECKING:
    from blkloom.image.qcow2.state.image import Image

_log = logging.getLogger(__name__)


class Writability:
    """The state of one writable image. broke: called when nothing is written any more."""

    def __init__(self, image: Image, broke: Callable[[], None]) -> None:
        self._image = image
        self._broke = broke
        self.broken: OSError | None = None
        """The reason why nothing is written any more: the image is corrupt, or a sync of it failed."""

    def check(self) -> None:
        """Raises FaultError (EIO) if nothing is written any more."""
        if self.broken is not None:
            corrupt = "corrupt and " if isinstance(self.broken, CorruptImage) else ""
            raise FaultError(errno.EIO, f"the image is {corrupt}only read: {self.broken}")

    @contextmanager
    def finding_corruption(self) -> Iterator[None]:
        """Marks the image corrupt if the block raises CorruptImage about it, and not about a backing file."""
        try:
            yield
        except CorruptImage as error:
            if error.path == self._image.path:
                self.mark_corrupt(error)
            raise

    def mark_corrupt(self, error: CorruptImage) -> None:
        """Reports wrong metadata in the log and marks the image corrupt, which is only read from now on."""
        if self.broken is not None:
            return
        self.broken = error
        self._image.report(error)
        _log.error("%s: marked corrupt; nothing is written to the image any more", self._image.path)
        try:
            if self._image.header.version >= 3:
                self.set_header(incompatible=self._image.header.incompatible | Incompatible.CORRUPT)
        finally:
            self._broke()

    def fail(self, error: OSError) -> None:
        """Only reads the image from now on, because a sync of one of its files failed: what was written before may be
        lost, and tables may refer to it. The image is not marked corrupt: that write could not be relied on either.
        """
        if self.broken is None:
            self.broken = error
            self._broke()

    def set_header(self, *, incompatible: int | None = None, autoclear: int | None = None) -> None:
        """Writes feature bits of the header, in one sector. They are durable when it returns."""
        header = self._image.header
        self._image.header = replace(
            header,
            incompatible=header.incompatible if incompatible is None else incompatible,
            autoclear=header.autoclear if autoclear is None else autoclear,
        )
        self._image.storage.write(HostOffset(0), encode_fields(self._image.header))
        self._image.storage.sync()
