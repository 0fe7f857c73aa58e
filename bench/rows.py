"""The rows of the report: the workloads, their contenders and their goals.

Change this module to change `make bench`. The contenders come first, then one workload for each job; the goals of a
workload are the rows of the report. "at least" figures are the project's goals; rows without one are only reported.
`nbd_load`, the client that sends requests together, decides the goals; the results with fio are reported, too. A full
run must take less than 50 minutes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from backing_rows import backing_workloads
from disk_peers import BareBlocks, BlockDevice, Called, Driven, FileMode, LoopDevice, Opened, Place, Served
from fuse_rows import fuse_workloads
from jobs import Job, Pattern
from measuring import Contender, Workload
from peers import Blkloom, FioOnFile, InProcess, KernelLoop, Nbdkit, NullServer, QemuNbd
from qcow2_rows import qcow2_workloads
from results import BEFORE, Goal
from start_rows import start_workloads
from vhost_user_rows import vhost_user_workloads

_LOOP: Final = "blkloom loop"
_RAM: Final = "blkloom ram"
_QEMU: Final = QemuNbd("io_uring")
_QEMU_LARGE: Final = QemuNbd("threads")
"""Its best with requests of 1 MiB; with smaller ones the other is."""
_NBDKIT: Final = (Nbdkit("file", 1), Nbdkit("file", 4))
_MEMORY: Final = (Nbdkit("memory", 1, "malloc"),)
_NULL: Final = NullServer()
_BARE_FILE: Final = NullServer("file")
_BARE_MEMORY: Final = NullServer("memory")
_FLOOR: Final = _NULL.family
"""No server can be faster than one that does nothing."""
_SEGMENTS: Final = 10_000
_IDLE: Final = 1_000
_CHAIN: Final = 10
_DELAYED: Final = 1_000
_KIB: Final = 1024
_READ_AND_WRITE: Final[tuple[Pattern, ...]] = ("randread", "randwrite")


def workloads(blkloom: str, before: str | None = None) -> list[Workload]:
    """All workloads, in the order of the report. blkloom: the command to measure. before: the command of an older
    build, measured in the same rounds.
    """
    found = [
        *_memory(blkloom),
        *_one_at_a_time(blkloom),
        *_large(blkloom),
        *_many_jobs(blkloom),
        *fuse_workloads(blkloom),
        *vhost_user_workloads(blkloom),
        *backing_workloads(blkloom),
        *_direct(blkloom),
        *_flushed(blkloom),
        *_on_a_disk(blkloom),
        *_on_a_disk_in_process(blkloom),
        *_in_process(blkloom),
        *_scale(blkloom),
        *_targets_for_tests(blkloom),
        *qcow2_workloads(blkloom),
        *start_workloads(blkloom),
    ]
    if before is None:
        return found
    return [_with_older(now, then) for now, then in zip(found, workloads(before), strict=True)]


def _with_older(now: Workload, then: Workload) -> Workload:
    """The workload with the contenders of the older build added, and the goals that compare the two."""
    subjects: dict[str, Goal] = {}
    for goal in now.goals:
        subjects.setdefault(goal.subject, goal)
    older = [
        replace(contender, family=contender.family + BEFORE)
        for contender in then.contenders
        if contender.family in subjects and contender not in now.contenders
    ]
    compared = [
        Goal(family, family + BEFORE, floor=goal.floor, client=goal.client)
        for family, goal in subjects.items()
        if family + BEFORE in {contender.family for contender in older}
    ]
    return replace(now, contenders=(*now.contenders, *older), goals=(*now.goals, *compared))


def _memory(blkloom: str) -> list[Workload]:
    """Rows in which the server's own work is the bottleneck: a file on tmpfs, and memory."""
    rows = (
        ("randrw-4k-c1-q16", "4K randrw, qd 16", Job("randrw", 4 * _KIB, depth=16)),
        ("randrw-4k-c1-q64", "4K randrw, qd 64", Job("randrw", 4 * _KIB, depth=64)),
        ("randrw-4k-c2-q16", "4K randrw, 2 connections, qd 16", Job("randrw", 4 * _KIB, depth=16, connections=2)),
        ("randrw-4k-c64-q1", "4K randrw, 64 connections, qd 1", Job("randrw", 4 * _KIB, connections=64)),
        ("randread-64k-c1-q16", "64K randread, qd 16", Job("randread", 64 * _KIB, depth=16)),
        ("randwrite-64k-c1-q16", "64K randwrite, qd 16", Job("randwrite", 64 * _KIB, depth=16)),
    )
    shares = {"randrw-4k-c1-q16": 0.8, "randrw-4k-c2-q16": 0.8}
    shown = {
        "randrw-4k-c1-q16": "4K, qd 16",
        "randrw-4k-c2-q16": "4K, 2 connections, qd 16",
        "randread-64k-c1-q16": "64K reads, qd 16",
    }
    found = []
    for name, title, job in rows:
        bar = shown.get(name, "")
        goals = (
            Goal(_LOOP, "nbdkit file", 1.5, floor=_FLOOR, headline=bar and f"{bar}: loop / nbdkit"),
            Goal(
                _LOOP, "qemu-nbd", 3.0, floor=_FLOOR, headline=bar and f"{bar}: loop / qemu-nbd" if "c1" in name else ""
            ),
            Goal(_LOOP, _FLOOR, shares.get(name), floor=_FLOOR),
            Goal(_LOOP, _BARE_FILE.family, floor=_FLOOR),
            Goal(_RAM, "nbdkit memory", 1.5, floor=_FLOOR, headline=f"{bar}: ram / nbdkit" if "c2" in name else ""),
            Goal(_RAM, _FLOOR, shares.get(name), floor=_FLOOR),
            Goal(_RAM, _BARE_MEMORY.family, floor=_FLOOR),
        )
        ours = (Blkloom(blkloom, _LOOP), Blkloom(blkloom, _RAM, "ram"))
        found.append(
            Workload(
                name, title, job, (*ours, _QEMU, *_NBDKIT, *_MEMORY, _NULL, _BARE_FILE, _BARE_MEMORY), goals, "nbd"
            )
        )
    return found


