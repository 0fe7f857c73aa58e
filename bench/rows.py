"""The rows: what is measured, against whom, and how good it shall be.

The one place to read or change what `make bench` does. At the top the contenders, below them one
workload a job; a workload's goals are the rows of the report. "at least" figures are the project's
goals; where there is none the row is reported for what it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from disk_peers import BareBlocks, BlockDevice, Called, Driven, FileMode, LoopDevice, Opened, Place, Served
from jobs import Job, Pattern
from measuring import Contender, Workload
from peers import Blkloom, FioOnFile, InProcess, KernelLoop, Nbdkit, NullServer, QemuNbd
from qcow2_rows import qcow2_workloads
from results import Goal

_LOOP: Final = "blkloom loop"
_RAM: Final = "blkloom ram"
_QEMU: Final = (QemuNbd("threads"), QemuNbd("io_uring"))
_NBDKIT: Final = (Nbdkit("file", 16), Nbdkit("file", 4), Nbdkit("file", 1))
_MEMORY: Final = (Nbdkit("memory", 16, "malloc"), Nbdkit("memory", 1, "malloc"), Nbdkit("memory", 16, "sparse"))
_NULL: Final = NullServer()
_LIMIT: Final = Goal(_LOOP, _NULL.family)
"""How near the row comes to what this client and this machine can do; no goal can be beyond it."""
_SEGMENTS: Final = 10_000
_IDLE: Final = 1_000
_CHAIN: Final = 10
_KIB: Final = 1024
_READ_AND_WRITE: Final[tuple[Pattern, ...]] = ("randread", "randwrite")


def workloads(blkloom: str) -> list[Workload]:
    """All of them, in the order of the report. blkloom: the command to measure."""
    return [
        *_small(blkloom),
        *_large(blkloom),
        *_ram(blkloom),
        *_many_jobs(blkloom),
        *_direct(blkloom),
        *_on_a_disk(blkloom),
        *_on_a_disk_in_process(blkloom),
        *_in_process(blkloom),
        *_scale(blkloom),
        *qcow2_workloads(blkloom),
    ]


def _small(blkloom: str) -> list[Workload]:
    loop = Blkloom(blkloom, _LOOP)
    everybody = (loop, *_QEMU, *_NBDKIT, _NULL)
    return [
        Workload(
            "randrw-4k-c1-q16",
            "4K randrw, 1 connection, qd 16",
            Job("randrw", 4 * _KIB, depth=16),
            everybody,
            (Goal(_LOOP, "qemu-nbd", 4.0), Goal(_LOOP, "nbdkit file", 1.2), _LIMIT),
        ),
        Workload(
            "randrw-4k-c2-q16",
            "4K randrw, 2 connections, qd 16",
            Job("randrw", 4 * _KIB, depth=16, connections=2),
            everybody,
            (Goal(_LOOP, "qemu-nbd", 6.0), Goal(_LOOP, "nbdkit file", 3.0), _LIMIT),
        ),
        Workload(
            "randrw-4k-c1-q1",
            "4K randrw, 1 connection, qd 1",
            Job("randrw", 4 * _KIB),
            everybody,
            (Goal(_LOOP, "nbdkit file", 2.0), Goal(_LOOP, "qemu-nbd"), _LIMIT),
        ),
    ]


def _large(blkloom: str) -> list[Workload]:
    patterns: tuple[tuple[Pattern, str], ...] = (("randread", "reads"), ("randwrite", "writes"))
    return [
        Workload(
            f"{pattern}-{name.lower()}-c2-q8",
            f"{name} random {word}, 2 connections, qd 8",
            Job(pattern, block, depth=8, connections=2),
            (Blkloom(blkloom, _LOOP), *_QEMU),
            (Goal(_LOOP, "qemu-nbd", 2.0),),
        )
        for name, block in (("64K", 64 * _KIB), ("1M", 1024 * _KIB))
        for pattern, word in patterns
    ]


def _ram(blkloom: str) -> list[Workload]:
    return [
        Workload(
            f"ram-randrw-4k-c{connections}-q16",
            f"4K randrw, {connections} connection{'s' * (connections > 1)}, qd 16",
            Job("randrw", 4 * _KIB, depth=16, connections=connections),
            (Blkloom(blkloom, _RAM, "ram"), *_MEMORY, _NULL),
            (Goal(_RAM, "nbdkit memory", 2.0), Goal(_RAM, _NULL.family)),
        )
        for connections in (1, 2)
    ]


def _many_jobs(blkloom: str) -> list[Workload]:
    """The test of the dm-ram mail (Mauelshagen 2018): 99 jobs."""
    return [
        Workload(
            f"randrw-{name.lower()}-j99-q12",
            f"{name} randrw, 99 jobs, qd 12",
            Job("randrw", block, depth=12, connections=99),
            (
                Blkloom(blkloom, _LOOP),
                Blkloom(blkloom, _RAM, "ram"),
                KernelLoop(direct=True),
                KernelLoop(direct=False),
            ),
            (Goal(_RAM, _LOOP, 1.0), Goal(_LOOP, "/dev/loop"), Goal(_RAM, "/dev/loop")),
        )
        for name, block in (("4K", 4 * _KIB), ("32K", 32 * _KIB))
    ]


def _direct(blkloom: str) -> list[Workload]:
    family = "blkloom loop direct_io"
    return [
        Workload(
            "direct-randread-4k-q32",
            "4K randread, qd 32, a file on the machine's disk",
            Job("randread", 4 * _KIB, depth=32),
            (Blkloom(blkloom, family, direct=True), FioOnFile()),
            (Goal(family, "fio io_uring on the file", 0.9),),
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
    """The test of the dm-loop mail (Patocka 2025), on one disk: a file three ways, the loop driver over
    the same file, and bare blocks. All of them through the same NBD client and server, which is what
    the goals are about: only what is behind the server differs. Beside them, the block devices as
    fio drives them without NBD between: whoever is deeper, or moves more at once, is near that too.
    """
    driven = {f"{family}, no NBD": place for family, place in _DEVICES.items()}
    contenders: tuple[Contender, ...] = (
        *(Served(blkloom, family, place) for family, place in _PLACES.items()),
        *(Driven(family, place) for family, place in driven.items()),
    )
    found = []
    for name, block in (("4K", 4 * _KIB), ("64K", 64 * _KIB)):
        for depth in (1, 16):
            ahead = 1.0 if (name, depth) == ("4K", 16) else None
            # Here the disk is the limit, and not the time of client and server.
            near = 0.95 if (name, depth) == ("64K", 16) else None
            goals = (
                Goal(_FILE, _BUFFERED_LOOP, ahead),
                Goal(_DIRECT, _DIRECT_LOOP, ahead),
                Goal(_BLOCK_MAP, _BARE, 0.95),
                Goal(_BLOCK_MAP, f"{_BARE}, no NBD", near),
            )
            for pattern in _READ_AND_WRITE:
                title = f"{name} {pattern}, qd {depth}, a file on a disk"
                job = Job(pattern, block, depth=depth)
                found.append(Workload(f"disk-{pattern}-{name.lower()}-q{depth}", title, job, contenders, goals))
    return found


def _on_a_disk_in_process(blkloom: str) -> list[Workload]:
    """The same without any socket: sync, where the disk alone is the limit, against system calls; and in
    batches, where every place has the same client again.
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
            Workload(f"{name}-1", f"{title}, a file on a disk", Job(pattern, 4 * _KIB), (*modes, *called), sync),
            Workload(
                f"{name}-16",
                f"{title} in batches of 16, a file on a disk",
                Job(pattern, 4 * _KIB, depth=16),
                opened,
                deep,
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
        ),
        Workload(
            "in-process-4k-batch64",
            "in process, 4K reads in batches of 64",
            Job("randread", 4 * _KIB, batch=64),
            (InProcess(python, "ram", many, 64), InProcess(python, "preadv", preadv, 64)),
            (Goal(many, preadv, 2.5),),
        ),
    ]


def _python(blkloom: str) -> str:
    """The interpreter beside the command, which has the same blkloom."""
    return str(Path(blkloom).with_name("python"))


def _scale(blkloom: str) -> list[Workload]:
    """Idle segments and connections shall cost next to nothing; 0.9 is our reading of that."""
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
            unit="s",
        ),
        Workload(
            "segments-randread",
            "4K randread, 1 connection, qd 16",
            job,
            (Blkloom(blkloom, many, segments=_SEGMENTS), Blkloom(blkloom, one)),
            (Goal(many, one, 0.9),),
        ),
        Workload(
            "chain-randread",
            "4K randread, 1 connection, qd 16",
            job,
            (Blkloom(blkloom, chain, stacked=_CHAIN), Blkloom(blkloom, alone)),
            (Goal(chain, alone, 0.9),),
        ),
        Workload(
            "idle-randread",
            "4K randread, 1 connection, qd 16",
            job,
            (Blkloom(blkloom, idle, idle=_IDLE), Blkloom(blkloom, busy)),
            (Goal(idle, busy, 0.9),),
        ),
    ]
