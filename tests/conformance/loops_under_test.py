"""The loop target's modes on kernel file systems, as entries of the conformance suite; `file_systems` makes the file
systems.

Every mode runs on ext4 and xfs, with sectors of 512 and of 4096 bytes. `file`, and modes that fall back to it, run on
the other file systems. Memory file systems are part of the list of the other targets.
"""

from __future__ import annotations

from collections.abc import Iterator

from .file_systems import OVERLAY
from .under_test import UnderTest

EXAMPLES = 3
"""Of each combination: there are many."""


def _modes(place: str) -> Iterator[tuple[str, UnderTest]]:
    """What each of the four file systems is asked for. 1200 sectors and all offsets fit blocks of 4096 bytes."""
    disk = f"{{{place}}}"
    yield "file", UnderTest(f"0 1200 loop {disk}/a", examples=EXAMPLES)
    yield (
        "direct I/O",
        UnderTest(
            f"0 1200 loop {disk}/a 8192 1 direct_io=require\n1200 800 loop {disk}/b 4096 2 direct_io block_size=4096",
            examples=EXAMPLES,
        ),
    )
    yield (
        "block map",
        UnderTest(
            f"0 1200 loop {disk}/a 0 1 block_map\n1200 800 loop {disk}/b 40960 2 block_map block_size=4096",
            allocated=True,
            examples=EXAMPLES,
        ),
    )
    yield (
        "block map, not immutable, two pieces of a file",
        UnderTest(
            f"0 1200 loop {disk}/a 65536 2 block_map immutable=off\n"
            f"1200 512 loop {disk}/a 786432 2 block_map immutable=off",
            allocated=True,
            examples=EXAMPLES,
        ),
    )
    yield (
        "block map with holes, read-only device",
        UnderTest(f"0 2048 loop {disk}/a 0 1 block_map", read_only=True, examples=EXAMPLES),
    )
    yield (
        "block map with holes, read-only in the table, and one to write",
        UnderTest(
            f"0 1000 loop {disk}/a 4096 2 block_map read_only\n1000 8 error\n1008 400 loop {disk}/b 0 1 block_map",
            allocated=True,
            sparse=("a",),
            examples=EXAMPLES,
        ),
    )


LOOPS: dict[str, UnderTest] = {
    f"loop on {place}: {mode}": case for place in ("ext4", "ext4_4k", "xfs", "xfs_4k") for mode, case in _modes(place)
} | {
    "loop on ext4: direct I/O at an odd offset": UnderTest("0 601 loop {ext4}/a 1536 1 direct_io", examples=EXAMPLES),
    "loop on btrfs: file": UnderTest("0 1200 loop {btrfs}/a", examples=EXAMPLES),
    "loop on btrfs: direct I/O": UnderTest("0 1200 loop {btrfs}/a 4096 1 direct_io", examples=EXAMPLES),
    "loop on btrfs: block map that cannot be": UnderTest("0 1200 loop {btrfs}/a 0 1 block_map=try", examples=EXAMPLES),
    "loop on overlay: file": UnderTest(f"0 1200 loop {{{OVERLAY}}}/a", examples=EXAMPLES),
    "loop on overlay: block map that cannot be": UnderTest(
        f"0 1200 loop {{{OVERLAY}}}/a 0 1 block_map=try", examples=EXAMPLES
    ),
    "loop on memory: neither direct I/O nor block map": UnderTest(
        "0 1200 loop {mem}/a 4096 1 direct_io\n1200 100 loop {mem}/b 0 1 block_map=try", examples=EXAMPLES
    ),
}
