"""Other uses of a mapped file at the same time: the same table, the same page, other mounts, mounts unknown to the
worker.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import blkloom
from blkloom.errors import BackingError, TableError
from conformance.backing_files import write_in_extents
from conformance.block_map.conftest import SECTORS, SIZE, Program
from conformance.file_systems import EXT4, FileSystems, loop_device, made_on_a_device, mounted, run
from life.conftest import Life, a_life

pytestmark = pytest.mark.timeout(120)


def modes(device: blkloom.Device) -> list[str]:
    return [text.split()[0] for _, _, _, text in device.status()]


@pytest.mark.parametrize("way", ["block_map", "block_map=try"])
@pytest.mark.parametrize("other", ["linear {file} 0", "loop {file} 0", "loop {file} 0 1 direct_io"])
@pytest.mark.parametrize("first", [True, False])
def test_a_table_that_uses_the_file_in_another_way_too_is_refused(
    file: Path, way: str, other: str, first: bool
) -> None:
    """What the other way punches out of the file would be written by this one."""
    targets = [f"loop {file} 0 1 {way}", other.format(file=file)]
    if not first:
        targets.reverse()
    with pytest.raises(TableError, match="whose blocks are mapped cannot be used in another way"):
        blkloom.open("\n".join(f"{number * 512} 512 {target}" for number, target in enumerate(targets)))
    os.close(os.open(file, os.O_RDWR | os.O_NONBLOCK))  # nothing of it is held


def test_pieces_that_meet_inside_a_page_lose_nothing_when_they_are_given_up(file: Path) -> None:
    """Sectors 1000 to 1007 are one page; written through the cache by one segment, it must not hold old bytes of
    the other's.
    """
    content = bytearray(file.read_bytes())
    table = (
        f"0 1001 loop {file} 0 2 block_map immutable=off\n1001 1047 loop {file} {1001 * 512} 2 block_map immutable=off"
    )
    done = threading.Event()
    wrong: list[int] = []

    def write(sector: int) -> None:
        chance = random.Random(sector)
        while not done.is_set() and not wrong:
            data = chance.randbytes(512)
            device.pwrite(data, sector * 512)
            content[sector * 512 : sector * 512 + 512] = data
            if device.pread(512, sector * 512) != data:
                wrong.append(sector)

    with blkloom.open(table) as device:
        writers = [threading.Thread(target=write, args=(sector,)) for sector in (1000, 1001, 1002, 1007)]
        for writer in writers:
            writer.start()
        try:
            for _ in range(30):
                assert modes(device) == ["block_map", "block_map"]
                os.close(os.open(file, os.O_RDONLY))
                assert modes(device) == ["file", "file"]
                device.suspend()
                device.resume()
        finally:
            done.set()
            for writer in writers:
                writer.join()
    assert not wrong
    assert file.read_bytes() == content


@pytest.mark.parametrize("wrote", [False, True])
def test_the_files_time_changes_if_it_was_written_to(file: Path, wrote: bool) -> None:
    os.utime(file, (1, 1))
    with blkloom.open(f"0 {SECTORS} loop {file} 0 1 block_map") as device:
        device.pread(512, 0)
        if wrote:
            device.pwrite(b"w" * 512, 0)
    assert (os.stat(file).st_mtime > 1) == wrote


def test_a_file_mapped_into_memory_to_write_is_warned_of_and_not_mapped_by_blocks(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 4096):
        stream.close()
        with blkloom.open(f"0 {SECTORS} loop {file}", shared=True) as device:
            assert modes(device) == ["file"]
        assert f"is mapped into userspace for writing by process {os.getpid()}" in caplog.text
        with pytest.raises(BackingError, match="it is open elsewhere"):
            blkloom.open(f"0 {SECTORS} loop {file} 0 1 block_map", shared=True)
    caplog.clear()
    with blkloom.open(f"0 {SECTORS} loop {file}"):
        assert "userspace" not in caplog.text


def test_a_swap_file_is_refused(place: Path, program: Program) -> None:
    path = place / "swap"
    path.write_bytes(bytes(SIZE))
    path.chmod(0o600)
    run(program("mkswap", "mount"), path)
    if subprocess.run(
        [program("swapon", "mount"), "--priority", "0", path], capture_output=True, check=False
    ).returncode:
        pytest.skip("swapon is not permitted here")
    try:
        for options in ("1 block_map", "2 block_map read_only"):
            with pytest.raises(BackingError, match=r"open elsewhere|Text file busy|Operation not permitted"):
                blkloom.open(f"0 {SECTORS} loop {path} 0 {options}")
    finally:
        run(program("swapoff", "mount"), path)
        path.unlink()


@pytest.mark.parametrize("said", ["by mount", "by the superblock"])
def test_a_file_system_that_journals_data_is_refused(program: Program, tmp_path: Path, said: str) -> None:
    with made_on_a_device(program, EXT4, 512, tmp_path) as (place, device):
        write_in_extents(str(place / "f"), os.urandom(SIZE), extents=2)
        run(program("umount", "mount"), place)
        options = "rw,data=journal" if said == "by mount" else "rw"
        if said == "by the superblock":
            run(program("tune2fs", "e2fsprogs"), "-o", "journal_data", device)
        run(program("mount", "mount"), "-t", "ext4", "-o", options, device, place)
        with pytest.raises(BackingError, match="mounted with data=journal"):
            blkloom.open(f"0 {SECTORS} loop {place / 'f'} 0 1 block_map")


@pytest.fixture
def overlay(program: Program, tmp_path: Path) -> Iterator[Path]:
    """Over directories of ext4."""
    made = FileSystems(program, tmp_path)
    yield made.place("overlay")
    made.close()


def test_a_file_of_an_overlay_is_refused_by_the_overlays_name(overlay: Path) -> None:
    write_in_extents(str(overlay / "f"), os.urandom(SIZE), extents=1)
    with pytest.raises(BackingError, match="overlay may move the blocks of a file"):
        blkloom.open(f"0 {SECTORS} loop {overlay / 'f'} 0 1 block_map")


@pytest.fixture
def life() -> Iterator[Life]:
    with a_life() as life:
        yield life


def test_a_worker_maps_files_of_a_file_system_that_it_has_not_seen_mounted(
    life: Life, program: Program, tmp_path: Path
) -> None:
    """The client opens files; the worker's mounts are those of its beginning."""
    (image := tmp_path / "image").touch()
    os.truncate(image, EXT4.size)
    with life.client() as client, loop_device(program, image) as device:
        client.create("disk", table=f"0 {SECTORS} zero")
        run(program("mkfs.ext4", "e2fsprogs"), "-q", device)
        with mounted(program, "ext4", device, tmp_path / "late", "rw") as late:
            write_in_extents(str(late / "f"), bytes(SIZE), extents=3)
            table = f"0 {SECTORS} loop {late / 'f'} 0 1 block_map"
            for _ in range(2):
                client.load("disk", table=table)
                client.resume("disk")
                assert client.status("disk")[0][3].startswith("block_map 3 ")
            client.remove("disk", retry=True)
        run(program("e2fsck", "e2fsprogs"), "-f", "-n", device)


def test_a_table_is_replaced_again_and_again_by_one_on_the_same_file(life: Life, file: Path) -> None:
    """Each load opens the file anew, on the client's side; none of the descriptors may stand in the lease's way."""
    table = f"0 {SECTORS} loop {file} 0 1 block_map"
    with life.client() as client:
        client.create("disk", table=table)
        for _ in range(3):
            assert client.status("disk")[0][3].startswith("block_map ")
            client.load("disk", table=table)
            client.resume("disk")
        assert client.status("disk")[0][3].startswith("block_map ")
        client.load("disk", table=f"0 {SECTORS} loop {file}")
        client.resume("disk")
        assert client.status("disk")[0][3].startswith("file ")
        client.remove("disk", retry=True)
    os.close(os.open(file, os.O_RDWR | os.O_NONBLOCK))
