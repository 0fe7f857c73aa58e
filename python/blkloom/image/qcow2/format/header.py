"""The header of an image and its extensions: parser and encoder.

`parse` checks every number that can be checked without reading more of the file. So its result is safe to compute with:
sizes are bounded, offsets aligned, names inside the first cluster. Unknown extensions and later fields are kept and
written back. Pure; any thread. May fail: CorruptImage, UnsupportedImage.

Source: QEMU docs/interop/qcow2, "Header" and "Header extensions"; QEMU's own limits for sizes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Final, NoReturn

from blkloom.image.errors import CorruptImage, UnsupportedImage
from blkloom.image.qcow2.format.geometry import Geometry
from blkloom.image.types import HostOffset
from blkloom.units import DEVICE_LIMIT

if TYPE_CHECKING:
    from blkloom.image.storage import Storage

MAGIC: Final = b"QFI\xfb"

L1_LIMIT: Final = 32 << 20
"""Maximum bytes of an L1 table."""

REFCOUNT_TABLE_LIMIT: Final = 8 << 20
SNAPSHOTS_LIMIT: Final = 65536
"""Maximum number of snapshots of an image."""
SNAPSHOT_ENTRY: Final = 40
"""Minimum bytes of a snapshot in the snapshot table."""
BITMAPS_LIMIT: Final = 65535
"""Maximum number of bitmaps of an image."""
BITMAPS: Final = struct.Struct(">IIQQ")
"""The bitmaps extension: number of bitmaps, zeros, bytes of their directory, and its offset."""

_BACKING_NAME_LIMIT: Final = 1023
_FORMAT_NAME_LIMIT: Final = 15
_CLUSTER_BITS: Final = (9, 21)
_EXTENDED_CLUSTER_BITS: Final = 14

_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
_EXTENSION: Final = struct.Struct(">II")
_COMPRESSION_AT: Final = _V2.size + _V3.size
_FEATURE_NAME: Final = struct.Struct(">BB46s")


class Incompatible(IntFlag):
    """Feature bits that a program must support to use the image."""

    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION = 8
    EXTENDED_L2 = 16


class Compatible(IntFlag):
    """Feature bits that a program may ignore."""

    LAZY_REFCOUNTS = 1


class Autoclear(IntFlag):
    """Feature bits that a program must clear before it writes if it does not support them."""

    BITMAPS = 1
    RAW_DATA_FILE = 2


class Compression(IntEnum):
    """Compression type of compressed clusters."""

    ZLIB = 0
    ZSTD = 1


class ExtensionKind(IntEnum):
    """Types of the header extensions that blkloom supports."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE_NAME = 0x44415441


