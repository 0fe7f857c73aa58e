"""Program that writes the stored corpus: `cd tests; python -m qcow2.make_corpus`. Needs QEMU's tools.

Each image has one error that an attacker could make. The name of the file has the error and the expected outcome:
`refused_` images are not opened, `broken_` images open but some ranges cannot be read, `reads_` images read completely
and as in QEMU. The images are stored and not made by the tests, so that new versions of QEMU do not change them.
"""

from __future__ import annotations

import gzip
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from . import slow_image as form
from .mutations import NAMES
from .shapes import Shape, make
from .slow_image import SlowImage

CORPUS = Path(__file__).with_name("corpus")
_SIZE = 32 << 10
_PLAIN = Shape(cluster_bits=9, refcount_bits=16)
_SHAPES = {
    "plain": _PLAIN,
    "v2": Shape(version=2, cluster_bits=9),
    "compressed": Shape(cluster_bits=12, compressed=True),
    "zstd": Shape(cluster_bits=12, compressed=True, compression="zstd"),
    "snapshot": Shape(cluster_bits=9, snapshots=1),
    "bitmap": Shape(cluster_bits=9, bitmap=True),
    "extended": Shape(cluster_bits=14, extended=True),
    "backed": Shape(cluster_bits=9, backing="qcow2"),
    "data_file": Shape(cluster_bits=9, data_file="cooked"),
    "raw_data_file": Shape(cluster_bits=9, data_file="raw"),
    "wide": Shape(cluster_bits=9, refcount_bits=64),
    "narrow": Shape(cluster_bits=9, refcount_bits=1),
}
_ALONE = {name for name, shape in _SHAPES.items() if not shape.backing and not shape.data_file}
"""Images that need no second file; only these are stored."""

Harm = Callable[[SlowImage, bytearray], None]


def _put(offset: int, layout: str, *values: int) -> Harm:
    return lambda image, data: struct.pack_into(layout, data, offset, *values)


def _l1(layout: Callable[[SlowImage], int]) -> Harm:
    return lambda image, data: struct.pack_into(">Q", data, image.l1_offset, layout(image))


def _l2(layout: Callable[[SlowImage], int]) -> Harm:
    """Changes the first entry of the first L2 table."""

    def harm(image: SlowImage, data: bytearray) -> None:
        at = next(entry for entry in image.l1() if entry) & form.OFFSET_MASK
        struct.pack_into(">Q", data, at, layout(image))

    return harm


def _backing(name: bytes) -> Harm:
    def harm(image: SlowImage, data: bytearray) -> None:
        at = image.cluster - len(name)
        data[at : image.cluster] = name
        struct.pack_into(">QI", data, 8, at, len(name))

    return harm


def _extension(kind: int, length: int, content: bytes = b"") -> Harm:
    """In place of those there are."""

    def harm(image: SlowImage, data: bytearray) -> None:
        at = image.header_length
        data[at : image.cluster] = bytes(image.cluster - at)
        struct.pack_into(">II", data, at, kind, length)
        data[at + 8 : at + 8 + len(content)] = content

    return harm


def _first_compressed(image: SlowImage) -> int:
    return next(entry for n in range(8) if (entry := image.l2_entry(image.l1(), n)[0]) & form.COMPRESSED)


def _inflating(image: SlowImage, data: bytearray) -> None:
    """One compressed cluster that becomes a megabyte."""
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = packer.compress(bytes(1 << 20)) + packer.flush()
    offset, _ = image.compressed_place(_first_compressed(image))
    data[offset : offset + len(packed)] = packed


def _no_deflate(image: SlowImage, data: bytearray) -> None:
    offset, length = image.compressed_place(_first_compressed(image))
    data[offset : offset + length] = b"\xff" * length


