"""Cache of clusters made in memory (mostly decompressed ones): slots of a sealed memfd that the engine reads.

The cluster that was *made* first is evicted first, because the engine does not report which ones it reads. A slot is
used again only after `evicted` has returned, so that no request reads it. One thread (the mapper's). May fail:
ResourceError.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from typing import Final, TypeAlias

from blkloom._engine import File
from blkloom.errors import ResourceError
from blkloom.image.types import HostOffset
from blkloom.units import format_size

Key: TypeAlias = tuple[int, int]
"""(layer, cluster of that layer)."""

_AT_ONCE: Final = 8
"""One of this many slots is evicted at a time, because each eviction waits for requests in flight."""


class DecompressedCache:
    """The cache. limit: maximum bytes of memory, at least one slot. slot: bytes of the largest cluster. evicted:
    callback for clusters that are about to lose their slot; when it returns, no request reads there.
    """

    def __init__(self, limit: int, slot: int, evicted: Callable[[list[Key]], None]) -> None:
        self._slot: Final = slot
        self.slots: Final = max(limit // slot, 1)
        self._evicted = evicted
        self._places: dict[Key, int] = {}
        self._free: list[int] = []
        self._fresh = 0
        try:
            self._fd = os.memfd_create("blkloom-unpacked", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                # The file is empty at first: then the engine assumes that it has no holes, and never searches for any.
                # On a
                # memfd, the search takes longer the more data there is.
                self.file: Final = File(self._fd, writable=False, label="decompressed clusters")
                os.ftruncate(self._fd, self.slots * slot)
                fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise ResourceError(
                f"{format_size(self.slots * slot)} of memory for decompressed clusters cannot be had: {error.strerror}",
                cure="give the target a smaller cache=",
                errno=error.errno,
            ) from error

    @property
    def used(self) -> int:
        """Number of clusters in the cache."""
        return len(self._places)

    def place(self, key: Key) -> HostOffset | None:
        """Offset of the cluster in `file`; None if it is not in the cache."""
        slot = self._places.get(key)
        return None if slot is None else HostOffset(slot * self._slot)

    def read(self, key: Key, within: int, length: int) -> bytes | None:
        """Bytes of a cluster; None if it is not in the cache."""
        slot = self._places.get(key)
        return None if slot is None else os.pread(self._fd, length, slot * self._slot + within)

    def put(self, made: dict[Key, bytes]) -> list[Key]:
        """Stores as many of the clusters as there are slots, and returns their keys."""
        taken = list(made)[: self.slots]
        self._make_room(len(taken))
        for key in taken:
            if self._free:
                slot = self._free.pop()
            else:
                slot, self._fresh = self._fresh, self._fresh + 1
            os.pwrite(self._fd, made[key], slot * self._slot)
            self._places[key] = slot
        return taken

    def close(self) -> None:
        """Frees the memory when the engine has closed the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        self._evicted = _no_entries  # a reference back to the owner would keep both in memory

    def _make_room(self, count: int) -> None:
        missing = count - len(self._free) - (self.slots - self._fresh)
        if missing <= 0:
            return
        most = max(missing, self.slots // _AT_ONCE)
        gone = [key for key, _ in zip(self._places, range(most), strict=False)]
        slots = [self._places.pop(key) for key in gone]
        self._evicted(gone)
        self._free += slots


def _no_entries(_keys: list[Key]) -> None:
    """`evicted` of a closed cache: no entry refers to its slots."""