def _one_at_a_time(blkloom: str) -> list[Workload]:
    return [
        Workload(
            "randrw-4k-c1-q1",
            "4K randrw, qd 1",
            Job("randrw", 4 * _KIB),
            (Blkloom(blkloom, _LOOP), _QEMU, Nbdkit("file", 4), _NULL),
            (
                Goal(_LOOP, "nbdkit file", 2.0, floor=_FLOOR),
                Goal(_LOOP, "qemu-nbd", floor=_FLOOR),
                Goal(_LOOP, _FLOOR, floor=_FLOOR),
            ),
            "nbd",
        )
    ]


def _large(blkloom: str) -> list[Workload]:
    return [
        Workload(
            f"{pattern}-{name.lower()}-c2-q8",
            f"{name} {pattern}, 2 connections, qd 8",
            Job(pattern, block, depth=8, connections=2),
            (Blkloom(blkloom, _LOOP), Blkloom(blkloom, _RAM, "ram"), qemu, _NULL),
            (
                Goal(_LOOP, "qemu-nbd", 2.0, floor=_FLOOR),
                Goal(_LOOP, _FLOOR, floor=_FLOOR),
                Goal(_RAM, _FLOOR, floor=_FLOOR),
            ),
            "nbd",
        )
        for name, block, qemu in (("64K", 64 * _KIB, _QEMU), ("1M", 1024 * _KIB, _QEMU_LARGE))
        for pattern in _READ_AND_WRITE
    ]


def _many_jobs(blkloom: str) -> list[Workload]:
    """The test of the dm-ram mail (Mauelshagen 2018): 99 jobs. Only fio can use a loop device, so that comparison is
    with fio on both sides.
    """
    return [
        Workload(
            f"randrw-{name.lower()}-j99-q12",
            f"dm-ram: {name} randrw, 99 jobs, qd 12",
            Job("randrw", block, depth=12, connections=99),
            (
                Blkloom(blkloom, _LOOP),
                Blkloom(blkloom, _RAM, "ram"),
                KernelLoop(direct=True),
                KernelLoop(direct=False),
                _NULL,
            ),
            (
                Goal(_RAM, _LOOP, 1.0, floor=_FLOOR, headline=bar),
                Goal(_LOOP, _FLOOR, floor=_FLOOR),
                Goal(_RAM, "/dev/loop", client="fio", floor=_FLOOR),
                Goal(_LOOP, "/dev/loop", client="fio", floor=_FLOOR),
            ),
            "mails",
            slower=2.0,
        )
        for name, block, bar in (("4K", 4 * _KIB, "4K, 99 jobs, qd 12: ram / loop"), ("32K", 32 * _KIB, ""))
    ]


def _direct(blkloom: str) -> list[Workload]:
    family, alone = "blkloom loop direct_io", FioOnFile()
    return [
        Workload(
            f"direct-randread-4k-q{depth}",
            f"4K randread, qd {depth}, direct I/O, a file on ext4",
            Job("randread", 4 * _KIB, depth=depth),
            (Blkloom(blkloom, family, direct=True), alone),
            (Goal(family, alone.family, 0.95, floor=alone.family, headline=bar),),
            "disk",
        )
        for depth, bar in ((16, ""), (32, "4K reads from a disk, qd 32: loop / fio"))
    ]


