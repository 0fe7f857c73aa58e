"""The rows of QCOW2 images: blkloom compared with qemu-nbd on the same image with the same client.

The goals of the first rows come from dm-qcow2, which was 1.84 (4K reads) and 3.18 (4K writes) times as fast as
qemu-nbd, with two jobs of queue depth 8 on a preallocated image (Tkhai 2020).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from jobs import Job, Pattern
from measuring import Workload
from peers import NullServer
from qcow2_images import Compression, Qcow2Image
from qcow2_peers import BlkloomQcow2, OpenedQcow2, QemuNbdQcow2, qemu_nbd
from results import Goal, TableName

_OURS: Final = "blkloom qcow2"
_QEMU: Final = "qemu-nbd"
_EMPTY_FILE: Final = "blkloom loop, an empty file"
_NULL: Final = NullServer()
"""What this client and machine can do at all; beside the rows where that is the limit."""
_FLOOR: Final = _NULL.family
_KIB: Final = 1024
_MIB: Final = 1024 * _KIB
_SMALL: Final = 256 * _MIB
_COMPRESSED: Final = 64 * _MIB
_LARGE: Final = 512 * _MIB
_HUGE: Final = 1 << 40
_HUGE_METADATA: Final = 128 * _MIB
"""Of a 1 TiB image with clusters of 64 KiB: eight bytes a cluster."""
_FILLED: Final = Qcow2Image(filled=True)
_COMPRESSIONS: Final[tuple[Compression, ...]] = ("zlib", "zstd")


def qcow2_workloads(blkloom: str) -> list[Workload]:
    """All workloads, in the order of the report. blkloom: the command to measure."""
    return [
        *_preallocated(blkloom),
        *_empty(blkloom),
        *_on_disk(blkloom),
        *_backed(blkloom),
        *_chains(blkloom),
        *_compressed(blkloom),
        *_huge(blkloom),
        _against_raw(blkloom),
    ]


def _preallocated(blkloom: str) -> list[Workload]:
    """Rows on a preallocated image; 4K is dm-qcow2's own test."""
    ours = BlkloomQcow2(blkloom, _OURS, _FILLED)
    sides: tuple[Pattern, ...] = ("randread", "randwrite")
    rows: tuple[tuple[str, int, float, str, TableName], ...] = (
        ("4K", 4 * _KIB, 3.0, "dm-qcow2", "mails"),
        ("64K", 64 * _KIB, 1.5, "qcow2", "qcow2"),
        ("1M", _MIB, 1.5, "qcow2", "qcow2"),
    )
    return [
        Workload(
            f"qcow2-{pattern}-{name.lower()}-c2-q8",
            f"{about}: {name} {pattern}, 2 connections, qd 8, a preallocated image",
            Job(pattern, block, depth=8, connections=2),
            (ours, *qemu_nbd(_FILLED, block), _NULL),
            (Goal(_OURS, _QEMU, at_least, floor=_FLOOR, headline=bar), Goal(_OURS, _FLOOR, floor=_FLOOR)),
            table,
        )
        for name, block, at_least, about, table in rows
        for pattern in sides
        for bar in [f"dm-qcow2's test, {name} {pattern}: qcow2 / qemu-nbd" if table == "mails" else ""]
    ]


def _empty(blkloom: str) -> list[Workload]:
    """Rows that fill an empty image. The floor is an empty file without the format."""
    image = Qcow2Image(size=_SMALL)
    rows = (
        ("randwrite-4k-q16", Job("randwrite", 4 * _KIB, depth=16), "4K randwrite, qd 16", 4.0),
        ("write-64k", Job("write", 64 * _KIB, depth=16), "64K sequential write, qd 16", 3.0),
        ("write-1m", Job("write", _MIB, depth=16), "1M sequential write, qd 16", 3.0),
    )
    return [
        Workload(
            f"qcow2-empty-{name}",
            f"qcow2: {title}, once over an empty image",
            job,
            (
                BlkloomQcow2(blkloom, _OURS, image, anew=True),
                *qemu_nbd(image, job.block, anew=True),
                BlkloomQcow2(blkloom, _EMPTY_FILE, replace(image, raw=True), anew=True),
            ),
            (
                Goal(_OURS, _QEMU, at_least, floor=_EMPTY_FILE),
                Goal(_OURS, _EMPTY_FILE, floor=_EMPTY_FILE),
            ),
            "qcow2",
        )
        for name, job, title, at_least in rows
    ]


