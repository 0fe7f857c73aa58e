"""Image headers: they round-trip, and unsupported ones are refused with a name."""

from __future__ import annotations

import re
import struct
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkloom.image.errors import CorruptImage, UnsupportedImage
from blkloom.image.qcow2.format.header import (
    Compression,
    Extension,
    ExtensionKind,
    Header,
    encode,
    encode_fields,
    parse,
    read_header,
)
from blkloom.image.types import HostOffset
from qcow2_by_hand import ByHand, MemoryFile


def good(**fields: object) -> Header:
    return ByHand(1 << 20, header_fields=dict(fields)).header()


def bytes_of(header: Header) -> bytearray:
    return bytearray(encode(header, path="x"))


def parsed(raw: bytes | bytearray) -> Header:
    return parse(bytes(raw), path="x")


@st.composite
def headers(draw: st.DrawFn) -> Header:
    version = draw(st.sampled_from([2, 3]))
    bits = draw(st.integers(9, 21))
    known = st.dictionaries(st.sampled_from([0xE2792ACA, 0x6803F857]), st.binary(max_size=15)).map(dict.items)
    unknown = st.lists(st.tuples(st.just(0x1234), st.binary(max_size=40)), max_size=3)
    pairs = draw(st.permutations([*draw(known), *draw(unknown)]))
    extensions = tuple(Extension(kind, data) for kind, data in pairs)
    later = draw(st.binary(max_size=15).map(lambda data: data.ljust(len(data) + (-len(data) - 1) % 8, b"\0")))
    compression = draw(st.sampled_from(Compression)) if version == 3 else Compression.ZLIB
    l1_size = draw(st.integers(1, 1000))
    return Header(
        version=version,
        cluster_bits=bits,
        size=draw(st.integers(0, l1_size << 2 * bits - 4)),
        l1_size=l1_size,
        l1_offset=HostOffset(draw(st.integers(1, 99)) << bits),
        refcount_table_offset=HostOffset(draw(st.integers(1, 99)) << bits),
        refcount_table_clusters=1,
        incompatible=draw(st.sampled_from([0, 1, 2, 3])) | 8 * bool(compression) if version == 3 else 0,
        compatible=draw(st.integers(0, 2**64 - 1)) if version == 3 else 0,
        autoclear=draw(st.integers(0, 2**62 - 1)) << 2 if version == 3 else 0,
        refcount_order=draw(st.integers(0, 6)) if version == 3 else 4,
        header_length=105 + len(later) if version == 3 else 72,
        compression=compression,
        backing_name=draw(st.none() | st.binary(min_size=1, max_size=60)),
        extensions=extensions,
        later_fields=later if version == 3 else b"",
    )


@given(headers())
def test_what_is_written_is_read_again_with_everything_unknown_in_it(header: Header) -> None:
    found = parsed(encode(header, path="x"))
    assert replace(found, backing_offset=0) == header
    assert encode(found, path="x") == encode(header, path="x")


@given(headers())
def test_the_fields_alone_are_the_beginning_of_the_whole(header: Header) -> None:
    found = parsed(encode(header, path="x"))
    assert encode(found, path="x").startswith(encode_fields(found))
    assert len(encode_fields(found)) == header.header_length


@given(st.binary(max_size=4096), st.integers(0, 4095))
def test_any_bytes_are_a_header_or_refused_as_corrupt_or_unsupported(noise: bytes, at: int) -> None:
    raw = bytes_of(good())
    raw[at : at + len(noise)] = noise
    with suppress(CorruptImage, UnsupportedImage):
        found = parsed(raw[:4096])
        assert found.l1_size * 8 <= 32 << 20
        assert found.l1_size >= found.geometry.l1_entries(found.size)


