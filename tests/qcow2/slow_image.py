"""Slow model of the format: an image as bytes, read and checked entry by entry.

Written from QEMU's docs/interop/qcow2 alone. It shares no code with blkloom, uses no caches and no NumPy, and should be
obviously right. `check` finds the errors that `qemu-img check` finds (and a few more); `content` returns the contents
of the disk. Small images only.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_VERSION_3 = struct.Struct(">QQQII")
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_BITMAP = struct.Struct(">QIIBBHI")

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED = (1 << bit for bit in range(5))
LAZY = 1
BITMAPS_CONSISTENT, RAW_DATA_FILE = 1, 2
COPIED, COMPRESSED, ALL_ZERO = 1 << 63, 1 << 62, 1
OFFSET_MASK = (1 << 56) - (1 << 9)
SUBCLUSTERS = 32
BACKING_FORMAT, FEATURE_NAMES, BITMAPS, ENCRYPTION, DATA_FILE_NAME = (
    0xE2792ACA,
    0x6803F857,
    0x23852875,
    0x0537BE77,
    0x44415441,
)


@dataclass
class Findings:
    """corruptions: an image that must not be. leaks: clusters counted and not used. low: clusters
    used more often than counted, which is a corruption unless the dirty bit promises a repair.
    shared: clusters that several entries of the active table use (never without snapshots).
    """

    corruptions: list[str] = field(default_factory=list)
    low: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    leaks: int = 0


@dataclass
class Snapshot:
    l1_offset: int
    l1_size: int
    disk_size: int
    name: str
    length: int
    """Bytes of its entry."""


@dataclass
class Bitmap:
    table_offset: int
    table_size: int
    flags: int
    granularity: int
    name: str


class SlowImage:
    """data: the image file. data_file: the external one's. backing: what a guest reads of the backing
    image, all of it.
    """

    def __init__(self, data: bytes | bytearray, *, data_file: bytes | None = None, backing: bytes = b"") -> None:
        self.data, self.data_file, self.backing = data, data_file, backing
        (
            magic,
            self.version,
            self.backing_offset,
            self.backing_length,
            self.cluster_bits,
            self.size,
            self.encryption,
            self.l1_size,
            self.l1_offset,
            self.table_offset,
            self.table_clusters,
            self.snapshot_count,
            self.snapshot_offset,
        ) = _HEADER.unpack_from(data)
        assert magic == b"QFI\xfb"
        self.incompatible = self.compatible = self.autoclear = 0
        refcount_order, self.header_length, self.compression = 4, 72, 0
        if self.version >= 3:
            self.incompatible, self.compatible, self.autoclear, refcount_order, self.header_length = (
                _VERSION_3.unpack_from(data, 72)
            )
            if self.header_length > 104:
                self.compression = data[104]
        self.cluster = 1 << self.cluster_bits
        self.refcount_bits = 1 << refcount_order
        self.entry_size = 16 if self.incompatible & EXTENDED else 8
        self.l2_entries = self.cluster // self.entry_size
        self.extensions = dict(self._extensions())

    def _extensions(self) -> Iterator[tuple[int, bytes]]:
        at = self.header_length
        while at + 8 <= self.cluster:
            kind, length = struct.unpack_from(">II", self.data, at)
            if not kind:
                return
            yield kind, bytes(self.data[at + 8 : at + 8 + length])
            at += 8 + (length + 7) // 8 * 8

    @property
    def dirty(self) -> bool:
        return bool(self.incompatible & DIRTY)

    # Reading

    def content(self, snapshot: Snapshot | None = None) -> bytes:
        """What a guest reads of the whole disk."""
        size = snapshot.disk_size if snapshot else self.size
        l1 = self.l1(snapshot)
        pieces = []
        for cluster in range((size + self.cluster - 1) // self.cluster):
            pieces.append(self._cluster(l1, cluster))
        return b"".join(pieces)[:size]

    def l1(self, snapshot: Snapshot | None = None) -> list[int]:
        at, count = (snapshot.l1_offset, snapshot.l1_size) if snapshot else (self.l1_offset, self.l1_size)
        return list(struct.unpack_from(f">{count}Q", self.data.ljust(at + 8 * count, b"\0"), at))

    def l2_entry(self, l1: list[int], cluster: int) -> tuple[int, int]:
        """The descriptor, and the subclusters' bitmap (0 where there is none)."""
        first, second = divmod(cluster, self.l2_entries)
        offset = l1[first] & OFFSET_MASK if first < len(l1) else 0
        if not offset:
            return 0, 0
        raw = self.bytes_at(offset + second * self.entry_size, self.entry_size)
        if self.entry_size == 16:
            return struct.unpack(">QQ", raw)
        return struct.unpack(">Q", raw)[0], 0

    def bytes_at(self, offset: int, length: int, *, data_file: bool = False) -> bytes:
        """Zeros past the end."""
        source = self.data_file if data_file and self.data_file is not None else self.data
        return bytes(source[offset : offset + length]).ljust(length, b"\0")

    def _below(self, cluster: int) -> bytes:
        at = cluster * self.cluster
        return bytes(self.backing[at : at + self.cluster]).ljust(self.cluster, b"\0")

    def _cluster(self, l1: list[int], cluster: int) -> bytes:
        entry, bits = self.l2_entry(l1, cluster)
        if entry & COMPRESSED:
            return self._decompressed(entry)
        offset = entry & OFFSET_MASK
        external = bool(self.incompatible & DATA_FILE)
        allocated = bool(offset) or (external and bool(entry & COPIED))
        below = self._below(cluster)
        if self.entry_size == 8:
            if entry & ALL_ZERO and self.version >= 3:
                return bytes(self.cluster)
            return self.bytes_at(offset, self.cluster, data_file=external) if allocated else below
        here = self.bytes_at(offset, self.cluster, data_file=external) if allocated else bytes(self.cluster)
        size = self.cluster // SUBCLUSTERS
        pieces = []
        for number in range(SUBCLUSTERS):
            part = slice(number * size, (number + 1) * size)
            if bits >> (32 + number) & 1:
                pieces.append(bytes(size))
            else:
                pieces.append(here[part] if bits >> number & 1 else below[part])
        return b"".join(pieces)

    def compressed_place(self, entry: int) -> tuple[int, int]:
        """Offset, and how many bytes up to the end of its last sector."""
        shift = 62 - (self.cluster_bits - 8)
        offset = entry & ((1 << shift) - 1)
        sectors = (entry >> shift) & ((1 << (self.cluster_bits - 8)) - 1)
        return offset, (sectors + 1) * 512 - offset % 512

    def _decompressed(self, entry: int) -> bytes:
        packed = self.bytes_at(*self.compressed_place(entry))
        if self.compression == 0:
            return zlib.decompressobj(-12).decompress(packed, self.cluster)
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(packed)[: self.cluster]

    # What else it holds

    def snapshots(self) -> list[Snapshot]:
        found, at = [], self.snapshot_offset
        for _ in range(self.snapshot_count):
            l1_offset, l1_size, id_length, name_length, *_, extra = _SNAPSHOT.unpack_from(self.data, at)
            disk_size = struct.unpack_from(">Q", self.data, at + 48)[0] if extra >= 16 else self.size
            name_at = at + 40 + extra + id_length
            name = bytes(self.data[name_at : name_at + name_length]).decode()
            length = (40 + extra + id_length + name_length + 7) // 8 * 8
            found.append(Snapshot(l1_offset, l1_size, disk_size, name, length))
            at += length
        return found

    def bitmaps(self) -> list[Bitmap]:
        found: list[Bitmap] = []
        if BITMAPS not in self.extensions:
            return found
        count, _, _, at = struct.unpack(">IIQQ", self.extensions[BITMAPS])
        for _ in range(count):
            table, size, flags, _, granularity, name_length, extra = _BITMAP.unpack_from(self.data, at)
            name = bytes(self.data[at + 24 + extra : at + 24 + extra + name_length]).decode()
            found.append(Bitmap(table, size, flags, granularity, name))
            at += (24 + extra + name_length + 7) // 8 * 8
        return found

    def dirty_ranges(self, bitmap: Bitmap) -> list[bool]:
        """One a range of 1 << granularity bytes."""
        count = (self.size + (1 << bitmap.granularity) - 1) >> bitmap.granularity
        packed = b""
        for entry in struct.unpack_from(f">{bitmap.table_size}Q", self.data, bitmap.table_offset):
            offset = entry & OFFSET_MASK
            packed += (
                self.bytes_at(offset, self.cluster) if offset else (b"\xff" if entry & 1 else b"\0") * self.cluster
            )
        return [bool(packed[number // 8] >> number % 8 & 1) for number in range(count)]

    # Checking

    def refcount(self, cluster: int) -> int:
        """As the file says."""
        per_block = self.cluster * 8 // self.refcount_bits
        first, second = divmod(cluster, per_block)
        if first * 8 >= self.table_clusters * self.cluster:
            return 0
        block = int.from_bytes(self.bytes_at(self.table_offset + first * 8, 8), "big") & ~511
        if not block:
            return 0
        if self.refcount_bits >= 8:
            width = self.refcount_bits // 8
            return int.from_bytes(self.bytes_at(block + second * width, width), "big")
        byte = self.bytes_at(block + second * self.refcount_bits // 8, 1)[0]
        return int(byte >> (second * self.refcount_bits % 8) & ((1 << self.refcount_bits) - 1))

    def check(self) -> Findings:
        """Count every use of every cluster and compare with what the file counts."""
        findings, uses, active = Findings(), Counter[int](), Counter[int]()
        self._structures(findings, uses)
        self._walk(self.l1(), findings, uses, active, "L1 table")
        for snapshot in self.snapshots():
            self._walk(self.l1(snapshot), findings, uses, None, f"L1 table of snapshot {snapshot.name!r}")
        self._compare(findings, uses)
        findings.shared = [f"cluster {at:#x} is used {n} times" for at, n in active.items() if n > 1]
        findings.corruptions += self._copied_bits()
        if not self.dirty:
            findings.corruptions += findings.low
        return findings

    def _use(self, findings: Findings, uses: Counter[int], offset: int, length: int, what: str) -> None:
        if offset % self.cluster:
            findings.corruptions.append(f"{what} at {offset:#x} is not at a cluster's start")
        if offset + length - len(self.data) >= self.cluster:
            findings.corruptions.append(f"{what} at {offset:#x} is past the end of the file")
        for cluster in range(offset // self.cluster, (offset + length - 1) // self.cluster + 1):
            uses[cluster] += 1

    def _structures(self, findings: Findings, uses: Counter[int]) -> None:
        self._use(findings, uses, 0, self.cluster, "header")
        self._use(findings, uses, self.table_offset, self.table_clusters * self.cluster, "refcount table")
        for number in range(self.table_clusters * self.cluster // 8):
            block = struct.unpack(">Q", self.bytes_at(self.table_offset + number * 8, 8))[0]
            if block:
                self._use(findings, uses, block & ~511, self.cluster, f"refcount block {number}")
        if self.l1_size:
            self._use(findings, uses, self.l1_offset, self.l1_size * 8, "L1 table")
        if snapshots := self.snapshots():
            total = sum(snapshot.length for snapshot in snapshots)
            self._use(findings, uses, self.snapshot_offset, total, "snapshot table")
            for snapshot in snapshots:
                self._use(findings, uses, snapshot.l1_offset, snapshot.l1_size * 8, f"L1 of {snapshot.name!r}")
        # qemu-img counts nothing of inconsistent bitmaps
        if BITMAPS in self.extensions and self.autoclear & BITMAPS_CONSISTENT:
            _, _, size, at = struct.unpack(">IIQQ", self.extensions[BITMAPS])
            self._use(findings, uses, at, size, "bitmap directory")
            for bitmap in self.bitmaps():
                if not bitmap.table_size:
                    continue
                self._use(findings, uses, bitmap.table_offset, bitmap.table_size * 8, f"bitmap {bitmap.name!r}")
                for entry in struct.unpack_from(f">{bitmap.table_size}Q", self.data, bitmap.table_offset):
                    if entry & OFFSET_MASK:
                        self._use(findings, uses, entry & OFFSET_MASK, self.cluster, "bitmap data")

    def _walk(
        self, l1: list[int], findings: Findings, uses: Counter[int], active: Counter[int] | None, what: str
    ) -> None:
        for number, first in enumerate(l1):
            if first & ~(OFFSET_MASK | COPIED):
                findings.corruptions.append(f"{what} entry {number} has reserved bits: {first:#x}")
            if not first & OFFSET_MASK:
                continue
            self._use(findings, uses, first & OFFSET_MASK, self.cluster, f"L2 table {number} of {what}")
            if active is not None:
                active[first & OFFSET_MASK] += 1
            for second in range(self.l2_entries):
                entry, bits = self.l2_entry(l1, number * self.l2_entries + second)
                where = f"entry {second} of L2 table {number} of {what}"
                if entry or bits:
                    self._walk_entry(entry, bits, findings, uses, active, where)

    def _walk_entry(
        self,
        entry: int,
        bits: int,
        findings: Findings,
        uses: Counter[int],
        active: Counter[int] | None,
        where: str,
    ) -> None:
        if entry & COMPRESSED:
            offset, length = self.compressed_place(entry)
            if entry & COPIED:
                findings.corruptions.append(f"{where} is compressed and has the copied bit: {entry:#x}")
            if offset + length - len(self.data) >= self.cluster:
                findings.corruptions.append(f"{where} is past the end of the file")
            for cluster in range(offset // self.cluster, (offset + length - 1) // self.cluster + 1):
                uses[cluster] += 1
            return
        if entry & ~(OFFSET_MASK | COPIED | (ALL_ZERO if self.version >= 3 and self.entry_size == 8 else 0)):
            findings.corruptions.append(f"{where} has reserved bits: {entry:#x}")
        allocated, zeros = bits & 0xFFFFFFFF, bits >> 32
        if allocated & zeros:
            findings.corruptions.append(f"{where} has subclusters both allocated and zero: {bits:#x}")
        offset = entry & OFFSET_MASK
        if self.incompatible & DATA_FILE:
            return
        if allocated and not offset:
            findings.corruptions.append(f"{where} has allocated subclusters and no cluster: {bits:#x}")
        if offset:
            self._use(findings, uses, offset, self.cluster, where)
            if active is not None:
                active[offset] += 1

    def _compare(self, findings: Findings, uses: Counter[int]) -> None:
        last = max(*uses, len(self.data) // self.cluster)
        for cluster in range(last + 1):
            stored, used = self.refcount(cluster), uses[cluster]
            if stored < used:
                findings.low.append(f"cluster {cluster * self.cluster:#x}: {used} uses, counted {stored}")
            elif stored > used:
                findings.leaks += 1

    def _copied_bits(self) -> list[str]:
        """The copied bit stands for a refcount of exactly one, in the active tables."""
        wrong = []
        l1 = self.l1()
        for number, first in enumerate(l1):
            offset = first & OFFSET_MASK
            if not offset:
                continue
            if not self._copied_fits(first, offset):
                wrong.append(f"L1 entry {number} {first:#x}: copied bit and refcount disagree")
            if self.incompatible & DATA_FILE:
                continue
            for second in range(self.l2_entries):
                entry, _ = self.l2_entry(l1, number * self.l2_entries + second)
                offset = entry & OFFSET_MASK
                if entry & COMPRESSED or not offset or self._copied_fits(entry, offset):
                    continue
                wrong.append(f"L2 entry {number}/{second} {entry:#x}: copied bit and refcount disagree")
        return wrong

    def _copied_fits(self, entry: int, offset: int) -> bool:
        count = self.refcount(offset // self.cluster)
        if not self.dirty:
            return bool(entry & COPIED) == (count == 1)
        # The counts of a dirty image are behind. A cluster with the copied bit may not be counted yet, or still have
        # the count of what it held before: of several compressed clusters, for example.
        return bool(entry & COPIED) or count > 1
