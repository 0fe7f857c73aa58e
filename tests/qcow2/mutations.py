"""Mutations of valid images: numbers in an image are found and replaced by harmful values.

`fields` lists the positions of an image's numbers, with the help of the slow model. `mutate` changes one to three of
them, changes random bytes, or truncates the file. Pure; the random number generator decides everything.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from . import slow_image as form
from .slow_image import SlowImage

_HEADER_FIELDS = {
    "magic": (0, 4),
    "version": (4, 4),
    "backing file offset": (8, 8),
    "backing file length": (16, 4),
    "cluster bits": (20, 4),
    "size": (24, 8),
    "encryption": (32, 4),
    "L1 size": (36, 4),
    "L1 offset": (40, 8),
    "refcount table offset": (48, 8),
    "refcount table clusters": (56, 4),
    "snapshot count": (60, 4),
    "snapshot offset": (64, 8),
}
_VERSION_3_FIELDS = {
    "incompatible features": (72, 8),
    "compatible features": (80, 8),
    "autoclear features": (88, 8),
    "refcount order": (96, 4),
    "header length": (100, 4),
    "compression type": (104, 1),
}
_SNAPSHOT_FIELDS = {
    "L1 offset": (0, 8),
    "L1 size": (8, 4),
    "id length": (12, 2),
    "name length": (14, 2),
    "VM state size": (32, 4),
    "extra data size": (36, 4),
    "disk size": (48, 8),
}
_BITMAP_FIELDS = {
    "table offset": (0, 8),
    "table size": (8, 4),
    "flags": (12, 4),
    "type": (16, 1),
    "granularity": (17, 1),
    "name length": (18, 2),
    "extra data size": (20, 4),
}
NAMES = (
    b"/etc/passwd",
    b"../../../../../../../etc/passwd",
    b'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
    b"nbd:unix:/tmp/nowhere",
    b"nbd://127.0.0.1:1/x",
    b"file:/etc/passwd",
    b"fat:/etc",
    b"/dev/zero",
    b"/dev/stdin",
    b"/proc/self/mem",
    b"disk.qcow2",
    b".",
    b"",
    b"\0",
    b"a\0b",
    b"\xff\xfe",
    b"x" * 1023,
    b"x" * 1024,
)
"""What an image may call its backing or data file, and must not get."""


@dataclass(frozen=True)
class Field:
    name: str
    offset: int
    width: int


def fields(image: SlowImage) -> list[Field]:
    """All numbers of the metadata, as the unharmed image has them."""
    return list(_fields(image))


def _fields(image: SlowImage) -> Iterator[Field]:
    for name, place in _HEADER_FIELDS.items():
        yield Field(name, *place)
    if image.version >= 3:
        for name, place in _VERSION_3_FIELDS.items():
            yield Field(name, *place)
        yield from _extension_fields(image)
    for number in range(image.l1_size):
        yield Field("L1 entry", image.l1_offset + 8 * number, 8)
    for first in image.l1():
        if at := first & form.OFFSET_MASK:
            for second in range(0, image.cluster, 8):
                yield Field("L2 entry", at + second, 8)
    for number in range(min(image.table_clusters * image.cluster // 8, 64)):
        at = image.table_offset + 8 * number
        yield Field("refcount table entry", at, 8)
        if block := struct.unpack(">Q", image.bytes_at(at, 8))[0]:
            for within in range(0, min(image.cluster, 512), 8):
                yield Field("refcounts", block + within, 8)
    at = image.snapshot_offset
    for snapshot in image.snapshots():
        for name, (offset, width) in _SNAPSHOT_FIELDS.items():
            yield Field(f"snapshot {name}", at + offset, width)
        for number in range(snapshot.l1_size):
            yield Field("snapshot L1 entry", snapshot.l1_offset + 8 * number, 8)
        at += snapshot.length
    yield from _bitmap_fields(image)


def _extension_fields(image: SlowImage) -> Iterator[Field]:
    at = image.header_length
    for kind, data in image.extensions.items():
        yield Field(f"extension {kind:#x} type", at, 4)
        yield Field(f"extension {kind:#x} length", at + 4, 4)
        for within in range(0, min(len(data), 24), 8):
            yield Field(f"extension {kind:#x} data", at + 8 + within, 8)
        at += 8 + (len(data) + 7) // 8 * 8
    yield Field("end of extensions", at, 8)


def _bitmap_fields(image: SlowImage) -> Iterator[Field]:
    if form.BITMAPS not in image.extensions:
        return
    at = struct.unpack(">IIQQ", image.extensions[form.BITMAPS])[3]
    for bitmap in image.bitmaps():
        for name, (offset, width) in _BITMAP_FIELDS.items():
            yield Field(f"bitmap {name}", at + offset, width)
        for number in range(bitmap.table_size):
            yield Field("bitmap table entry", bitmap.table_offset + 8 * number, 8)
        at += (24 + len(bitmap.name.encode()) + 7) // 8 * 8


def mutate(original: bytes, dice: random.Random) -> tuple[bytes, str]:
    """A hostile image, and what was done to it."""
    image = SlowImage(original)
    data = bytearray(original)
    places = fields(image)
    by_name: dict[str, list[Field]] = {}
    for place in places:
        by_name.setdefault(place.name, []).append(place)
    done = []
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        kind = dice.random()
        if kind < 0.8:
            field = dice.choice(by_name[dice.choice(list(by_name))])
            value = _value(image, field, places, dice)
            data[field.offset : field.offset + field.width] = value.to_bytes(field.width, "big")
            done.append(f"{field.name} at {field.offset:#x} = {value:#x}")
        elif kind < 0.88:
            done.append(_rename(image, data, dice))
        elif kind < 0.94:
            at = dice.randrange(len(data))
            count = min(dice.choice([1, 8, 64, 512]), len(data) - at)
            data[at : at + count] = dice.randbytes(count)
            done.append(f"{count} random bytes at {at:#x}")
        else:
            del data[dice.choice([0, 3, 71, 103, 511, dice.randrange(len(data) + 1)]) :]
            done.append(f"cut to {len(data)} bytes")
            break
    return bytes(data), "; ".join(done)


def _value(image: SlowImage, field: Field, places: list[Field], dice: random.Random) -> int:
    """What this field might least like: a limit, another structure's place, a bit flipped."""
    most: int = (1 << 8 * field.width) - 1
    old = int.from_bytes(image.bytes_at(field.offset, field.width), "big")
    flags = dice.choice([0, form.COPIED, form.COMPRESSED, form.ALL_ZERO, old & ~form.OFFSET_MASK])
    size = len(image.data)
    candidates: list[int] = [
        dice.randrange(16),
        most - dice.randrange(2),
        most >> 1,
        (most >> 1) + 1,
        old ^ (1 << dice.randrange(8 * field.width)),
        old + dice.choice([-1, 1, 512, image.cluster, -image.cluster]),
        1 << dice.randrange(8 * field.width),
        dice.randrange(most + 1),
        flags | (size - size % image.cluster),
        flags | (size + image.cluster * dice.choice([1, 1 << 20])),
        flags | (dice.randrange(size // image.cluster + 1) * image.cluster),
        flags | (dice.choice(places).offset // image.cluster * image.cluster),
        flags | dice.choice([image.l1_offset, image.table_offset, image.snapshot_offset]),
    ]
    return dice.choice(candidates) & most


def _rename(image: SlowImage, data: bytearray, dice: random.Random) -> str:
    """Gives it a backing file, or another data file, with a name of the list."""
    name = dice.choice(NAMES)
    if form.DATA_FILE_NAME in image.extensions and dice.random() < 0.7:
        at = bytes(data).find(struct.pack(">I", form.DATA_FILE_NAME), image.header_length)
        room = len(image.extensions[form.DATA_FILE_NAME])
        if at >= 0:
            data[at + 8 : at + 8 + room] = name[:room].ljust(room, b"\0")
            return f"data file {name[:room]!r}"
    at = max(image.cluster - len(name) - 8, 0)
    data[at : at + len(name)] = name
    struct.pack_into(">QI", data, 8, at, len(name))
    return f"backing file {name!r}"