@pytest.mark.parametrize(
    ("offset", "form", "value", "says"),
    [
        (0, ">4s", b"QFI\0", "no QCOW2 image"),
        (4, ">I", 1, "version 1"),
        (4, ">I", 4, "version 4"),
        (8, ">Q", 4097, "backing file's name begins at 0x1001"),
        (8, ">Q", 80, "backing file's name begins at 0x50"),
        (20, ">I", 8, "2^8 bytes"),
        (20, ">I", 22, "2^22 bytes"),
        (24, ">Q", 1 << 63, "disk of 9223372036854775808 bytes"),
        (24, ">Q", 1 << 32, "L1 table of 1 entries for a disk that needs 2048"),
        (36, ">I", 1 << 31, "L1 table of 2147483648 entries"),
        (40, ">Q", 4097, "L1 table begins at 0x1001"),
        (40, ">Q", 0, "L1 table begins at 0x0"),
        (48, ">Q", 4097, "refcount table begins at 0x1001"),
        (56, ">I", 0, "refcount table of 0 clusters"),
        (56, ">I", 1 << 30, "refcount table of 1073741824 clusters"),
        (60, ">I", 1 << 20, "1048576 snapshots"),
        (60, ">I", 1, "snapshot table begins at 0x0"),
        (96, ">I", 7, "2^7 bits"),
        (100, ">I", 96, "header length 96"),
        (100, ">I", 109, "header length 109"),
        (100, ">I", 1 << 20, "header length 1048576"),
        (104, ">B", 1, "compression type 1 with incompatible features 0x0"),
        (104, ">B", 2, "compression type 2"),
        (79, ">B", 8, "compression type 0 with incompatible features 0x8"),
        (79, ">B", 16, "extended L2 entries with clusters of 4096 bytes"),
        (95, ">B", 2, "raw external data file without"),
        (112, ">II", (0x1234, 4096), "header extension 0x1234 of 4096 bytes"),
        (112, ">II", (0, 4096), "header extension 0x0 of 4096 bytes"),
        (112, ">IIQII", (0xE2792ACA, 3, 0, 0xE2792ACA, 3), "header extension 0xe2792aca occurs twice"),
        (112, ">IIQII", (0x44415441, 3, 0, 0x44415441, 5), "header extension 0x44415441 occurs twice"),
        (112, ">II", (0xE2792ACA, 16), "format with a name of 16 bytes"),
        (112, ">II", (0x23852875, 8), "bitmaps extension of 8 bytes"),
        (112, ">II", (0x23852875, 32), "bitmaps extension of 32 bytes"),
        (112, ">II", (0x0537BE77, 16), "an encryption extension, and no encryption"),
        (8, ">QI", (4000, 0), "backing file's name at 0xfa0 without a length"),
        (64, ">Q", 1, "snapshot table begins at 0x1"),
        (64, ">Q", (1 << 63), "snapshot table begins at 0x8000000000000000"),
        (48, ">Q", (1 << 63) - 4096, "refcount table begins at 0x7ffffffffffff000"),
    ],
)
def test_a_number_that_cannot_be_is_named(offset: int, form: str, value: object, says: str) -> None:
    raw = bytes_of(good())
    struct.pack_into(form, raw, offset, *(value if isinstance(value, tuple) else (value,)))
    with pytest.raises((CorruptImage, UnsupportedImage)) as refused:
        parsed(raw)
    assert says in str(refused.value)
    assert len(re.findall(r"\d+", refused.value.what)) >= 2, "what is there, and what may be"
    assert refused.value.cure


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ((0, 0, 64, 4096), "0 bitmaps"),
        ((1 << 16, 0, 64, 4096), "65536 bitmaps"),
        ((1, 7, 64, 4096), "reserved field 0x7"),
        ((1, 0, 0, 4096), "directory of 0 bytes"),
        ((1, 0, 64, 0), "bitmap directory begins at 0x0"),
        ((1, 0, 64, 4097), "bitmap directory begins at 0x1001"),
    ],
)
def test_bitmaps_that_cannot_be_are_refused_where_the_header_vouches_for_them(
    fields: tuple[int, int, int, int], says: str
) -> None:
    extension = Extension(ExtensionKind.BITMAPS, struct.pack(">IIQQ", *fields))
    assert parsed(bytes_of(good(extensions=(extension,)))).extensions == (extension,)
    with pytest.raises(CorruptImage, match=says):
        parsed(bytes_of(good(extensions=(extension,), autoclear=1)))


@pytest.mark.parametrize(("method", "name"), [(1, "AES"), (2, "LUKS"), (3, "method 3")])
def test_an_encrypted_image_is_refused_with_the_name_of_its_cipher(method: int, name: str) -> None:
    raw = bytes_of(good())
    struct.pack_into(">I", raw, 32, method)
    with pytest.raises(UnsupportedImage, match=name):
        parsed(raw)


def test_unknown_features_are_refused_with_the_names_the_image_gives_them() -> None:
    names = struct.pack(">BB46s", 0, 40, b"time travel") + struct.pack(">BB46s", 1, 41, b"of another kind")
    header = good(incompatible=1 << 40 | 1 << 41, extensions=(Extension(ExtensionKind.FEATURE_NAMES, names),))
    with pytest.raises(UnsupportedImage, match=r"unknown incompatible features: time travel, bit 41"):
        parsed(bytes_of(header))


def test_a_backing_name_longer_than_the_rest_of_its_cluster_is_refused() -> None:
    raw = bytes_of(ByHand(1 << 20, backing=b"base").header())
    struct.pack_into(">I", raw, 16, 1023)
    struct.pack_into(">Q", raw, 8, 4090)
    with pytest.raises(CorruptImage, match="name of 1023 bytes at 0xffa"):
        parsed(raw)


def test_a_backing_file_beside_a_raw_data_file_is_refused() -> None:
    header = ByHand(1 << 20, backing=b"base", header_fields={"incompatible": 4, "autoclear": 2}).header()
    with pytest.raises(CorruptImage, match="backing file together with a raw external data file"):
        parsed(bytes_of(header))


def test_a_file_shorter_than_a_header_is_no_image() -> None:
    for length in (0, 3, 4, 20, 71):
        with pytest.raises(CorruptImage, match=f"no QCOW2 image: the file ends after {length} bytes"):
            read_header(MemoryFile(bytes(bytes_of(good()))[:length]))  # type: ignore[arg-type] # only reads


def test_a_header_too_long_for_its_cluster_is_not_written() -> None:
    header = ByHand(1 << 20, cluster_bits=9, backing=b"x" * 480).header()
    with pytest.raises(CorruptImage, match="does not fit into a cluster of 512"):
        encode(header, path="x")
