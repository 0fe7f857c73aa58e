"""qemu-img works on an image while fio writes to its device and verifies, in many suspends and resumes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2 import qemu
from qcow2.shapes import Shape, make

from .conftest import Life
from .maintained import NAME, Disk
from .verifying import Verifying

pytestmark = pytest.mark.timeout(290)
TURNS = int(os.environ.get("BLKLOOM_CHANGES", "10"))
"""How often the image is maintained, at least."""
MIB = 1 << 20
JOBS, SHARE = 2, 4 * MIB
KNOWN = JOBS * SHARE
"""Where fio does not write."""

SHAPES = {
    "plain": Shape(cluster_bits=16),
    "lazy, tiny clusters": Shape(cluster_bits=9, lazy=True),
    "extended, backed": Shape(cluster_bits=16, extended=True, backing="qcow2"),
    "bitmap": Shape(cluster_bits=12, bitmap=True),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_snapshots_come_and_go_while_fio_verifies(
    blkloom: str, life: Life, program: Callable[[str, str], str], tmp_path: Path, kind: str
) -> None:
    fio = program("fio", "fio")
    for name in ("qemu-img", "qemu-io"):
        program(name, "qemu-utils")
    one = Disk(blkloom, life, make(tmp_path, SHAPES[kind], size=KNOWN + MIB).path)
    load = Verifying(fio, life.socket(NAME), jobs=JOBS, size=SHARE, loops=4, folder=tmp_path)
    taken: dict[str, int] = {}
    turn = 0
    while turn < TURNS or load.running():
        if not load.running():
            load.finish()
            load = Verifying(fio, life.socket(NAME), jobs=JOBS, size=SHARE, loops=4, folder=tmp_path)
        turn += 1
        byte = turn % 251 + 1
        one.write(byte, KNOWN + turn * 700 % (MIB // 2), 100_000)
        one.write(byte, KNOWN, 512)
        with one.suspended() as image:
            qemu.qemu_img("snapshot", "-c", f"s{turn}", image)
            taken[f"s{turn}"] = byte
            if len(taken) > 3:
                oldest = next(iter(taken))
                _shows(image, oldest, taken.pop(oldest))
                qemu.qemu_img("snapshot", "-d", oldest, image)
    load.finish()
    with life.client() as client:
        assert client.info(NAME)[0].restarts == 0
    one.content[:KNOWN] = one.read(0, KNOWN)
    one.end()
    for name, byte in taken.items():
        _shows(one.path, name, byte)


def _shows(image: Path, snapshot: str, byte: int) -> None:
    """The block that was known when the snapshot was taken."""
    assert qemu.content(image, snapshot=snapshot)[KNOWN : KNOWN + 512] == bytes([byte]) * 512
