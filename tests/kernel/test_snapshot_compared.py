"""Snapshots of the kernel's dm-snapshot and of blkloom: each reads the stores of the other, with the same status."""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from guest import Guest

import blkloom
from long_runs import only_long

pytestmark = pytest.mark.kernel

SECTORS = 2048
SIZE = SECTORS * 512
STORE = 3 * SECTORS
CHUNK = 8
SECONDS = 60.0


def view_of(origin: Path, store: Path) -> tuple[str, bytes]:
    """Status and contents of the snapshot with this store."""
    with blkloom.open(f"0 {SECTORS} snapshot {origin} {store} P {CHUNK}") as snapshot:
        return snapshot.status()[0][3], snapshot.pread(SIZE, 0)


def merge(origin: Path, store: Path) -> str:
    """Merges the snapshot; returns the last status."""
    with blkloom.open(f"0 {SECTORS} snapshot-merge {origin} {store} P {CHUNK}") as device:
        end = time.monotonic() + SECONDS
        while (status := device.status()[0][3]) != f"{2 * CHUNK}/{STORE} {2 * CHUNK}":
            assert time.monotonic() < end, status
            time.sleep(0.01)
        return status


def make_files(folder: Path, seed: int) -> None:
    (folder / "origin").write_bytes(random.Random(seed).randbytes(SIZE))
    (folder / "store").write_bytes(bytes(STORE * 512))


def writes(seed: int) -> list[tuple[str, int, bytes]]:
    """(device, sector, data): more chunks than one area of exceptions has."""
    chance = random.Random(seed)
    found = []
    for _ in range(40):
        count = chance.randrange(1, 80)
        sector = chance.randrange(SECTORS - count)
        found.append((chance.choice(["origin", "snapshot"]), sector, chance.randbytes(count * 512)))
    return found


@pytest.mark.parametrize("series", ["6.12", pytest.param("7.3", marks=only_long)])
def test_each_reads_the_stores_of_the_other(guest: Guest, program: Callable[[str, str], str], series: str) -> None:
    program("dmsetup", "dmsetup")
    guest = dataclasses.replace(guest, series=series)
    ours, theirs = guest.directory / "ours", guest.directory / "theirs"
    for folder, seed in ((ours, 1), (theirs, 2)):
        folder.mkdir()
        make_files(folder, seed)

    devices: dict[str, blkloom.Device] = {}
    for name, table in (
        ("real", f"0 {SECTORS} linear {ours}/origin 0"),
        ("origin", f"0 {SECTORS} snapshot-origin blkloom:real"),
        ("snapshot", f"0 {SECTORS} snapshot blkloom:real {ours}/store P {CHUNK}"),
    ):
        devices[name] = blkloom.open(table, name=name, devices=devices)
    for name, sector, data in writes(3):
        devices[name].pwrite(data, sector * 512)
    status, view = devices["snapshot"].status()[0][3], devices["snapshot"].pread(SIZE, 0)
    for device in reversed(devices.values()):
        device.close()

    commands = []
    first = writes(4)[0][2]
    for number, (name, sector, data) in enumerate(writes(4)):
        (theirs / str(number)).write_bytes(data)
        to = f"/dev/mapper/{name} bs=512 seek={sector} oflag=direct conv=notrunc status=none"
        commands.append(f"dd if={theirs}/{number} of={to}")
    guest.run(
        f"""
        attach() {{ losetup /dev/loop0 $1/origin; losetup /dev/loop1 $1/$2; }}
        detach() {{ sync; losetup -d /dev/loop0; losetup -d /dev/loop1; }}
        P='/dev/loop0 /dev/loop1 P {CHUNK}'

        attach {ours} store
        dmsetup create snapshot --table "0 {SECTORS} snapshot $P"
        dmsetup status snapshot > {ours}/status
        cat /dev/mapper/snapshot > {ours}/view
        dmsetup remove snapshot
        detach

        attach {theirs} store
        dmsetup create snapshot --table "0 {SECTORS} snapshot $P"
        dmsetup create origin --table '0 {SECTORS} snapshot-origin /dev/loop0'
        {chr(10).join(commands)}
        dmsetup status snapshot > {theirs}/status
        dd if=/dev/mapper/snapshot of={theirs}/view bs=1M iflag=direct status=none
        dmsetup remove origin
        dmsetup remove snapshot
        detach

        mkdir {theirs}/merged
        cp {theirs}/origin {theirs}/store {theirs}/merged
        attach {theirs}/merged store
        dmsetup create merge --table "0 {SECTORS} snapshot-merge $P"
        until dmsetup status merge | grep -q ' {2 * CHUNK}/{STORE} {2 * CHUNK}$'; do sleep 0.1; done
        dmsetup status merge > {theirs}/merged/status
        dmsetup remove merge
        detach

        mkdir {theirs}/transient
        cp {theirs}/origin {theirs}/transient
        truncate -s {STORE * 512} {theirs}/transient/store
        attach {theirs}/transient store
        dmsetup create snapshot --table "0 {SECTORS} snapshot /dev/loop0 /dev/loop1 N {CHUNK}"
        dd if={theirs}/0 of=/dev/mapper/snapshot oflag=direct conv=notrunc status=none
        dd if=/dev/mapper/snapshot of={theirs}/transient/before bs=1M iflag=direct status=none
        dmsetup load snapshot --table "0 {SECTORS} snapshot /dev/loop0 /dev/loop1 N {CHUNK}"
        dmsetup resume snapshot
        dd if=/dev/mapper/snapshot of={theirs}/transient/after bs=1M iflag=direct status=none
        dmsetup remove snapshot
        detach
        """,
        modules=["dm-mod", "dm-snapshot", "loop"],
    )

    assert (ours / "view").read_bytes() == view
    assert (ours / "status").read_text().split()[3:] == status.split()
    status, view = view_of(theirs / "origin", theirs / "store")
    assert (theirs / "view").read_bytes() == view
    assert (theirs / "status").read_text().split()[3:] == status.split()

    # A reload of a transient snapshot keeps its exceptions: tests/unit/test_snapshot.py shows the same of ours.
    transient = theirs / "transient"
    assert (transient / "before").read_bytes()[: len(first)] == first
    assert (transient / "after").read_bytes() == (transient / "before").read_bytes()

    merged = theirs / "merged"
    kernels = (merged / "origin").read_bytes(), (merged / "store").read_bytes()
    assert kernels[0] == view
    for name in ("origin", "store"):
        shutil.copy(theirs / name, merged / name)
    assert merge(merged / "origin", merged / "store").split() == (merged / "status").read_text().split()[3:]
    assert (merged / "origin").read_bytes() == kernels[0]
    assert (merged / "store").read_bytes() == kernels[1]
