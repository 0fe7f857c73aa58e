"""The rows of FUSE files: random 4K requests, compared with QEMU's storage daemon and the kernel's loop device on the
same file on tmpfs. fio is the only client and decides the goals.
"""

from __future__ import annotations

from typing import Final

from fuse_peers import BlkloomFuse, FuseNull, QemuFuse
from jobs import Job
from measuring import Contender, Workload
from peers import KernelLoop
from results import Goal

_LOOP: Final = "blkloom loop"
_CLONE: Final = "blkloom loop, 2 descriptors"
_URING: Final = "blkloom loop, io_uring"
_RAM: Final = "blkloom ram"
_QEMU: Final = QemuFuse("threads").family
_FLOOR: Final = FuseNull().family
_KERNEL: Final = "/dev/loop"


def fuse_workloads(blkloom: str) -> list[Workload]:
    """The workloads. blkloom: the command to measure."""
    contenders: tuple[Contender, ...] = (
        BlkloomFuse(blkloom, _LOOP),
        BlkloomFuse(blkloom, _CLONE, descriptors=2),
        BlkloomFuse(blkloom, _URING, uring=True),
        BlkloomFuse(blkloom, _RAM, "ram"),
        QemuFuse("threads"),
        QemuFuse("io_uring"),
        KernelLoop(direct=True, engine="io_uring"),
        KernelLoop(direct=False, engine="io_uring"),
        FuseNull(1),
        FuseNull(2),
    )
    rows = (("qd 1", 1, 1, 2.0), ("qd 16", 16, 1, 4.0), ("2 jobs, qd 16", 16, 2, None))
    return [
        Workload(
            f"fuse-randrw-4k-j{jobs}-q{depth}",
            f"a FUSE file: 4K randrw, {title}",
            Job("randrw", 4 << 10, depth=depth, connections=jobs),
            contenders,
            (
                Goal(_LOOP, _QEMU, ahead, client="fio", floor=_FLOOR),
                Goal(_LOOP, _KERNEL, 0.4 if ahead else None, client="fio", floor=_FLOOR),
                Goal(_LOOP, _FLOOR, client="fio", floor=_FLOOR),
                Goal(_URING, _KERNEL, 0.6 if ahead else None, client="fio", floor=_FLOOR),
                Goal(_URING, _LOOP, client="fio", floor=_FLOOR),
                Goal(_CLONE, _QEMU, client="fio", floor=_FLOOR),
                Goal(_RAM, _FLOOR, client="fio", floor=_FLOOR),
            ),
            "fuse",
            slower=2.0,
        )
        for title, depth, jobs, ahead in rows
    ]
