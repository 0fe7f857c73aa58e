"""Disks with partition tables, made by sfdisk, sgdisk and parted, and by hand for tables that these refuse.

`IMAGES` has one recipe for each name. The unit tests compare blkloom with the tools, the kernel tests compare it with a
kernel's loop device.
"""

from __future__ import annotations

import struct
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blkloom.partitions import Disk, PartitionTable, find_partitions
from conformance.file_systems import needs_root

SIZE = 64 << 20
Program = Callable[[str, str], str]
"""The path of a program of a Debian package; the fixture `program`."""
Edit = Callable[[bytearray], None]


def run(*command: str | Path, said: str = "") -> str:
    """A tool; what it prints."""
    done = subprocess.run([*map(str, command)], input=said, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def disk_of(data: bytes | bytearray, block: int = 512) -> Disk:
    """One that complains about reads that leave it."""

    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data)
        return bytes(data[offset : offset + length])

    return Disk(len(data), block, read)


def found_in(image: Path, block: int = 512) -> PartitionTable:
    """What is in a file."""
    return find_partitions(disk_of(image.read_bytes(), block))


def by_number(table: PartitionTable) -> dict[int, tuple[int, int]]:
    """Start and length in sectors, for comparing."""
    return {partition.number: (partition.start, partition.length) for partition in table.partitions}


# by hand


def mbr(*entries: tuple[int, int, int, int]) -> bytes:
    """A boot record: (flag, type, start, length) each."""
    record = bytearray(512)
    for at, (flag, kind, start, length) in enumerate(entries):
        struct.pack_into("<B3xB3xII", record, 446 + 16 * at, flag, kind, start, length)
    record[510:] = b"\x55\xaa"
    return bytes(record)


def nothing(header: bytearray) -> None:
    """Edits nothing."""


def put(form: str, at: int, *values: int) -> Edit:
    """Changes fields of a GPT header."""
    return lambda header: struct.pack_into(form, header, at, *values)


