"""The rows of disks of virtual machines, over vhost-user: compared with QEMU's storage daemon on an equal file or
image on tmpfs, and with our own NBD where a request waits for the one before.
"""

from __future__ import annotations

from typing import Final

from jobs import Job, Pattern
from measuring import Contender, Workload
from qcow2_images import Qcow2Image
from qcow2_peers import BlkloomQcow2
from results import Goal
from vhost_user_peers import BlkloomVhostUser, QemuVhostUser

_LOOP: Final = "blkloom loop"
_QCOW2: Final = "blkloom qcow2"
_FLOOR: Final = "blkloom zero"
_NBD: Final = "blkloom loop, NBD"
_QEMU: Final = "qemu-storage-daemon"
_QEMU_QCOW2: Final = "qemu-storage-daemon qcow2"
_KIB: Final = 1024
_READ_AND_WRITE: Final[tuple[Pattern, ...]] = ("randread", "randwrite")


def vhost_user_workloads(blkloom: str) -> list[Workload]:
    """The workloads. blkloom: the command to measure."""
    small = [
        _row(blkloom, pattern, "4K", 4 * _KIB, depth) for depth in (1, 32) for pattern in (*_READ_AND_WRITE, "randrw")
    ]
    polling = [_row(blkloom, pattern, "4K", 4 * _KIB, 1, polling=True) for pattern in _READ_AND_WRITE]
    rows = (("64K", 64 * _KIB, 32), ("1M", 1024 * _KIB, 32))
    large = [_row(blkloom, pattern, *row) for row in rows for pattern in _READ_AND_WRITE]
    return [*small, *polling, *large]


def _row(blkloom: str, pattern: Pattern, name: str, block: int, depth: int, *, polling: bool = False) -> Workload:
    ours: list[Contender] = [
        BlkloomVhostUser(_LOOP, "raw", polling, blkloom),
        BlkloomVhostUser(_QCOW2, "qcow2", polling, blkloom),
        BlkloomVhostUser(_FLOOR, "zero", polling, blkloom),
    ]
    qemu = [
        QemuVhostUser(_QEMU, "raw", polling, "threads"),
        QemuVhostUser(_QEMU, "raw", polling, "io_uring"),
        QemuVhostUser(_QEMU_QCOW2, "qcow2", polling, "native"),
        QemuVhostUser(_QEMU_QCOW2, "qcow2", polling, "io_uring"),
    ]
    client = ours[0].clients[0]
    ahead = (1.5, 2.0) if depth == 32 else (None, None)
    goals = [
        Goal(_LOOP, _QEMU, ahead[0], client=client, floor=_FLOOR),
        Goal(_LOOP, _FLOOR, client=client, floor=_FLOOR),
        Goal(_QCOW2, _QEMU_QCOW2, ahead[1], client=client, floor=_FLOOR),
    ]
    if depth == 1:
        ours.append(BlkloomQcow2(blkloom, _NBD, Qcow2Image(filled=True, raw=True)))
        goals.insert(1, Goal(_LOOP, _NBD, 2.0 if polling else 1.0, client=client, floor=_FLOOR))
    return Workload(
        f"vhost-user-{pattern}-{name.lower()}-q{depth}{'-polling' * polling}",
        f"{name} {pattern}, qd {depth}{', a client that polls' * polling}",
        Job(pattern, block, depth=depth),
        (*ours, *qemu),
        tuple(goals),
        "vhost-user",
    )
