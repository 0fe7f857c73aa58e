"""The rows: what is measured, against whom, and how good it shall be.

The one place to read or change what `make bench` does. At the top the contenders, below them one
workload a job; a workload's goals are the rows of the report. "at least" figures are the project's
goals; where there is none the row is reported for what it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from jobs import Job, Pattern
from measuring import Workload
from peers import Blkloom, FioOnFile, InProcess, KernelLoop, Nbdkit, NullServer, QemuNbd
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


def workloads(blkloom: str) -> list[Workload]:
    """All of them, in the order of the report. blkloom: the command to measure."""
    return [
        *_small(blkloom),
        *_large(blkloom),
        *_ram(blkloom),
        *_many_jobs(blkloom),
        *_direct(blkloom),
        *_in_process(blkloom),
        *_scale(blkloom),
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
