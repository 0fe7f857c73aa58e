"""Several clients write to neighbouring ranges of one cluster while its location changes."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import blkloom
from conformance.file_systems import BTRFS, EXT4, FileSystem, made_on_a_device, needs_root

from . import qemu
from .attached import first_difference, read_all, table_of
from .shapes import Made, Shape, make

pytestmark = pytest.mark.usefixtures("qemu_tools")

CLIENTS = 4
BLOCK = 2048
STEPS = 400

SHAPES = {
    "plain": Shape(cluster_bits=16),
    "tiny clusters": Shape(cluster_bits=9),
    "backed": Shape(cluster_bits=16, backing="qcow2"),
    "extended and backed": Shape(cluster_bits=16, extended=True, backing="raw"),
    "compressed": Shape(cluster_bits=16, compressed=True),
    "bitmap": Shape(cluster_bits=16, bitmap=True),
    "raw data file": Shape(cluster_bits=12, data_file="raw"),
}


class Client(threading.Thread):
    """Owns every CLIENTS-th block of the disk and nothing else, and knows what must be there."""

    def __init__(self, device: blkloom.Device, content: bytearray, number: int) -> None:
        super().__init__()
        self._device, self._content, self._number = device, content, number
        self._dice = random.Random(number)
        self.trouble: BaseException | None = None

    def run(self) -> None:
        try:
            for step in range(STEPS):
                self._step(step)
        except BaseException as error:
            self.trouble = error

    def _step(self, step: int) -> None:
        mine = self._dice.randrange(len(self._content) // BLOCK // CLIENTS) * CLIENTS + self._number
        at = mine * BLOCK
        kind = self._dice.choice(["write"] * 5 + ["zeroes", "discard", "read", "flush"])
        if kind == "write":
            data = (self._number << 24 | step).to_bytes(4, "big") * (BLOCK // 4)
            self._device.pwrite(data, at)
            self._content[at : at + BLOCK] = data
        elif kind == "zeroes":
            self._device.write_zeroes(at, BLOCK, unmap=step % 2 == 0)
            self._content[at : at + BLOCK] = bytes(BLOCK)
        elif kind == "discard":
            self._device.discard(at, BLOCK)
            found = self._device.pread(BLOCK, at)
            assert all(byte in (old, 0) for byte, old in zip(found, self._content[at : at + BLOCK], strict=True))
            self._content[at : at + BLOCK] = found
        elif kind == "flush":
            self._device.flush()
        assert self._device.pread(BLOCK, at) == self._content[at : at + BLOCK], f"client {self._number}, step {step}"


def _run(device: blkloom.Device, content: bytearray, meanwhile: Callable[[], bool] = lambda: False) -> None:
    """meanwhile: is called again and again as long as it returns true."""
    clients = [Client(device, content, number) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    while any(client.is_alive() for client in clients) and meanwhile():
        pass
    for client in clients:
        client.join()
    trouble = [client.trouble for client in clients if client.trouble]
    assert not trouble, trouble


@pytest.mark.parametrize("kind", SHAPES)
def test_clients_in_the_same_clusters_do_not_harm_each_other(tmp_path: Path, kind: str) -> None:
    _run_on(make(tmp_path, SHAPES[kind], size=2 << 20, seed=2))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("system", "sector"), [(EXT4, 4096), (BTRFS, 512)], ids=["ext4 on 4 KiB sectors", "btrfs"])
def test_nor_do_they_where_a_write_is_less_than_a_block_of_the_disk(
    tmp_path: Path, program: Callable[[str, str], str], system: FileSystem, sector: int, kind: str
) -> None:
    needs_root("a disk of its own")
    with made_on_a_device(program, system, sector, tmp_path) as (folder, _):
        _run_on(make(folder, SHAPES[kind], size=2 << 20, seed=2), "direct_io")


def _run_on(made: Made, *options: str) -> None:
    content = bytearray(made.content)
    with blkloom.open(table_of(made.path, made.size, *options)) as device:
        _run(device, content)
        assert not first_difference(read_all(device), bytes(content))
    checked = qemu.check(made.path)
    assert checked.whole, checked.said
    assert not first_difference(qemu.content(made.path), bytes(content))


def test_snapshots_are_taken_under_load(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12), size=2 << 20, seed=3)
    content = bytearray(made.content)
    taken: dict[str, bytes] = {}
    numbers = itertools.count()
    with blkloom.open(table_of(made.path, made.size)) as device:

        def keep() -> bool:
            number = next(numbers)
            device.suspend()
            qemu.qemu_img("snapshot", "-c", f"s{number}", made.path)
            taken[f"s{number}"] = qemu.content(made.path)
            if number % 3:
                qemu.qemu_img("snapshot", "-d", f"s{number - 1}", made.path)
                del taken[f"s{number - 1}"]
            device.resume()
            return number < 60

        _run(device, content, keep)
    assert next(numbers) > 3, "the load was over before it began"
    checked = qemu.check(made.path)
    assert checked.whole, checked.said
    assert not first_difference(qemu.content(made.path), bytes(content))
    for name, wanted in taken.items():
        assert not first_difference(qemu.content(made.path, snapshot=name), wanted), name
