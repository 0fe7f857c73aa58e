"""List of the targets for the conformance suite; each entry has a table and its requirements.

`{mem}` and `{disk}` are directories on a memory file system and on the file system of the disk. Every file that a table
names exists there and has FILE bytes. `{blk}` has links `a` and `b` to block devices of that size; `{ext4}` and similar
names are directories of `file_systems`. The model reads the same text.
"""

from __future__ import annotations

import random

import numpy as np

from blkloom.examples.pattern import Pattern

from .backed import Backed
from .backing_files import FILE
from .growing import AsyncGrowing, Growing
from .loops_under_test import LOOPS
from .under_test import UnderTest

PATTERN = np.arange(0, FILE, 8, dtype=">u8").tobytes()


def _many(segments: int) -> str:
    """A table of many short lines of all kinds, the same on every run."""
    chance, at, lines = random.Random(24), 0, []
    for number in range(segments):
        length = chance.choice([1, 2, 7, 8, 15, 64, 100])
        target = chance.choice(["zero", "error", "mem", "mem", "disk", "disk", "linear", "linear"])
        place = number * 32 % 1900  # sectors; places never overlap, 100 sectors fit behind the last
        if target in ("zero", "error"):
            lines.append(f"{at} {length} {target}")
        elif target == "linear":
            lines.append(f"{at} {min(length, 32)} linear {{mem}}/l {place}")
            length = min(length, 32)
        else:
            lines.append(f"{at} {min(length, 32)} loop {{{target}}}/m {place * 512}")
            length = min(length, 32)
        at += length
    return "\n".join(lines)