def gpt(
    *entries: tuple[int, int],
    blocks: int = 4096,
    block: int = 512,
    entry_size: int = 128,
    count: int | None = None,
    edit: Edit = nothing,
    edit_copy: Edit = nothing,
) -> bytearray:
    """A disk with a GPT. entries: first and last block. edit: changes a header before its checksum is
    computed.
    """
    data = bytearray(blocks * block)
    data[:512] = mbr((0, 0xEE, 1, blocks - 1))
    array = bytearray(entry_size * (len(entries) if count is None else count))
    for at, (first, last) in enumerate(entries):
        struct.pack_into("<16s16sQQ", array, at * entry_size, b"t" * 16, b"u" * 16, first, last)
    array_blocks = -(-len(array) // block)
    for here, there, at, change in (
        (1, blocks - 1, 2, edit),
        (blocks - 1, 1, blocks - 1 - array_blocks, edit_copy),
    ):
        header = bytearray(
            struct.pack(
                "<8sIII4xQQQQ16sQIII",
                *(b"EFI PART", 0x10000, 92, 0, here, there, 2 + array_blocks, blocks - 2 - array_blocks),
                *(b"d" * 16, at, len(array) // entry_size, entry_size, zlib.crc32(array)),
            )
        )
        change(header)
        struct.pack_into("<I", header, 16, zlib.crc32(header))
        data[here * block : here * block + 92] = header
        data[at * block : at * block + len(array)] = array
    return data


def with_blocks(records: dict[int, bytes], *, blocks: int = 4096, block: int = 512) -> bytearray:
    """A disk that is empty but for these blocks."""
    data = bytearray(blocks * block)
    for at, record in records.items():
        data[at * block : at * block + len(record)] = record
    return data


# by the tools


@dataclass(frozen=True)
class Image:
    """make: fills the empty disk at a path. block: its logical block size. numbers: of its partitions."""

    make: Callable[[Program, Path], None]
    numbers: list[int]
    block: int = 512


def sfdisk(label: str, *partitions: tuple[int, int, str], block: int = 512) -> Callable[[Program, Path], None]:
    """partitions: start, size (blocks), type. A block size is what a kernel's loop device has."""

    def make(program: Program, path: Path) -> None:
        script = "".join(f"start={start}, size={size}{kind}\n" for start, size, kind in partitions)
        where = str(path)
        if block != 512:
            needs_root(f"a disk with blocks of {block}")
            losetup = program("losetup", "mount")
            where = run(losetup, "--find", "--show", f"--sector-size={block}", path).strip()
        try:
            run(program("sfdisk", "fdisk"), "--quiet", "--no-tell-kernel", where, said=f"label: {label}\n{script}")
        finally:
            if block != 512:
                run(losetup, "--detach", where)

    return make


def sgdisk(*options: str) -> Callable[[Program, Path], None]:
    """With its options."""
    return lambda program, path: void(run(program("sgdisk", "gdisk"), *options, path))


def parted(*commands: str) -> Callable[[Program, Path], None]:
    """With its commands."""
    return lambda program, path: void(run(program("parted", "parted"), "--script", path, *commands))


def bytes_of(data: bytes | bytearray) -> Callable[[Program, Path], None]:
    """By hand."""
    return lambda program, path: void(path.write_bytes(bytes(data).ljust(SIZE, b"\0")))


def void(_: object) -> None:
    """Forgets what a call returns."""


_LOGICAL = ("mkpart", "logical", "33MiB", "40MiB", "mkpart", "logical", "41MiB", "50MiB")
BY_TOOLS = {
    **{
        f"sfdisk-dos-{block}": Image(
            sfdisk(
                "dos",
                *((2048, 4096, ", type=83"), (6144, 100, ", type=82"), (6400, 1900, ", type=5")),
                *((6402, 512, ", type=83"), (7000, 100, ", type=83"), (7200, 800, ", type=83")),
                block=block,
            ),
            [1, 2, 3, 5, 6, 7],
            block,
        )
        for block in (512, 1024, 2048, 4096)
    },
    **{
        f"sfdisk-gpt-{block}": Image(
            sfdisk("gpt", (2048, 4096, ""), (8192, 2048, ', name="with a name"'), block=block), [1, 2], block
        )
        for block in (512, 1024, 2048, 4096)
    },
    "sgdisk": Image(sgdisk("--new=1:2048:+4M", "--new=7:0:+8M", "--new=128:0:0"), [1, 7, 128]),
    "sgdisk-hybrid": Image(sgdisk("--new=1:2048:+4M", "--new=2:0:+8M", "--hybrid=1"), [1, 2]),
    "parted-gpt": Image(
        parted("mklabel", "gpt", "mkpart", "a", "1MiB", "10MiB", "mkpart", "b", "32MiB", "100%"), [1, 2]
    ),
    "parted-dos": Image(
        parted(
            *("mklabel", "msdos", "mkpart", "primary", "1MiB", "10MiB"),
            *("mkpart", "extended", "32MiB", "100%", *_LOGICAL),
        ),
        [1, 2, 5, 6],
    ),
}
BY_HAND = {
    "beyond-the-end": Image(
        bytes_of(mbr((0, 0x83, 100, 200), (0x80, 0x83, 131000, 1000), (0, 0x83, 131072, 8), (0, 0x83, 0xFFFFFFFF, 1))),
        [1, 2],
    ),
    "odd-flags": Image(bytes_of(mbr((0x12, 0x83, 1, 100))), []),
    "gpt-without-protective-mbr": Image(
        bytes_of(mbr((0, 0x83, 100, 50)) + gpt((100, 199), count=128, blocks=SIZE // 512)[512:]), [1]
    ),
    "protective-mbr-without-gpt": Image(bytes_of(mbr((0, 0xEE, 1, 131071), (0, 0x83, 100, 10))), []),
    "gpt-entries-outside": Image(
        bytes_of(
            gpt((100, 199), (200, 131072), (140000, 150000), (0, (1 << 64) - 1), (4000, 4000), blocks=SIZE // 512)
        ),
        [1, 5],
    ),
    "rubbish-in-logical": Image(
        bytes_of(
            with_blocks(
                {
                    0: mbr((0, 5, 100, 100)),
                    100: mbr((0, 0x83, 1, 10), (0, 0, 0, 0), (0, 0x83, 5, 2000), (0, 0x83, 20, 30)),
                }
            )
        ),
        [1, 5, 6],
    ),
    "two-extended": Image(
        bytes_of(
            with_blocks(
                {
                    0: mbr((0, 5, 100, 100), (0, 0x85, 300, 100)),
                    100: mbr((0, 0x83, 1, 10)),
                    300: mbr((0, 0x83, 1, 20)),
                }
            )
        ),
        [1, 2, 5, 6],
    ),
    "empty-records": Image(
        bytes_of(
            with_blocks(
                {0: mbr((0, 5, 100, 1000))} | {100 + at: mbr((0, 0, 0, 0), (0, 5, at + 1, 2)) for at in range(200)}
            )
        ),
        [1],
    ),
    "many": Image(
        bytes_of(
            with_blocks(
                {0: mbr((0, 5, 100, 1000))} | {100 + at: mbr((0, 0x83, 1, 1), (0, 5, at + 1, 2)) for at in range(400)}
            )
        ),
        [1, *range(5, 256)],
    ),
    "many-gpt": Image(
        bytes_of(gpt(*[(1000 + at, 1000 + at) for at in range(300)], count=300, blocks=SIZE // 512)),
        [*range(1, 256)],
    ),
}
IMAGES = BY_TOOLS | BY_HAND


def make(name: str, program: Program, path: Path) -> None:
    """The disk of that name, at `path`."""
    with path.open("wb") as file:
        file.truncate(SIZE)
    IMAGES[name].make(program, path)
