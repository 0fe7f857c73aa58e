"""Block map: the blocks of a file as extents of its block device, as in dm-loop, protected by a lease.

`BlockMap` is made from two open files: the file itself, and the block device of its file system. The extents are read
twice and compared. They are valid until the lease is given up; then `given_up` is called, and it must stop all I/O
before it returns. The page cache of the file is dropped before and after, so that later readers of the file see what
was written to its blocks. Used by one thread at a time, except for `given_up`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Self

from blkloom._engine import Extent, File
from blkloom.filemap import fiemap, mappability, page_cache
from blkloom.filemap.lease import GivenUp, Leases, Stopped
from blkloom.filemap.not_mappable import NotMappable
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
        """Makes a block map. Raises NotMappable, OSError."""
        if file.sync_error:
            raise NotMappable(
                "a sync of it has failed, so its blocks may not hold what was written", "load the table again"
            )
        leave = leases.take(file.fileno(), file.label, stopped, given_up, keep_writers_out=keep_writers_out)
        try:
            if not page_cache.empty(file):
                raise NotMappable(
                    "pages of it stay in the page cache, and would not show what is written to its blocks",
                    "end the process that reads it (a pipe or socket may hold the pages)",
                )
            mappability.disk_of(file.fileno())  # again: with the lease, no other process can change it
            return cls(file, disk, offset, length, leave, lambda: leases.renew(file.fileno(), given_up))
        except BaseException:
            leave(False)
            raise

    def __len__(self) -> int:
        return len(self._extents)

    def mapped(self) -> list[tuple[Bytes, Bytes, Extent]]:
        """The extents, for the engine; holes are zeros."""
        read_only = not self.disk.writable
        runs: list[tuple[Bytes, Bytes, Extent]] = []
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
        """Whether the lease still holds: no other process has opened the file since it was mapped."""
        return self._held()

    def check(self) -> bool:
        """Reads the extents again. Returns whether they have changed. Raises NotMappable if they must not be used."""
        now = self._read()
        changed = not now.same_as(self._extents)
        self._extents = now
        return changed

    def settle(self) -> None:
        """Syncs the block device and drops the file's page cache. Call it after the map is given up, with no request in
        flight. Errors are logged: the lease must be released in any case.
        """
        try:
            self.disk.sync()
            page_cache.drop(self._file)
        except OSError as error:
            _log.error("%s: syncing: %s", self._file.label, error)

    def close(self, *, changed: bool) -> None:
        """Releases the file. No request may be in flight. changed: whether data may have been written to its blocks."""
        try:
            page_cache.drop(self._file)
        finally:
            self._leave(changed)

    def _read(self) -> fiemap.Extents:
        found = extents_on(self._file, self.disk, self._offset, self._length)
        if not found.same_as(extents_on(self._file, self.disk, self._offset, self._length)):
            raise NotMappable("The file changed while mapping it")
        return found


def extents_on(file: File, disk: File, offset: Bytes, length: Bytes) -> fiemap.Extents:
    """Extents of a part of the file on the disk. Raises NotMappable when they must not be mapped."""
    start, end = int(offset), int(offset + length)
    try:
        found = fiemap.extents_of(file.fileno(), start, end)
    except OSError as error:
        raise NotMappable(f"its file system does not say where it is (FIEMAP: {error.strerror})") from error
    mappability.check_place(found, disk.size)
    mappability.check_extents(found, start, end, holes=not file.writable)
    mappability.check_alignment(found, start, end, disk.offset_alignment)
    return found.merged()
