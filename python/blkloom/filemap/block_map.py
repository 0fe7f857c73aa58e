"""A file's blocks as extents of its block device: dm-loop, held still.

`BlockMap` is made from two Files of one opening: the file, and the device its file system is on. The map is
read twice and compared; it is true until the lease is given up, when `given_up` is called and must have
stopped all I/O before it returns. Page cache of the file is dropped before and after, so whoever reads the
file later sees what was written below it. One thread at a time, but for `given_up`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Self

from blkloom._engine import Extent, File
from blkloom.filemap import fiemap, ground, page_cache
from blkloom.filemap.lease import GivenUp, Leases, Stopped
from blkloom.filemap.unsound import Unsound
from blkloom.target.base import Mapped
from blkloom.units import Bytes

_log = logging.getLogger(__name__)


class BlockMap:
    """The bytes from `offset` to `offset + length` of `file`, on `disk`."""

    def __init__(
        self,
        file: File,
        disk: File,
        offset: Bytes,
        length: Bytes,
        leave: Callable[[bool], None],
        held: Callable[[], bool],
    ) -> None:
        self.disk = disk
        self._file = file
        self._offset = offset
        self._length = length
        self._leave = leave
        self._held = held
        self._extents = self._read()

    @classmethod
    def make(
        cls,
        file: File,
        disk: File,
        offset: Bytes,
        length: Bytes,
        leases: Leases,
        stopped: Stopped,
        given_up: GivenUp,
        *,
        keep_writers_out: bool,
    ) -> Self:
        """Raises Unsound, OSError."""
        if file.sync_error:
            raise Unsound(
                "a sync of it has failed, so its blocks may not hold what was written", "load the table again"
            )
        leave = leases.take(file.fileno(), file.label, stopped, given_up, keep_writers_out=keep_writers_out)
        try:
            if not page_cache.empty(file):
                raise Unsound(
                    "somebody holds pages of it in memory, which would not change with it",
                    "end who reads it (a pipe or socket may have what he read)",
                )
            ground.ground_of(file.fileno())  # now that nobody can change that any more
            return cls(file, disk, offset, length, leave, lambda: leases.renew(file.fileno(), given_up))
        except BaseException:
            leave(False)
            raise

    def __len__(self) -> int:
        return len(self._extents)

    def mapped(self) -> Mapped:
        """The extents, for the engine; holes are zeros."""
        read_only = not self.disk.writable
        runs: Mapped = []
        at = self._offset
        extents = self._extents
        for logical, physical, length in zip(
            extents.logical.tolist(), extents.physical.tolist(), extents.length.tolist(), strict=True
        ):
            if logical > at:
                runs.append((Bytes(at - self._offset), Bytes(logical - at), Extent.zero()))
            extent = Extent.data(self.disk, physical, read_only=read_only)
            runs.append((Bytes(logical - self._offset), Bytes(length), extent))
            at = Bytes(logical + length)
        if (end := self._offset + self._length) > at:
            runs.append((Bytes(at - self._offset), Bytes(end - at), Extent.zero()))
        return runs

    def held(self) -> bool:
        """Whether nobody else could get at the file since it was mapped."""
        return self._held()

    def check(self) -> bool:
        """Reads the map again: whether it is another one now. Raises Unsound when it cannot be relied on any more."""
        now = self._read()
        changed = not now.same_as(self._extents)
        self._extents = now
        return changed

    def settle(self) -> None:
        """The map has been given up, and nothing is in flight: makes what was written durable, and the file's cache
        empty. What fails there is logged: the file has to be let go even so.
        """
        try:
            self.disk.sync()
            page_cache.drop(self._file)
        except OSError as error:
            _log.error("%s: syncing: %s", self._file.label, error)

    def close(self, *, changed: bool) -> None:
        """Lets go of the file; nothing may be in flight. changed: whether it may have been written to."""
        try:
            page_cache.drop(self._file)
        finally:
            self._leave(changed)

    def _read(self) -> fiemap.Extents:
        found = extents_on(self._file, self.disk, self._offset, self._length)
        if not found.same_as(extents_on(self._file, self.disk, self._offset, self._length)):
            raise Unsound("The file changed while mapping it")
        return found


def extents_on(file: File, disk: File, offset: Bytes, length: Bytes) -> fiemap.Extents:
    """Where a piece of the file is on the disk now. Raises Unsound when that is no ground for a map."""
    start, end = int(offset), int(offset + length)
    try:
        found = fiemap.extents_of(file.fileno(), start, end)
    except OSError as error:
        raise Unsound(f"its file system does not say where it is (FIEMAP: {error.strerror})") from error
    ground.check_place(found, disk.size)
    ground.check_extents(found, start, end, holes=not file.writable)
    ground.check_alignment(found, start, end, disk.offset_alignment)
    return found.merged()