def _on_disk(blkloom: str) -> list[Workload]:
    """Rows that fill an image on a disk, where the file system must allocate space and the disk is the bottleneck. Both
    servers use their better mode, with or without the page cache.
    """
    rows: tuple[tuple[str, Pattern, int, str, int], ...] = (
        ("randwrite-4k-q16", "randwrite", 4 * _KIB, "4K randwrite", _SMALL),
        ("write-64k", "write", 64 * _KIB, "64K sequential write", _LARGE),
        ("write-1m", "write", _MIB, "1M sequential write", _LARGE),
    )
    return [
        Workload(
            f"qcow2-disk-{name}",
            f"qcow2: {title}, qd 16, once over an empty image on ext4, and a flush",
            Job(pattern, block, depth=16, flush="end"),
            (
                *(BlkloomQcow2(blkloom, _OURS, image, anew=True, direct=direct) for direct in (False, True)),
                *qemu_nbd(image, block, anew=True),
            ),
            (Goal(_OURS, _QEMU),),
            "qcow2",
        )
        for name, pattern, block, title, size in rows
        for image in [Qcow2Image(size=size, on_disk=True)]
    ]


def _backed(blkloom: str) -> list[Workload]:
    image = Qcow2Image(size=_SMALL, layers=1)
    return [
        Workload(
            "qcow2-backed-randwrite-4k-c2-q8",
            "qcow2: 4K randwrite, 2 connections, qd 8, once over an empty image with a full backing file",
            Job("randwrite", 4 * _KIB, depth=8, connections=2),
            (BlkloomQcow2(blkloom, _OURS, image, anew=True), *qemu_nbd(image, 4 * _KIB, anew=True), _NULL),
            (Goal(_OURS, _QEMU, 2.0, floor=_FLOOR), Goal(_OURS, _FLOOR, floor=_FLOOR)),
            "qcow2",
        )
    ]


def _chains(blkloom: str) -> list[Workload]:
    """Rows on backing chains with all data in the lowest image. qemu-nbd has one setting here, because a chain slows it
    down by more than its settings differ.
    """

    def named(family: str, depth: int) -> str:
        return f"{family}, a chain of {depth}"

    depths = (1, 64)
    images = {depth: Qcow2Image(size=_SMALL, filled=depth == 1, layers=depth - 1) for depth in depths}
    ours = [BlkloomQcow2(blkloom, named(_OURS, depth), images[depth]) for depth in depths]
    theirs = [QemuNbdQcow2("io_uring", "writeback", images[n], family=named(_QEMU, n)) for n in depths]
    goals = [Goal(named(_OURS, depth), named(_OURS, 1), 0.9) for depth in depths[1:]]
    against = [Goal(named(_OURS, depth), named(_QEMU, depth)) for depth in depths]
    return [
        Workload(
            "qcow2-chain-randread-4k-q16",
            "qcow2: 4K randread, qd 16, through a chain of images",
            Job("randread", 4 * _KIB, depth=16),
            (*ours, *theirs),
            (*goals, *against),
            "qcow2",
        )
    ]


def _compressed(blkloom: str) -> list[Workload]:
    found = []
    for compression in _COMPRESSIONS:
        image = Qcow2Image(size=_COMPRESSED, compression=compression)
        found.append(
            Workload(
                f"qcow2-{compression}-randread-64k-q8",
                f"qcow2: 64K randread, qd 8, all clusters compressed with {compression}",
                Job("randread", 64 * _KIB, depth=8),
                (BlkloomQcow2(blkloom, _OURS, image), *qemu_nbd(image, 64 * _KIB)),
                (Goal(_OURS, _QEMU, 1.5),),
                "qcow2",
            )
        )
    return found


def _huge(blkloom: str) -> list[Workload]:
    """Row on an image whose metadata is larger than any default cache, and all of it is needed; all reads return
    data.
    """
    image = Qcow2Image(size=_HUGE, shared=True)
    python = str(Path(blkloom).with_name("python"))
    return [
        Workload(
            "qcow2-1t-randread-4k-c2-q8",
            "qcow2: 4K randread, 2 connections, qd 8, 1 TiB with every cluster allocated",
            Job("randread", 4 * _KIB, depth=8, connections=2),
            (
                BlkloomQcow2(blkloom, _OURS, image, weighed=True),
                *qemu_nbd(image, 4 * _KIB, l2_cache=_HUGE_METADATA, weighed=True),
                _NULL,
            ),
            (Goal(_OURS, _QEMU, 3.0, floor=_FLOOR), Goal(_OURS, _FLOOR, floor=_FLOOR)),
            "qcow2",
            warm_up=8.0,  # until all of its metadata is in memory
        ),
        Workload(
            "qcow2-1t-open",
            "qcow2: from open to the first byte, 1 TiB with every cluster allocated",
            Job("randread", 4 * _KIB),
            (OpenedQcow2(python, _OURS, image),),
            (Goal(_OURS, _OURS, at_most=0.1),),
            "qcow2",
            unit="s",
        ),
    ]


def _against_raw(blkloom: str) -> Workload:
    raw = "blkloom loop"
    return Workload(
        "qcow2-against-raw-randread-4k-q16",
        "qcow2: 4K randread, qd 16, against a raw file",
        Job("randread", 4 * _KIB, depth=16),
        (BlkloomQcow2(blkloom, _OURS, _FILLED), BlkloomQcow2(blkloom, raw, replace(_FILLED, raw=True))),
        (Goal(_OURS, raw, 0.95),),
        "qcow2",
    )