def _huge_l1(image: SlowImage, data: bytearray) -> None:
    """As large as an L1 may be, and all of it a hole past the end."""
    struct.pack_into(">Q", data, 24, (32 << 20) // 8 * 64 * 512)
    struct.pack_into(">I", data, 36, (32 << 20) // 8)


def _snapshot_field(offset: int, layout: str, value: int) -> Harm:
    return lambda image, data: struct.pack_into(layout, data, image.snapshot_offset + offset, value)


def _bitmap_field(offset: int, layout: str, value: int) -> Harm:
    def harm(image: SlowImage, data: bytearray) -> None:
        at = struct.unpack(">IIQQ", image.extensions[form.BITMAPS])[3]
        struct.pack_into(layout, data, at + offset, value)

    return harm


def _cut(length: int) -> Harm:
    def harm(image: SlowImage, data: bytearray) -> None:
        del data[length:]

    return harm


_REFUSED: dict[str, tuple[str, Harm]] = {
    "version_1": ("plain", _put(4, ">I", 1)),
    "version_4": ("plain", _put(4, ">I", 4)),
    "clusters_of_256_bytes": ("plain", _put(20, ">I", 8)),
    "clusters_of_4_mib": ("plain", _put(20, ">I", 22)),
    "cluster_bits_beyond_all": ("plain", _put(20, ">I", 0xFFFFFFFF)),
    "size_beyond_l1": ("plain", _put(24, ">Q", 1 << 30)),
    "size_beyond_all": ("plain", _put(24, ">Q", (1 << 64) - 1)),
    "aes": ("plain", _put(32, ">I", 1)),
    "luks": ("plain", _put(32, ">I", 2)),
    "unknown_encryption": ("plain", _put(32, ">I", 3)),
    "l1_of_32_gib": ("plain", _put(36, ">I", 0xFFFFFFFF)),
    "l1_in_a_hole_past_the_end": ("plain", _huge_l1),
    "l1_past_the_end": ("plain", _put(40, ">Q", 1 << 40)),
    "l1_not_aligned": ("plain", _put(40, ">Q", 513)),
    "refcount_table_not_aligned": ("plain", _put(48, ">Q", 700)),
    "refcount_table_of_2_tib": ("plain", _put(56, ">I", 0xFFFFFFFF)),
    "no_refcount_table": ("plain", _put(56, ">I", 0)),
    "snapshots_without_number": ("snapshot", _put(60, ">I", 0xFFFFFFFF)),
    "unknown_incompatible_feature": ("plain", _put(72, ">Q", 1 << 40)),
    "refcounts_of_128_bits": ("plain", _put(96, ">I", 7)),
    "header_longer_than_a_cluster": ("plain", _put(100, ">I", 1 << 20)),
    "header_too_short": ("plain", _put(100, ">I", 96)),
    "header_not_of_eights": ("plain", _put(100, ">I", 105)),
    "unknown_compression": ("zstd", _put(104, ">B", 9)),
    "compression_without_its_bit": ("plain", _put(104, ">B", 1)),
    "subclusters_in_small_clusters": ("plain", _put(72, ">Q", form.EXTENDED)),
    "extension_past_the_cluster": ("plain", _extension(0x12345678, 1 << 16)),
    "extension_of_4_gib": ("plain", _extension(0x12345678, 0xFFFFFFFF)),
    "cut_in_the_header": ("plain", _cut(71)),
    "cut_in_version_3": ("plain", _cut(90)),
    "empty_file_but_the_magic": ("plain", _cut(4)),
    "backing_name_past_the_cluster": ("plain", _put(8, ">QI", 500, 200)),
    "backing_name_too_long": ("plain", _put(8, ">QI", 200, 1024)),
    "data_file_without_a_name": ("plain", _put(72, ">Q", form.DATA_FILE)),
    **{
        f"backing_{word}": ("plain", _backing(name))
        for word, name in {
            "absolute": NAMES[0],
            "climbing": NAMES[1],
            "json": NAMES[2],
            "nbd": NAMES[3],
            "nbd_uri": NAMES[4],
            "file_protocol": NAMES[5],
            "device": NAMES[7],
            "itself": NAMES[10],
            "folder": NAMES[11],
            "nul": NAMES[13],
            "not_utf8": NAMES[15],
        }.items()
    },
}
_BROKEN: dict[str, tuple[str, Harm]] = {
    "cluster_past_the_end": ("plain", _l2(lambda image: form.COPIED | 1 << 30)),
    "l2_past_the_end": ("plain", _l1(lambda image: form.COPIED | 1 << 40)),
    "l2_not_aligned": ("wide", _l1(lambda image: form.COPIED | 0x7FFFFFFFFFFE00 & ~512 | 1)),
    "cluster_not_aligned": ("extended", _l2(lambda image: form.COPIED | 0x4200)),
    "cluster_past_56_bits": ("plain", _l2(lambda image: form.COPIED | 0x00FFFFFFFFFFFE00)),
    "compressed_is_noise": ("compressed", _no_deflate),
    "zstd_is_noise": ("zstd", _no_deflate),
    "compressed_past_the_end": ("compressed", _l2(lambda image: form.COMPRESSED | 1 << 40)),
}
_READS: dict[str, tuple[str, Harm]] = {
    "no_bytes": ("plain", _put(24, ">Q", 0)),
    "snapshots_past_the_end": ("snapshot", _put(64, ">Q", 1 << 40)),
    "refcount_table_past_the_end": ("plain", _put(48, ">Q", 1 << 40)),
    "compressed_inflates": ("compressed", _inflating),
    **{name: (name, lambda image, data: None) for name in sorted(_ALONE)},
    "unknown_extension": ("plain", _extension(0x12345678, 5, b"hello")),
    "unknown_autoclear": ("plain", _put(88, ">Q", 1 << 33)),
    "unknown_compatible": ("plain", _put(80, ">Q", 1 << 33)),
    "bitmap_table_without_end": ("bitmap", _bitmap_field(8, ">I", 0xFFFFFFFF)),
    "bitmap_directory_past_the_end": ("bitmap", lambda image, data: _bitmap_elsewhere(image, data)),
    "bitmap_granularity": ("bitmap", _bitmap_field(17, ">B", 255)),
    "bitmap_name_without_end": ("bitmap", _bitmap_field(18, ">H", 0xFFFF)),
    "refcount_block_past_the_end": (
        "plain",
        lambda image, data: struct.pack_into(">Q", data, image.table_offset, 1 << 40),
    ),
    "refcounts_all_zero": (
        "plain",
        lambda image, data: struct.pack_into(">Q", data, image.table_offset, 0),
    ),
    "l2_is_the_header": ("narrow", _l1(lambda image: form.COPIED)),
    "cluster_is_the_header": ("plain", _l2(lambda image: form.COPIED | image.l1_offset)),
    "marked_corrupt": ("plain", _put(72, ">Q", form.CORRUPT)),
    "marked_dirty": ("plain", _put(72, ">Q", form.DIRTY)),
}


def _bitmap_elsewhere(image: SlowImage, data: bytearray) -> None:
    at = bytes(data).find(struct.pack(">I", form.BITMAPS), image.header_length)
    struct.pack_into(">Q", data, at + 8 + 16, 1 << 40)


def images() -> Iterator[tuple[str, bytes]]:
    """All of them: name and content."""
    with tempfile.TemporaryDirectory() as folder:
        whole = {}
        for name, shape in _SHAPES.items():
            if name in _ALONE:
                made = make(Path(folder), shape, size=_SIZE, seed=1, name=name)
                whole[name] = made.path.read_bytes()
    for manner, harms in (("refused", _REFUSED), ("broken", _BROKEN), ("reads", _READS)):
        for what, (name, harm) in harms.items():
            data = bytearray(whole[name])
            harm(SlowImage(whole[name]), data)
            yield f"{manner}_{what}", bytes(data)


def stored() -> dict[str, bytes]:
    """What is in the corpus, by name."""
    return {path.name.removesuffix(".gz"): gzip.decompress(path.read_bytes()) for path in sorted(CORPUS.glob("*.gz"))}


def unharmed() -> dict[str, bytes]:
    """Those in the corpus with nothing wrong: what to begin from."""
    return {name: data for name, data in stored().items() if name.removeprefix("reads_") in _ALONE}


if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    for name, data in images():
        (CORPUS / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
