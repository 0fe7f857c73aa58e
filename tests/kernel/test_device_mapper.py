"""The same tables in the kernel's device-mapper and in blkloom have the same bytes at the same offsets.

A table is written once, with placeholders for its files. blkloom gets the paths of the files, dmsetup gets loop devices
on them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from guest import Guest

import blkloom
from long_runs import only_long

pytestmark = pytest.mark.kernel

FILES = 3
FILE_SIZE = 2 << 20
TABLES = {
    "pieces of two files": """
        0 100 linear {0} 0
        100 900 linear {1} 17
        1000 24 linear {0} 1000
    """,
    "two stripes": "0 4096 striped 2 16 {0} 0 {1} 0",
    "three stripes of one page, not from the start": "0 3072 striped 3 8 {2} 64 {0} 8 {1} 1000",
    "a hole between stripes and a piece": """
        # comments and blank lines are dmsetup's too

        0 512 striped 2 32 {0} 0 {1} 0
        512 300 zero
        812 200 linear {2} 8
    """,
}


def table(template: str, places: list[str]) -> str:
    return template.format(*places)


def backing_files(directory: Path, seed: int) -> list[Path]:
    files = []
    for number in range(FILES):
        file = directory / f"{number}.img"
        file.write_bytes(random.Random(seed + number).randbytes(FILE_SIZE))
        files.append(file)
    return files


def test_tables_mean_the_same_to_the_kernel(guest: Guest, program: Callable[[str, str], str]) -> None:
    """Each side writes one half of every device and reads what the other wrote."""
    program("dmsetup", "dmsetup")
    script = ["attach() { for n in 0 1 2; do losetup /dev/loop$n $1/$n.img; done; }"]
    script.append("detach() { for n in 0 1 2; do losetup -d /dev/loop$n; done; }")
    written: dict[Path, bytes] = {}
    for number, template in enumerate(TABLES.values()):
        folder = guest.directory / str(number)
        folder.mkdir()
        paths = [str(path) for path in backing_files(folder, seed=number)]
        (folder / "table").write_text(table(template, [f"/dev/loop{n}" for n in range(FILES)]))
        with blkloom.open(table(template, paths)) as device:
            half = device.size // 2
            device.pwrite(random.Random(~number).randbytes(half), 0)
            (folder / "write").write_bytes(random.Random(number).randbytes(device.size - half))
            written[folder] = device.pread(half, 0) + (folder / "write").read_bytes()
        script.append(f"""
            attach {folder}
            dmsetup create woven {folder}/table
            cat /dev/mapper/woven > {folder}/before
            dd if={folder}/write of=/dev/mapper/woven bs=512 seek={half // 512} conv=fsync status=none
            cat /dev/mapper/woven > {folder}/after
            dmsetup remove woven
            detach
        """)

    guest.run("\n".join(script), modules=["dm-mod", "dm-zero", "loop"])

    for number, template in enumerate(TABLES.values()):
        folder = guest.directory / str(number)
        paths = [str(folder / f"{n}.img") for n in range(FILES)]
        with blkloom.open(table(template, paths)) as device:
            half = device.size // 2
            assert (folder / "before").read_bytes()[:half] == written[folder][:half], template
            assert (folder / "after").read_bytes() == device.pread(device.size, 0), template


@only_long
@pytest.mark.parametrize("udev", [False, True], ids=["without udev", "with udev"])
def test_what_dmsetup_prints_is_served_as_it_is(guest: Guest, program: Callable[[str, str], str], udev: bool) -> None:
    """`dmsetup table` and its concise form, which name devices by their numbers."""
    guest = dataclasses.replace(guest, udev=udev)
    program("dmsetup", "dmsetup")
    program("nbd-client", "nbd-client")
    backing_files(guest.directory, seed=99)
    (guest.directory / "table").write_text(
        table(TABLES["a hole between stripes and a piece"], [f"/dev/loop{n}" for n in range(FILES)])
    )

    printed = guest.run(
        """
        for n in 0 1 2; do losetup /dev/loop$n $n.img; done
        dmsetup create woven table
        dmsetup table woven > printed
        dmsetup table --concise woven > concise
        cat /dev/mapper/woven > kernel
        dmsetup remove woven

        cat printed concise
        if [ -n "${DM_DISABLE_UDEV:-}" ]; then
            mkdir /dev/block
            for n in 0 1 2; do ln -s ../loop$n /dev/block/7:$n; done
        fi
        serve uri --table-file printed --concise "$(cat concise)" --read-only --shared --socket /run/nbd.sock
        nbd-client -unix /run/nbd.sock /dev/nbd0
        nbd-client -unix /run/nbd.sock -name woven /dev/nbd1
        cmp kernel /dev/nbd0
        cmp kernel /dev/nbd1
        nbd-client -d /dev/nbd0
        nbd-client -d /dev/nbd1
        stop
        """,
        modules=["dm-mod", "dm-zero", "loop", "nbd"],
    )

    assert "linear 7:2 8" in printed, "dmsetup is expected to print device numbers"
