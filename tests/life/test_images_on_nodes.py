"""QCOW2 images on nodes: completed writes outlive killed workers, without a flush, because the node's users notice no
death.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import struct
from pathlib import Path

import pytest

from blkloom.control.client import Client
from qcow2 import qemu
from qcow2.shapes import Shape, make

from .attached import life
from .conftest import Life, info

__all__ = ["life"]
pytestmark = [pytest.mark.timeout(200), pytest.mark.usefixtures("qemu_tools")]

BLOCK = 4096
SIZE = 2 << 20
KILLS, CHANGES = 6, 12
BLKZEROOUT = 0x127F
"""Source: linux/fs.h."""

SHAPES = {
    "plain": Shape(cluster_bits=16),
    "small clusters": Shape(cluster_bits=9, refcount_bits=1),
    "snapshots": Shape(cluster_bits=12, snapshots=2),
    "lazy": Shape(cluster_bits=12, lazy=True),
    "extended, backed": Shape(cluster_bits=14, extended=True, backing="raw"),
    "compressed": Shape(cluster_bits=12, compressed=True, snapshots=1),
    "data file": Shape(cluster_bits=12, data_file="cooked"),
}


class Node:
    """A node that is read and written without the page cache, and what it must contain."""

    def __init__(self, path: str, content: bytes) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self._memory = mmap.mmap(-1, SIZE)
        self.content = bytearray(content)

    def change(self, dice: random.Random) -> None:
        """Writes or zeroes some blocks, without a flush."""
        offset = dice.randrange(SIZE // BLOCK) * BLOCK
        length = min(dice.choice([1, 1, 4, 40]) * BLOCK, SIZE - offset)
        if dice.random() < 0.2:
            fcntl.ioctl(self._fd, BLKZEROOUT, struct.pack("QQ", offset, length))
            self.content[offset : offset + length] = bytes(length)
            return
        self.content[offset : offset + length] = self._memory[:length] = dice.randbytes(length)
        assert os.pwrite(self._fd, memoryview(self._memory)[:length], offset) == length

    def read(self) -> bytes:
        """All of it."""
        assert os.preadv(self._fd, [self._memory], 0) == SIZE
        return self._memory[:]

    def close(self) -> None:
        os.close(self._fd)


@pytest.mark.parametrize("kind", SHAPES)
def test_completed_writes_outlive_killed_workers(client: Client, life: Life, tmp_path: Path, kind: str) -> None:
    made = make(tmp_path, SHAPES[kind], size=SIZE)
    dice = random.Random(kind)
    client.create("disk", table=f"0 {SIZE // 512} qcow2 {made.path}")
    node = Node(client.attach("disk", via="loop").node.path, made.content)
    for death in range(KILLS):
        for _ in range(CHANGES):
            node.change(dice)
        os.kill(info(client, "disk").worker, signal.SIGKILL)
        found = node.read()
        wrong = [at for at in range(0, SIZE, 512) if found[at : at + 512] != node.content[at : at + 512]]
        assert not wrong, f"after death {death}: {[hex(at) for at in wrong[:5]]} of {len(wrong)} sectors"
    node.close()
    client.detach("disk")
    client.remove("disk")
    found_by_qemu = qemu.check(made.path)
    assert not found_by_qemu.corruptions, found_by_qemu.said
    assert qemu.content(made.path) == node.content
    for name, content in made.snapshots.items():
        assert qemu.content(made.path, snapshot=name) == content
