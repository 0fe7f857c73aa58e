"""QCOW2 images made entry by entry, as no tool would make them, for tests of reading.

Refcounts are zero; a reader does not use them.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blkloom.image.qcow2.format.header import Compression, Extension, ExtensionKind, Header, Incompatible, encode
from blkloom.image.qcow2.format.tables import COMPRESSED, COPIED
from blkloom.image.types import HostOffset


class MemoryFile:
    """A `Storage` for reading."""

    path = "memory"

    def __init__(self, data: bytes) -> None:
        self.data = data

    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length].ljust(length, b"\0")


@dataclass
class ByHand:
    """An image to be. Clusters are given by `data`, `entry`, `compress`; `build` gives its bytes."""

    size: int
    cluster_bits: int = 12
    version: int = 3
    extended: bool = False
    compression: Compression = Compression.ZLIB
    backing: bytes | None = None
    backing_format: bytes | None = b"qcow2"
    header_fields: dict[str, Any] = field(default_factory=dict)
    entries: dict[int, tuple[int, int]] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)

    @property
    def cluster(self) -> int:
        return 1 << self.cluster_bits

    @property
    def per_table(self) -> int:
        return self.cluster // (16 if self.extended else 8)

    @property
    def tables(self) -> int:
        return -(-self.size // (self.per_table * self.cluster))

    @property
    def l1_clusters(self) -> int:
        return -(-self.tables * 8 // self.cluster) or 1

    @property
    def first_data(self) -> int:
        """The host cluster that the first of `chunks` gets."""
        return 2 + self.l1_clusters + self.tables

    def place(self, content: bytes) -> int:
        """Host offset of clusters that will hold `content`."""
        at = (self.first_data + len(self.chunks)) << self.cluster_bits
        for start in range(0, len(content), self.cluster):
            self.chunks.append(content[start : start + self.cluster].ljust(self.cluster, b"\0"))
        return at

    def data(self, number: int, content: bytes, bitmap: int = 0xFFFFFFFF) -> None:
        """A standard cluster of the guest's."""
        self.entries[number] = (self.place(content) | COPIED, bitmap)

    def entry(self, number: int, entry: int, bitmap: int = 0) -> None:
        self.entries[number] = (entry, bitmap)

    def compress(self, number: int, content: bytes, packed: bytes | None = None, *, skip: int = 0) -> None:
        """A compressed one, its data `skip` bytes into a host cluster."""
        if packed is None:
            packer = zlib.compressobj(9, zlib.DEFLATED, -12)
            packed = packer.compress(content) + packer.flush()
        offset = self.place(bytes(skip) + packed) + skip
        sectors = (offset + len(packed) - 1) // 512 - offset // 512
        self.entries[number] = (COMPRESSED | offset | sectors << 62 - (self.cluster_bits - 8), 0)

    def header(self) -> Header:
        extensions: list[tuple[ExtensionKind, bytes]] = []
        if self.backing is not None and self.backing_format is not None:
            extensions.append((ExtensionKind.BACKING_FORMAT, self.backing_format))
        incompatible = Incompatible.EXTENDED_L2 * self.extended | Incompatible.COMPRESSION * bool(self.compression)
        fields: dict[str, Any] = {
            "version": self.version,
            "cluster_bits": self.cluster_bits,
            "size": self.size,
            "l1_size": self.tables,
            "l1_offset": HostOffset(2 << self.cluster_bits),
            "refcount_table_offset": HostOffset(1 << self.cluster_bits),
            "refcount_table_clusters": 1,
            "header_length": 112 if self.version == 3 else 72,
            "incompatible": int(incompatible),
            "compression": self.compression,
            "backing_name": self.backing,
        }
        header = Header(**(fields | self.header_fields))
        added = dict(extensions)
        kept = [extension for extension in header.extensions if extension.kind not in added]
        return replace(header, extensions=(*kept, *(Extension(kind, data) for kind, data in added.items())))

    def build(self) -> bytes:
        l1 = [(2 + self.l1_clusters + number) << self.cluster_bits | COPIED for number in range(self.tables)]
        parts = [encode(self.header(), path="by hand"), bytes(self.cluster)]
        parts.append(struct.pack(f">{len(l1)}Q", *l1).ljust(self.l1_clusters * self.cluster, b"\0"))
        for table in range(self.tables):
            words: list[int] = []
            for number in range(table * self.per_table, (table + 1) * self.per_table):
                entry, bitmap = self.entries.get(number, (0, 0))
                words += [entry, bitmap] if self.extended else [entry]
            parts.append(struct.pack(f">{len(words)}Q", *words))
        return b"".join([*parts, *self.chunks])

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path
