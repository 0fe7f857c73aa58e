"""Devices on a disk that loses power: what a completed flush or FUA write covered is there, and images are consistent.

The disk is a device with the target `torn`. Its FUSE file is the backing file of a device, or it has an ext4 with an
image: all system calls of the engine and of the writer of images reach it as they would reach a disk.
`qcow2/recording.py` sees more of one run (a crash between any two calls, changes of the file's length that no file
system orders), but finds the writes of the engine only by looking at the file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import blkloom
from blkloom.errors import LostData
from blkloom.testing import PowerCutDisk, power_cut, supervised
from conformance.file_systems import mounted, needs_root, run
from faulty_fs import needs_fuse
from qcow2 import qemu
from qcow2.slow_image import SlowImage
from qcow2.workload import SECTOR, Sectors

from .attached import Program

SIZE = 1 << 20
"""Bytes of the device on the disk."""
SEEDS = range(4)
STATES = 6
"""States that are checked after each cut."""


@contextmanager
def disk_as_file(seed: int) -> Iterator[tuple[PowerCutDisk, Path]]:
    """A disk that loses power, and its file."""
    needs_fuse()
    with supervised() as client, power_cut(4 * SIZE, seed=seed, client=client) as disk:
        yield disk, Path(client.export("disk", kind="fuse").address)


def work_until_the_cut(device: blkloom.Device, disk: PowerCutDisk, chance: random.Random, cluster: int) -> Sectors:
    """Random requests until one fails; what each sector may hold then."""
    sectors = Sectors(device.pread(device.size, 0))
    disk.cut(after=chance.randrange(150))
    count = device.size // SECTOR
    number = 0
    try:
        while True:
            number += 1
            first = chance.randrange(count)
            length = min(chance.choice([1, 8, 3 * cluster // SECTOR]), count - first)
            at, kind = first * SECTOR, chance.choice(["write"] * 5 + ["fua", "zeroes", "flush"])
            data = (number.to_bytes(4, "big") * (SECTOR // 4)) * length
            match kind:
                case "flush":
                    device.flush()
                    sectors.durable()
                case "zeroes":
                    sectors.write(at, bytes(len(data)))
                    device.write_zeroes(at, len(data))
                case _:
                    sectors.write(at, data)
                    device.pwrite(data, at, fua=kind == "fua")
                    if kind == "fua":
                        sectors.durable(first, first + length)
    except OSError:
        assert disk.status.startswith("cut ")
        return sectors


@contextmanager
def opened(table: str) -> Iterator[blkloom.Device]:
    """A device that is closed although its disk has no power."""
    device = blkloom.open(table)
    try:
        yield device
    finally:
        with suppress(LostData):
            device.close(flush=False)


def check(sectors: Sectors, content: bytes, where: str) -> None:
    wrong = [
        number
        for number, allowed in enumerate(sectors.allowed)
        if content[number * SECTOR : (number + 1) * SECTOR] not in allowed
    ]
    assert not wrong, f"{where}: sectors {wrong[:5]} have lost what was flushed"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", ["0", "0 1 direct_io"], ids=["buffered", "direct"])
def test_a_file_has_what_was_flushed(options: str, seed: int) -> None:
    with disk_as_file(seed) as (disk, path), opened(f"0 {SIZE // SECTOR} loop {path} {options}") as device:
        sectors = work_until_the_cut(device, disk, random.Random(seed), 4096)
        for state in disk.states(STATES):
            check(sectors, state.path.read_bytes(), f"state {state.number}")


@pytest.mark.usefixtures("qemu_tools")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=512,lazy_refcounts=on"])
def test_an_image_on_ext4_is_consistent_and_has_what_was_flushed(
    options: str, seed: int, tmp_path: Path, program: Program
) -> None:
    needs_fuse()
    needs_root("a mounted file system")
    with supervised() as client, power_cut(16 * SIZE, seed=seed, client=client) as disk:
        node = client.attach("disk").node.path
        run(program("mkfs.ext4", "e2fsprogs"), "-q", node)
        with mounted(program, "ext4", node, tmp_path / "disk", "rw") as folder:
            image = folder / "image.qcow2"
            qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, str(SIZE))
            run(program("sync", "coreutils"), "--file-system", folder)
            with opened(f"0 {SIZE // SECTOR} qcow2 {image}") as device:
                sectors = work_until_the_cut(device, disk, random.Random(seed), 4096)
        client.detach("disk")
        for state in disk.states(STATES):
            where = f"state {state.number}"
            with mounted(program, "ext4", state.path, tmp_path / "state", "loop") as folder:
                found = SlowImage((folder / "image.qcow2").read_bytes())
            assert not found.check().corruptions, where
            check(sectors, found.content(), where)