TARGETS: dict[str, UnderTest] = {
    "loop on memory": UnderTest("0 1200 loop {mem}/a"),
    "loop on disk": UnderTest("0 1200 loop {disk}/a"),
    "loop, direct I/O": UnderTest("0 1200 loop {disk}/a 0 1 direct_io"),
    "loop, direct I/O, odd offset": UnderTest("0 601 loop {disk}/a 1536 1 direct_io"),
    "loop on several files": UnderTest(
        "0 100 loop {mem}/a 512\n100 33 loop {disk}/b 1024\n133 300 loop {mem}/a 524288\n433 500 loop {disk}/c"
    ),
    "loop, read-only in the table": UnderTest("0 100 loop {mem}/a 0 1 read_only\n100 100 loop {disk}/b"),
    "loop, read-only device": UnderTest("0 700 loop {mem}/a\n700 700 loop {disk}/b 2560", read_only=True),
    "loop, rounded up": UnderTest(
        "0 3 loop {mem}/a 0 1 round_up\n3 40 loop {disk}/b 1024 1 round_up", cut={"a": 1300, "b": 1024 + 40 * 512 - 1}
    ),
    "loop, rounded up, read-only": UnderTest("0 9 loop {disk}/a 0 2 read_only round_up", cut={"a": 8 * 512 + 7}),
    "linear on a file": UnderTest("0 1000 linear {mem}/a 17\n1000 500 linear {disk}/b 0"),
    "linear, direct I/O": UnderTest("0 1000 linear {disk}/b 3", direct_io=True),
    "linear on a device": UnderTest(
        "0 900 linear blkloom:lower 5\n900 5 linear blkloom:lower 0",
        below={"lower": "0 300 loop {mem}/a\n300 300 loop {disk}/b\n600 10 zero\n610 600 loop {mem}/c"},
    ),
    "linear on a device on a device": UnderTest(
        "0 300 linear blkloom:middle 50",
        below={
            "lowest": "0 100 loop {mem}/a\n100 5 error\n105 500 growing",
            "middle": "0 400 linear blkloom:lowest 7",
        },
        targets=(Growing,),
        own={"growing": b""},
    ),
    "linear on block devices": UnderTest("0 1000 linear {blk}/a 17\n1000 500 linear {blk}/b 0"),
    "linear on block devices, direct I/O": UnderTest(
        "0 1000 linear {blk}/a 17\n1000 500 linear {disk}/b 0", direct_io=True
    ),
    "loop on a block device": UnderTest("0 1200 loop {blk}/a 1536\n1200 100 loop {mem}/b"),
    "striped on block devices": UnderTest("0 1260 striped 3 7 {blk}/a 1 {disk}/b 0 {blk}/b 5"),
    "linear, read-only device": UnderTest("0 1000 linear {disk}/b 3", read_only=True),
    "striped, odd chunk": UnderTest("0 1260 striped 3 7 {mem}/a 1 {disk}/b 0 {mem}/c 5"),
    "striped, large chunk": UnderTest("0 1024 striped 2 128 {disk}/a 0 {disk}/b 8"),
    "striped on one leg": UnderTest("0 60 striped 1 3 {mem}/a 2"),
    "striped on devices": UnderTest(
        "0 600 striped 2 5 blkloom:lower 0 {mem}/c 9", below={"lower": "0 150 loop {disk}/a\n150 150 loop {mem}/b"}
    ),
    "striped, direct I/O": UnderTest("0 900 striped 2 9 {disk}/a 0 {disk}/b 8", direct_io=True),
    "striped, read-only device": UnderTest("0 900 striped 2 9 {disk}/a 0 {mem}/b 8", read_only=True),
    "unstriped": UnderTest("0 210 unstriped 3 7 2 {mem}/a 4\n210 300 unstriped 1 100 0 {disk}/b 1"),
    "unstriped, direct I/O, on a striped device": UnderTest(
        "0 90 unstriped 2 9 1 blkloom:striped 0\n90 45 unstriped 2 9 0 {disk}/c 3",
        below={"striped": "0 900 striped 2 9 {disk}/a 0 {mem}/b 8"},
        direct_io=True,
    ),
    "delay": UnderTest("0 500 delay {disk}/b 3 1\n500 400 delay {mem}/a 0 0 {mem}/a 0 2 {mem}/a 0 1", examples=8),
    "delay on a delay": UnderTest(
        "0 90 delay blkloom:lower 5 1", below={"lower": "0 99 delay {mem}/a 1 1"}, examples=8
    ),
    "flakey, up": UnderTest("0 500 flakey {disk}/b 3 1000000 0\n500 400 flakey {mem}/a 0 1000000 1 1 drop_writes"),
    "flakey, with corruption that matches nothing": UnderTest(
        "0 500 flakey {disk}/b 3 0 9 5 corrupt_bio_byte 2 w 7 1\n"
        "500 400 flakey {mem}/a 0 0 9 5 corrupt_bio_byte 1 r 7 1"
    ),
    "dust": UnderTest("0 500 dust {disk}/b 3 512\n500 400 dust {mem}/a 0 4096"),
    "mirror": UnderTest("0 500 mirror core 1 16 2 {disk}/b 3 {mem}/a 3", examples=8),
    "mirror, three legs": UnderTest("0 1200 mirror core 1 64 3 {disk}/b 0 {mem}/a 5 {mem}/c 9", examples=8),
    "mirror, read-only device": UnderTest("0 500 mirror core 1 16 2 {disk}/b 3 {mem}/a 3", read_only=True),
    "pause": UnderTest("0 500 pause {disk}/b 3\n500 400 pause {mem}/a 0 0"),
    "throttle": UnderTest("0 500 throttle {disk}/b 3\n500 400 throttle {mem}/a 0 2 iops=100000 bps=1000000000"),
    "filters, read-only device": UnderTest(
        "0 100 flakey {disk}/b 3 9 0\n100 100 throttle {mem}/a 0\n200 99 dust {mem}/a 0 512\n299 7 pause {mem}/b 1",
        read_only=True,
    ),
    "log-writes": UnderTest("0 500 log-writes {disk}/b {mem}/log", examples=8),
    "log-writes, read-only device": UnderTest("0 500 log-writes {disk}/b {mem}/log", read_only=True),
    "torn": UnderTest("0 500 torn {disk}/b 3\n500 400 torn {mem}/a 0 2 block=4096 memory=8m", examples=8),
    "full": UnderTest("0 500 full {disk}/b 3 10m\n500 400 full {mem}/a 0 1g", examples=8),
    "full, read-only device": UnderTest("0 500 full {disk}/b 3 0", read_only=True),
    "snapshot, persistent": UnderTest(
        "0 1000 snapshot blkloom:lower blkloom:cow P 8",
        below={"lower": "0 1000 linear {disk}/a 3", "cow": "0 8192 ram"},
        examples=8,
    ),
    "snapshot, transient, on files": UnderTest("0 1000 snapshot {disk}/a {mem}/cow N 1", examples=8),
    "snapshot-origin": UnderTest("0 1000 snapshot-origin {disk}/a", examples=8),
    "zero": UnderTest("0 1000 zero"),
    "zero, read-only device": UnderTest("0 1000 zero", read_only=True),
    "error": UnderTest("0 1000 error"),
    "ram": UnderTest("0 4096 ram"),
    "ram, preallocated": UnderTest("0 1000 ram 1 preallocate"),
    "ram, read-only device": UnderTest("0 1000 ram", read_only=True),
    "pattern": UnderTest("0 1000 pattern", targets=(Pattern,), own={"pattern": PATTERN}),
    "pattern, read-only device": UnderTest("0 777 pattern", True, targets=(Pattern,), own={"pattern": PATTERN}),
    "growing": UnderTest("0 1001 growing", targets=(Growing,), own={"growing": b""}),
    "growing, read-only device": UnderTest("0 99 growing", True, targets=(Growing,), own={"growing": b""}),
    "two growing": UnderTest("0 5 growing\n5 7 zero\n12 600 growing", targets=(Growing,), own={"growing": b""}),
    "growing, in coroutines": UnderTest("0 1001 async-growing", targets=(AsyncGrowing,), own={"async-growing": b""}),
    "growing, in coroutines, read-only device": UnderTest(
        "0 99 async-growing", True, targets=(AsyncGrowing,), own={"async-growing": b""}
    ),
    "linear on growing in coroutines, and beside others": UnderTest(
        "0 300 linear blkloom:below 50\n300 5 growing\n305 200 async-growing\n505 100 loop {mem}/a",
        below={"below": "0 5 async-growing\n5 7 zero\n12 600 async-growing"},
        targets=(AsyncGrowing, Growing),
        own={"async-growing": b"", "growing": b""},
    ),
    "backed": UnderTest("0 501 backed", targets=(Backed,), own={"backed": b""}),
    "backed, read-only device": UnderTest("0 99 backed", True, targets=(Backed,), own={"backed": b""}),
    "backed, under others": UnderTest(
        "0 300 linear blkloom:below 50\n300 100 backed\n400 90 striped 2 9 blkloom:below 1 {mem}/b 0",
        below={"below": "0 5 backed\n5 7 zero\n12 600 backed"},
        targets=(Backed,),
        own={"backed": b""},
    ),
    "mixed": UnderTest(
        "0 9 pattern\n9 40 loop {mem}/a 4608\n49 1 error\n50 60 growing\n110 200 zero\n310 90 striped 2 9 {mem}/b 0 "
        "{disk}/c 0\n400 100 linear blkloom:memory 3\n500 8 error\n508 300 loop {disk}/d 0 1 read_only",
        below={"memory": "0 128 ram"},
        targets=(Pattern, Growing),
        own={"pattern": PATTERN, "growing": b""},
    ),
    "sixty segments": UnderTest(_many(60)),
    **LOOPS,
}