def _flushed(blkloom: str) -> list[Workload]:
    """Rows of writes that are durable when they are answered."""
    alone = FioOnFile("fio on the file", direct=False)
    return [
        Workload(
            "randwrite-flush-4k-q16",
            "4K randwrite, a flush after each, qd 16, a file on ext4",
            Job("randwrite", 4 * _KIB, depth=16, flush="each"),
            (
                Blkloom(blkloom, _LOOP, on_disk=True),
                *(replace(server, on_disk=True) for server in (_QEMU, _QEMU_LARGE)),
                *(replace(server, on_disk=True) for server in _NBDKIT),
                alone,
            ),
            (
                Goal(_LOOP, "nbdkit file", 1.5, floor=alone.family, headline="4K writes, a flush each: loop / nbdkit"),
                Goal(_LOOP, "qemu-nbd", 3.0, floor=alone.family),
                Goal(_LOOP, alone.family, floor=alone.family),
            ),
            "disk",
        )
    ]


_FILE: Final = "blkloom file"
_DIRECT: Final = "blkloom direct_io"
_BLOCK_MAP: Final = "blkloom block_map"
_BUFFERED_LOOP: Final = "/dev/loop buffered"
_DIRECT_LOOP: Final = "/dev/loop direct"
_BARE: Final = "bare blocks"
_MODES: Final[dict[str, Place]] = {
    _FILE: FileMode("file"),
    _DIRECT: FileMode("direct_io"),
    _BLOCK_MAP: FileMode("block_map"),
}
_DEVICES: Final[dict[str, BlockDevice]] = {
    _BUFFERED_LOOP: LoopDevice(direct=False),
    _DIRECT_LOOP: LoopDevice(direct=True),
    _BARE: BareBlocks(),
}
_PLACES: Final[dict[str, Place]] = {**_MODES, **_DEVICES}


def _on_a_disk(blkloom: str) -> list[Workload]:
    """The test of the dm-loop mail (Patocka 2025), on one disk: a file in three modes, the loop driver on the same
    file, and bare blocks. All use the same NBD clients and server, so only the storage behind the server differs. In
    addition, fio uses the bare blocks without NBD.
    """
    alone = f"{_BARE}, no NBD"
    contenders: tuple[Contender, ...] = (
        *(Served(blkloom, family, place) for family, place in _PLACES.items()),
        Driven(alone, BareBlocks()),
    )
    found = []
    for name, block, depth in (("4K", 4 * _KIB, 1), ("4K", 4 * _KIB, 16), ("64K", 64 * _KIB, 16)):
        ahead = 1.0 if (name, depth) == ("4K", 16) else None
        # Here the disk is the limit, and not the time of client and server.
        near = 0.95 if name == "64K" else None
        for pattern in _READ_AND_WRITE:
            bar = "dm-loop's test, 4K reads, qd 16: block_map / bare blocks" if ahead and pattern == "randread" else ""
            goals = (
                Goal(_FILE, _BUFFERED_LOOP, ahead),
                Goal(_DIRECT, _DIRECT_LOOP, ahead, floor=alone),
                Goal(_BLOCK_MAP, _BARE, 0.95, floor=alone, headline=bar),
                Goal(_BLOCK_MAP, alone, near, floor=alone),
            )
            title = f"dm-loop: {name} {pattern}, qd {depth}, a file on a disk"
            job = Job(pattern, block, depth=depth)
            row = f"disk-{pattern}-{name.lower()}-q{depth}"
            found.append(Workload(row, title, job, contenders, goals, "mails"))
    return found


def _on_a_disk_in_process(blkloom: str) -> list[Workload]:
    """The same storage without a socket: single requests, where the disk alone is the bottleneck, compared with system
    calls; and batches, with the same client for every storage.
    """
    python = _python(blkloom)
    opened = tuple(Opened(python, family, place) for family, place in _PLACES.items())
    modes = tuple(contender for contender in opened if contender.family in _MODES)
    called = tuple(Called(python, f"{family}, calls", place) for family, place in _DEVICES.items())
    found = []
    for pattern in _READ_AND_WRITE:
        sync = (
            Goal(_FILE, f"{_BUFFERED_LOOP}, calls"),
            Goal(_DIRECT, f"{_DIRECT_LOOP}, calls"),
            Goal(_BLOCK_MAP, f"{_BARE}, calls", 0.95),
        )
        deep = (
            Goal(_FILE, _BUFFERED_LOOP, 1.0),
            Goal(_DIRECT, _DIRECT_LOOP, 1.0),
            Goal(_BLOCK_MAP, _BARE, 0.95),
        )
        name, title = f"disk-in-process-{pattern}", f"in process, 4K {pattern}"
        found += [
            Workload(
                f"{name}-1", f"{title}, a file on a disk", Job(pattern, 4 * _KIB), (*modes, *called), sync, "disk"
            ),
            Workload(
                f"{name}-16",
                f"{title} in batches of 16, a file on a disk",
                Job(pattern, 4 * _KIB, depth=16),
                opened,
                deep,
                "disk",
            ),
        ]
    return found


