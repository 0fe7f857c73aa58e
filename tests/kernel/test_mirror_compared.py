"""The kernel's dm-mirror and blkloom's: the same table, status, contents, and what becomes of them when a leg fails.

With `2 handle_errors keep_log`, the kernel goes on without a leg that has failed, as blkloom always does.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from guest import Guest

import blkloom
from blkloom.units import Sectors
from long_runs import only_long

pytestmark = pytest.mark.kernel

REGION = 16
SECTORS = 1024
SIZE = SECTORS * 512
ARGUMENTS = f"core 1 {REGION} 2 {{0}} 0 {{1}} 0 2 handle_errors keep_log"
BLOCK = bytes(range(256)) * 32
"""A whole region: 16 sectors."""
WRITES = [(0, 3), (1, 7), (2, 7), (3, 40)]
"""(step, region): the first before a leg fails, the last after."""


def legs_in(folder: Path) -> list[Path]:
    folder.mkdir()
    found = [folder / name for name in ("a.img", "b.img")]
    for number, file in enumerate(found):
        file.write_bytes(random.Random(number).randbytes(SIZE))
    return found


class Seen(NamedTuple):
    """Status lines: in sync, and after writes without a leg; contents of the mirror and of both legs."""

    lines: list[str]
    contents: list[bytes]


def script(folder: Path, failing: int) -> str:
    """For a guest; what it prints is in the file `output` of the folder."""
    files = legs_in(folder)
    (folder / "block").write_bytes(BLOCK)
    places = ["/dev/mapper/left", "/dev/mapper/right"]
    name = places[failing].rpartition("/")[2]
    table = f"0 {SECTORS} mirror {ARGUMENTS.format(*places)}"
    writes = [
        f"dd if={folder}/block of=/dev/mapper/both bs=8192 seek={region} count=1 oflag=direct conv=notrunc status=none"
        for _, region in WRITES
    ]
    return f"""
        losetup /dev/loop0 {files[0]}
        losetup /dev/loop1 {files[1]}
        dmsetup create left --table '0 {SECTORS} linear /dev/loop0 0'
        dmsetup create right --table '0 {SECTORS} linear /dev/loop1 0'
        dmsetup create both --table '{table}'
        until dmsetup status both | grep -q ' {SECTORS // REGION}/{SECTORS // REGION} '; do dmsetup wait both 0; done
        dmsetup table both > {folder}/output
        dmsetup status both >> {folder}/output
        {writes[0]}
        dmsetup load {name} --table '0 {SECTORS} error'
        dmsetup suspend --nolockfs {name}
        dmsetup resume {name}
        {writes[1]}
        {writes[2]}
        {writes[3]}
        dmsetup status both >> {folder}/output
        cat /dev/mapper/both > {folder}/read
        dmsetup remove both
        dmsetup remove left
        dmsetup remove right
        losetup -d /dev/loop0
        losetup -d /dev/loop1
        """


def seen_in(folder: Path) -> Seen:
    """By the script that ran in the folder."""
    lines = (folder / "output").read_text().splitlines()
    return Seen(lines, [(folder / name).read_bytes() for name in ("read", "a.img", "b.img")])


def in_blkloom(folder: Path, failing: int) -> Seen:
    files = legs_in(folder)
    targets = blkloom.builtin_targets()
    names = ["left", "right"]
    lower = {name: blkloom.open(f"0 {SECTORS} linear {file} 0") for name, file in zip(names, files, strict=True)}
    table = blkloom.parse_table(
        f"0 {SECTORS} mirror {ARGUMENTS.format('blkloom:left', 'blkloom:right')}", targets=targets
    )
    lines = []
    with blkloom.Device(table, engine=lower["left"].engine, devices=lower) as both:

        def note_status() -> None:
            lines.append(" ".join(map(str, both.status()[0])))

        while f" {SECTORS // REGION}/{SECTORS // REGION} " not in both.status()[0][3]:
            time.sleep(0)
        lines.append(blkloom.format_table(table))
        note_status()
        for step, region in WRITES:
            if step == 1:
                error = blkloom.parse_table(f"0 {SECTORS} error", targets=targets)
                lower[names[failing]].load(error)
                lower[names[failing]].resume()
            both.pwrite(BLOCK, region * REGION * 512)
        note_status()
        read = both.pread(SIZE, 0)
    for device in lower.values():
        device.close()
    return Seen(lines, [read, *(file.read_bytes() for file in files)])


@pytest.mark.parametrize("series", ["6.12", pytest.param("7.3", marks=only_long)])
def test_a_leg_that_fails_is_left_out_and_said_as_in_the_kernel(
    guest: Guest, program: Callable[[str, str], str], tmp_path: Path, series: str
) -> None:
    program("dmsetup", "dmsetup")
    folders = [guest.directory / f"kernel{failing}" for failing in range(2)]
    dataclasses.replace(guest, series=series).run(
        "".join(script(folder, failing) for failing, folder in enumerate(folders)),
        modules=["dm-mod", "dm-mirror", "loop"],
    )
    for failing, folder in enumerate(folders):
        kernel, ours = seen_in(folder), in_blkloom(tmp_path / f"ours{failing}", failing)
        kernel_words = [line.split() for line in kernel.lines]
        words = [line.split() for line in ours.lines]
        assert [len(line) for line in words] == [len(line) for line in kernel_words], kernel.lines
        for line, kernel_line in zip(words, kernel_words, strict=True):
            # The kernel names devices by their numbers.
            assert [(mine, theirs) for mine, theirs in zip(line, kernel_line, strict=True) if mine != theirs] == [
                (name, theirs) for name, theirs in zip(line, kernel_line, strict=True) if name.startswith("blkloom:")
            ], kernel.lines
        assert ours.contents == kernel.contents
        assert Sectors(SECTORS) * 512 == len(ours.contents[0])
