"""Internal snapshots: the snapshot table, and the lookup of a snapshot by id or name.

Pure except for reads. May fail: CorruptImage, OSError of the storage. Source: QEMU docs/interop/qcow2, "Snapshots".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from blkloom.errors import UsageError
from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.format.header import L1_LIMIT, Header
from blkloom.image.types import HostOffset
from blkloom.units import DEVICE_LIMIT

if TYPE_CHECKING:
    from blkloom.image.storage import Storage

_ENTRY: Final = struct.Struct(">QIHHIIQII")
_EXTRA_LIMIT: Final = 1024
_TABLE_LIMIT: Final = 64 << 20
_PIECE: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry of the snapshot table. disk_size: bytes, None if an old image does not say it. length: bytes of the
    entry in the table.
    """

    id: str
    name: str
    l1_offset: HostOffset
    l1_size: int
    disk_size: int | None
    seconds: int
    vm_state_size: int
    length: int


def read_snapshots(storage: Storage, header: Header) -> list[Snapshot]:
    """Reads all snapshots of an image, in the order of the table. Raises CorruptImage, OSError."""
    reader = _Reader(storage, header)
    return [reader.next(number) for number in range(header.snapshot_count)]


def find_snapshot(snapshots: list[Snapshot], word: str, *, path: str) -> Snapshot:
    """The snapshot with the id `word`, or else with that name. Raises UsageError with a list of the snapshots."""
    for found in (
        *(snapshot for snapshot in snapshots if snapshot.id == word),
        *(snapshot for snapshot in snapshots if snapshot.name == word),
    ):
        return found
    known = ", ".join(f"{snapshot.id} ({snapshot.name})" for snapshot in snapshots[:20]) or "none"
    raise UsageError(f"{path}: no snapshot '{word}'", cure=f"there are: {known}")


class _Reader:
    """A cursor over the table, whose length is not stored."""

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self._header = header
        self._at = 0
        self._buffer = b""
        self._buffer_at = 0

    def next(self, number: int) -> Snapshot:
        start = self._at
        l1_offset, l1_size, id_length, name_length, seconds, _, _, state, extra_length = _ENTRY.unpack(
            self._take(_ENTRY.size, number)
        )
        if extra_length > _EXTRA_LIMIT:
            raise self._corrupt(number, f"{extra_length} bytes of extra data; {_EXTRA_LIMIT} can be")
        extra = self._take(extra_length, number)
        identity = self._take(id_length, number)
        name = self._take(name_length, number)
        if l1_offset % (1 << self._header.cluster_bits) or not l1_offset or l1_size * 8 > L1_LIMIT:
            raise self._corrupt(
                number,
                f"an L1 table of {l1_size} entries at {l1_offset:#x}; {L1_LIMIT // 8} can be, at a multiple of "
                f"{1 << self._header.cluster_bits:#x} that is not 0",
            )
        size = int.from_bytes(extra[8:16], "big") if extra_length >= 16 else None
        if size is not None and size >= DEVICE_LIMIT:
            raise self._corrupt(number, f"a disk of {size} bytes; {DEVICE_LIMIT - 1} is most")
        self._at += -self._at % 8
        return Snapshot(
            identity.decode("utf-8", "backslashreplace"),
            name.decode("utf-8", "backslashreplace"),
            HostOffset(l1_offset),
            l1_size,
            size,
            seconds,
            int.from_bytes(extra[:8], "big") if extra_length >= 8 else state,
            self._at - start,
        )

    def _take(self, length: int, number: int) -> bytes:
        place = self._header.snapshot_offset + self._at
        if self._at + length > _TABLE_LIMIT or place + length > self._storage.size():
            raise self._corrupt(
                number,
                f"the table reaches past the end of the file ({self._storage.size():#x}), or past its limit of "
                f"{_TABLE_LIMIT} bytes: to {place + length:#x}, {self._at + length} bytes",
            )
        low = self._at - self._buffer_at
        if low < 0 or low + length > len(self._buffer):
            self._buffer = self._storage.read(HostOffset(place), max(length, _PIECE))
            self._buffer_at, low = self._at, 0
        self._at += length
        return self._buffer[low : low + length]

    def _corrupt(self, number: int, what: str) -> CorruptImage:
        return CorruptImage(f"snapshot {number}: {what}", path=self._storage.path)