@dataclass(frozen=True, slots=True)
class Extension:
    """A header extension. kind: an `ExtensionKind` or any other number."""

    kind: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """Contents of the first cluster. backing_name: unchanged bytes; None for no backing file. later_fields: the bytes
    of the header after the compression type.
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_offset: HostOffset
    refcount_table_offset: HostOffset
    refcount_table_clusters: int
    snapshot_count: int = 0
    snapshot_offset: HostOffset = HostOffset(0)  # noqa: RUF009 - a number
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = _V2.size
    compression: Compression = Compression.ZLIB
    backing_name: bytes | None = None
    backing_offset: int = 0
    extensions: tuple[Extension, ...] = ()
    later_fields: bytes = field(default=b"", repr=False)

    @property
    def geometry(self) -> Geometry:
        """The geometry of the image."""
        return Geometry(self.cluster_bits, bool(self.incompatible & Incompatible.EXTENDED_L2))

    @property
    def has_data_file(self) -> bool:
        """Whether guest data is in another file."""
        return bool(self.incompatible & Incompatible.DATA_FILE)

    @property
    def raw_data_file(self) -> bool:
        """Whether the data file alone is a raw image of the disk."""
        return self.has_data_file and bool(self.autoclear & Autoclear.RAW_DATA_FILE)

    def extension(self, kind: ExtensionKind) -> bytes | None:
        """Data of the extension of that kind; a header has at most one."""
        return next((extension.data for extension in self.extensions if extension.kind == kind), None)


def read_header(storage: Storage) -> Header:
    """Reads the header of the image in `storage`. Raises CorruptImage, UnsupportedImage, OSError."""
    if (size := storage.size()) < _V2.size:
        raise CorruptImage(f"header: no QCOW2 image: the file ends after {size} bytes", path=storage.path)
    start = storage.read(HostOffset(0), _V2.size)
    bits = _V2.unpack(start)[4]
    known = start[:4] == MAGIC and _CLUSTER_BITS[0] <= bits <= _CLUSTER_BITS[1]
    return parse(storage.read(HostOffset(0), 1 << bits) if known else start, path=storage.path)


def parse(raw: bytes, *, path: str) -> Header:
    """Parses a header. raw: the image's first cluster, padded with zeros if the file is shorter. Raises CorruptImage,
    UnsupportedImage.
    """
    return _Parser(raw, path).header()


def encode_fields(header: Header) -> bytes:
    """The header without extensions and backing name: `header_length` bytes for the start of the file."""
    name = header.backing_name or b""
    fixed = _V2.pack(
        MAGIC,
        header.version,
        header.backing_offset if header.backing_name is not None else 0,
        len(name),
        header.cluster_bits,
        header.size,
        0,
        header.l1_size,
        header.l1_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.snapshot_count,
        header.snapshot_offset,
    )
    if header.version >= 3:
        fixed += _V3.pack(
            header.incompatible, header.compatible, header.autoclear, header.refcount_order, header.header_length
        )
        fixed += bytes([header.compression]) + header.later_fields
    return fixed[: header.header_length].ljust(header.header_length, b"\0")


def encode_refcount_table(offset: int, clusters: int) -> tuple[int, bytes]:
    """Offset in the file, and bytes, of the fields for the refcount table."""
    return 48, struct.pack(">QI", offset, clusters)


def encode(header: Header, *, path: str) -> bytes:
    """The whole first cluster: fields, extensions, then the backing name. Raises CorruptImage if they do not fit into a
    cluster.
    """
    parts = [
        _EXTENSION.pack(extension.kind, len(extension.data)) + extension.data + bytes(-len(extension.data) % 8)
        for extension in header.extensions
    ]
    parts.append(_EXTENSION.pack(ExtensionKind.END, 0))
    behind = b"".join(parts)
    name = header.backing_name
    if name is not None:
        header = replace(header, backing_offset=header.header_length + len(behind))
    whole = encode_fields(header) + behind + (name or b"")
    cluster = 1 << header.cluster_bits
    if len(whole) > cluster:
        raise CorruptImage(f"a header of {len(whole)} bytes does not fit into a cluster of {cluster}", path=path)
    return whole.ljust(cluster, b"\0")


class _Parser:
    """Parser for the bytes of one header."""

    def __init__(self, raw: bytes, path: str) -> None:
        self._raw = raw
        self._path = path

    def header(self) -> Header:
        if self._raw[:4] != MAGIC:
            self._corrupt(f"no QCOW2 image: it begins with 0x{self._raw[:4].hex()}, and not with 0x{MAGIC.hex()}")
        fields = _V2.unpack_from(self._raw)
        version, backing_offset, backing_length, cluster_bits, size, encryption = fields[1:7]
        l1_size, l1_offset, table_offset, table_clusters, snapshots, snapshots_offset = fields[7:]
        if version not in (2, 3):
            self._unsupported(f"QCOW2 version {version}; versions 2 and 3 are known")
        if not _CLUSTER_BITS[0] <= cluster_bits <= _CLUSTER_BITS[1]:
            self._corrupt(
                f"clusters of 2^{cluster_bits} bytes; allowed are 2^{_CLUSTER_BITS[0]} to 2^{_CLUSTER_BITS[1]}"
            )
        header = Header(
            version=version,
            cluster_bits=cluster_bits,
            size=size,
            l1_size=l1_size,
            l1_offset=HostOffset(l1_offset),
            refcount_table_offset=HostOffset(table_offset),
            refcount_table_clusters=table_clusters,
            snapshot_count=snapshots,
            snapshot_offset=HostOffset(snapshots_offset),
        )
        if version >= 3:
            header = self._version_3(header)
        end = backing_offset or 1 << cluster_bits
        if not header.header_length <= end <= 1 << cluster_bits:
            self._corrupt(
                f"the backing file's name begins at {end:#x}; allowed is the range from the header's end "
                f"({header.header_length:#x}) to the end of the cluster ({1 << cluster_bits:#x})"
            )
        header = replace(header, extensions=self._extensions(header.header_length, end))
        self._check_features(header)
        self._check_encryption(encryption, header)
        if backing_offset:
            header = self._with_backing(header, backing_offset, backing_length)
        self._check_places(header)
        return header

    def _version_3(self, header: Header) -> Header:
        incompatible, compatible, autoclear, order, length = _V3.unpack_from(self._raw, _V2.size)
        if length < _COMPRESSION_AT or length % 8 or length > 1 << header.cluster_bits:
            self._corrupt(
                f"header length {length}; it must be a multiple of 8 from {_COMPRESSION_AT} "
                f"to {1 << header.cluster_bits}"
            )
        if order > 6:
            self._corrupt(f"refcounts of 2^{order} bits; allowed are up to 2^6")
        compression = self._raw[_COMPRESSION_AT] if length > _COMPRESSION_AT else 0
        header = replace(
            header,
            incompatible=incompatible,
            compatible=compatible,
            autoclear=autoclear,
            refcount_order=order,
            header_length=length,
            later_fields=self._raw[_COMPRESSION_AT + 1 : length],
        )
        known = not incompatible & ~sum(Incompatible)  # a later version of the format may use the byte differently
        if known and compression not in tuple(Compression):
            self._unsupported(f"compression type {compression}; 0 (zlib) and 1 (zstd) are known")
        if known and bool(compression) != bool(incompatible & Incompatible.COMPRESSION):
            self._corrupt(
                f"compression type {compression} with incompatible features {incompatible:#x}: bit "
                f"{Incompatible.COMPRESSION.bit_length() - 1} must be set exactly where the type is not 0"
            )
        return replace(header, compression=Compression(compression)) if known else header

    def _extensions(self, at: int, end: int) -> tuple[Extension, ...]:
        found: list[Extension] = []
        known: set[int] = set()
        while at < end:
            kind, length = _EXTENSION.unpack(self._raw[at : at + _EXTENSION.size].ljust(_EXTENSION.size, b"\0"))
            at += _EXTENSION.size
            if length > end - at:
                self._corrupt(f"header extension {kind:#x} of {length} bytes at {at:#x} reaches past {end:#x}")
            if kind == ExtensionKind.END:
                break
            if kind in known:
                self._corrupt(f"header extension {kind:#x} occurs twice; it is not known which one is valid")
            if kind in tuple(ExtensionKind):
                known.add(kind)
            found.append(Extension(kind, self._raw[at : at + length]))
            at += -(-length // 8) * 8
        return tuple(found)

    def _check_features(self, header: Header) -> None:
        unknown = header.incompatible & ~sum(Incompatible)
        if unknown:
            table = next((e.data for e in header.extensions if e.kind == ExtensionKind.FEATURE_NAMES), b"")
            names = ", ".join(_feature_names(table, unknown))
            self._unsupported(
                f"unknown incompatible features: {names}",
                "use a version of blkloom that knows them, or copy the disk with the program that made the image",
            )
        extended = header.incompatible & Incompatible.EXTENDED_L2
        if extended and header.cluster_bits < _EXTENDED_CLUSTER_BITS:
            self._corrupt(
                f"extended L2 entries with clusters of {1 << header.cluster_bits} bytes; "
                f"{1 << _EXTENDED_CLUSTER_BITS} is least"
            )
        if header.autoclear & Autoclear.RAW_DATA_FILE and not header.has_data_file:
            self._corrupt(
                f"a raw external data file without the external data file's bit: autoclear features are "
                f"{header.autoclear:#x}, incompatible ones {header.incompatible:#x}"
            )
        said = header.extension(ExtensionKind.BACKING_FORMAT)
        if said is not None and len(said) > _FORMAT_NAME_LIMIT:
            self._corrupt(
                f"a backing file's format with a name of {len(said)} bytes; allowed are up to {_FORMAT_NAME_LIMIT}"
            )
        self._check_bitmaps(header)

    def _check_bitmaps(self, header: Header) -> None:
        extension = header.extension(ExtensionKind.BITMAPS)
        if extension is None:
            return
        if len(extension) != BITMAPS.size:
            self._corrupt(f"a bitmaps extension of {len(extension)} bytes instead of {BITMAPS.size}")
        if not header.autoclear & Autoclear.BITMAPS:
            return  # the program that cleared the bit did not update the bitmaps
        count, reserved, size, offset = BITMAPS.unpack(extension)
        if reserved or not 0 < count <= BITMAPS_LIMIT or not size:
            self._corrupt(
                f"{count} bitmaps in a directory of {size} bytes (reserved field {reserved:#x}); 1 to {BITMAPS_LIMIT} "
                "bitmaps can be, and the reserved field is 0"
            )
        if offset % (1 << header.cluster_bits) or not offset:
            self._corrupt(
                f"the bitmap directory begins at {offset:#x}; it must be a multiple of {1 << header.cluster_bits:#x}, "
                "and not 0"
            )

    def _check_encryption(self, method: int, header: Header) -> None:
        if method == 0:
            if header.extension(ExtensionKind.ENCRYPTION) is not None:
                self._corrupt(
                    f"an encryption extension, and no encryption: header extension {ExtensionKind.ENCRYPTION:#x} is "
                    "there, and the method is 0"
                )
            return
        name = {1: "AES", 2: "LUKS"}.get(method, f"method {method}")
        self._unsupported(
            f"the image is encrypted ({name})", "blkloom reads no encrypted images; qemu-img convert decrypts it"
        )

    def _with_backing(self, header: Header, offset: int, length: int) -> Header:
        if length > min(_BACKING_NAME_LIMIT, (1 << header.cluster_bits) - offset):
            self._corrupt(
                f"a backing file's name of {length} bytes at {offset:#x}; "
                f"{min(_BACKING_NAME_LIMIT, (1 << header.cluster_bits) - offset)} can be there"
            )
        if header.raw_data_file:
            self._corrupt(
                f"a backing file together with a raw external data file (autoclear features {header.autoclear:#x})"
            )
        if not length:
            self._corrupt(f"a backing file's name at {offset:#x} without a length")
        return replace(header, backing_name=self._raw[offset : offset + length], backing_offset=offset)

    def _check_places(self, header: Header) -> None:
        geometry = header.geometry
        if header.size >= DEVICE_LIMIT:
            self._corrupt(f"a disk of {header.size} bytes; allowed are up to {DEVICE_LIMIT - 1}")
        if header.l1_size * 8 > L1_LIMIT:
            self._corrupt(f"an L1 table of {header.l1_size} entries; allowed are up to {L1_LIMIT // 8}")
        if header.l1_size < geometry.l1_entries(header.size):
            self._corrupt(
                f"an L1 table of {header.l1_size} entries for a disk that needs {geometry.l1_entries(header.size)}"
            )
        if not header.refcount_table_clusters or header.refcount_table_clusters << header.cluster_bits > max(
            REFCOUNT_TABLE_LIMIT, geometry.cluster
        ):
            self._corrupt(
                f"a refcount table of {header.refcount_table_clusters} clusters; allowed are 1 to "
                f"{max(REFCOUNT_TABLE_LIMIT, geometry.cluster) >> header.cluster_bits}"
            )
        if header.snapshot_count > SNAPSHOTS_LIMIT:
            self._corrupt(f"{header.snapshot_count} snapshots; allowed are up to {SNAPSHOTS_LIMIT}")
        for what, offset, length in (
            ("L1 table", header.l1_offset, header.l1_size * 8),
            ("refcount table", header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits),
            ("snapshot table", header.snapshot_offset, header.snapshot_count * SNAPSHOT_ENTRY),
        ):
            # The offset of an empty table is checked, too: otherwise it could be anything.
            if offset % geometry.cluster or (length and not offset) or offset + length >= DEVICE_LIMIT:
                self._corrupt(
                    f"the {what} begins at {offset:#x} and has {length} bytes; it must begin at a multiple of "
                    f"{geometry.cluster:#x}, not at 0 unless it is empty, and end below 2^63"
                )

    def _corrupt(self, what: str) -> NoReturn:
        raise CorruptImage(f"header: {what}", path=self._path)

    def _unsupported(self, what: str, cure: str = "convert it with qemu-img") -> NoReturn:
        raise UnsupportedImage(what, path=self._path, cure=cure)


def _feature_names(table: bytes, bits: int) -> list[str]:
    """Names of incompatible features from the image's own table; "bit N" for those without a name."""
    names = {
        bit: name.rstrip(b"\0").decode("ascii", "backslashreplace")
        for kind, bit, name in _FEATURE_NAME.iter_unpack(table[: len(table) // _FEATURE_NAME.size * _FEATURE_NAME.size])
        if kind == 0
    }
    return [names.get(bit) or f"bit {bit}" for bit in range(64) if bits >> bit & 1]