def _in_process(blkloom: str) -> list[Workload]:
    python = _python(blkloom)
    preadv, one, many = "os.preadv on tmpfs", "pread_into from ram", "batch from ram"
    return [
        Workload(
            "in-process-4k",
            "in process, 4K reads",
            Job("randread", 4 * _KIB),
            (InProcess(python, "ram", one), InProcess(python, "preadv", preadv)),
            (Goal(one, preadv, 0.7),),
            "process",
        ),
        Workload(
            "in-process-4k-batch64",
            "in process, 4K reads in batches of 64",
            Job("randread", 4 * _KIB, batch=64),
            (InProcess(python, "ram", many, 64), InProcess(python, "preadv", preadv, 64)),
            (Goal(many, preadv, 2.5),),
            "process",
        ),
    ]


def _targets_for_tests(blkloom: str) -> list[Workload]:
    """What a segment costs that lets all requests pass, and how many requests a delay holds at once."""
    segments = {
        "delay of 0 ms": "delay {path} 0 0",
        "throttle far from its limit": "throttle {path} 0 2 iops=1000000000 bps=1000000000000",
        "unstriped": "unstriped 1 128 0 {path} 0",
    }
    plain = Blkloom(blkloom, "linear", segment="linear {path} 0")
    many, one = f"{_DELAYED:,} reads, delayed 10 ms", "1 read, delayed 10 ms"
    python = _python(blkloom)
    return [
        Workload(
            "segment-that-passes",
            "4K randread, qd 16",
            Job("randread", 4 * _KIB, depth=16),
            (plain, *(Blkloom(blkloom, name, segment=segment) for name, segment in segments.items())),
            tuple(Goal(name, plain.family, 0.97) for name in segments),
            "tests",
        ),
        Workload(
            "delayed-together",
            "one call",
            Job("randread", 4 * _KIB),
            (InProcess(python, "delayed", many, _DELAYED), InProcess(python, "delayed", one, 1)),
            (Goal(many, one, at_most=0.015),),
            "tests",
            unit="s",
        ),
    ]


def _python(blkloom: str) -> str:
    """The interpreter beside the command, which imports the same blkloom."""
    return str(Path(blkloom).with_name("python"))


def _scale(blkloom: str) -> list[Workload]:
    """Idle segments and connections should cost almost nothing; the goal for that is 0.9."""
    many, one = f"blkloom loop, {_SEGMENTS:,} segments", "blkloom loop, 1 segment"
    idle, busy = f"blkloom loop, {_IDLE:,} idle connections", "blkloom loop, no idle connections"
    job = Job("randread", 4 * _KIB, depth=16)
    chain, alone = f"blkloom loop, under a chain of {_CHAIN}", "blkloom loop, not stacked"
    return [
        Workload(
            "segments-map",
            "parse and open a table",
            Job("randread", 4 * _KIB),
            (InProcess(_python(blkloom), "map", many, _SEGMENTS), InProcess(_python(blkloom), "map", one, 1)),
            (Goal(many, one, at_most=1.0),),
            "scale",
            unit="s",
        ),
        Workload(
            "segments-randread",
            "4K randread, qd 16",
            job,
            (Blkloom(blkloom, many, segments=_SEGMENTS), Blkloom(blkloom, one)),
            (Goal(many, one, 0.9),),
            "scale",
        ),
        Workload(
            "chain-randread",
            "4K randread, qd 16",
            job,
            (Blkloom(blkloom, chain, stacked=_CHAIN), Blkloom(blkloom, alone)),
            (Goal(chain, alone, 0.9),),
            "scale",
        ),
        Workload(
            "idle-randread",
            "4K randread, qd 16",
            job,
            (Blkloom(blkloom, idle, idle=_IDLE), Blkloom(blkloom, busy)),
            (Goal(idle, busy, 0.9),),
            "scale",
        ),
    ]
