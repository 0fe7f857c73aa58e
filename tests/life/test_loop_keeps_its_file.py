"""A loop device keeps its open file when the file is renamed, replaced or deleted, as in the kernel."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.control.states import LoopNotes
from conformance.backing_files import write_in_extents
from conformance.file_systems import EXT4, made_on_a_device
from conformance.nbd_client import FLUSH, READ, WRITE, NbdClient

from .conftest import Life, a_life, info, read, until
from .loop_commands import Loop

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def life(shared: Life) -> Life:
    """The module's."""
    return shared


@contextmanager
def replaced(file: Path, how: str) -> Iterator[int]:
    """`file` is renamed or deleted, and another is in its place, smaller. A descriptor of the first."""
    with file.open("r+b") as first:
        if how == "renamed":
            file.rename(file.with_name("old.img"))
        else:
            file.unlink()
        file.write_bytes(b"n" * 4096)
        yield first.fileno()


CHANGES = {
    "direct I/O": ("--direct-io=on", "loop0"),
    "capacity": ("-c", "loop0"),
    "block size": ("-b", "1024", "loop0"),
    "block map": ("--block-map=try", "loop0"),
}


@pytest.mark.parametrize("how", ["renamed", "deleted"])
@pytest.mark.parametrize("words", CHANGES.values(), ids=CHANGES)
def test_every_change_stays_with_the_open_file(
    loop: Loop,
    client: Client,
    file: Path,
    connect: Callable[[str], NbdClient],
    words: tuple[str, ...],
    how: str,
) -> None:
    loop("-f", file)
    nbd = connect("loop0")
    with replaced(file, how) as first:
        os.truncate(first, 16384)  # so that -c has something to do
        done = loop.run(*words)
        assert done.returncode == 0, done.stderr
        assert info(client, "loop0").size == 16384
        assert read(nbd) == b"f" * 512
        assert nbd.ask(WRITE, 0, payload=b"w" * 512).error == nbd.ask(FLUSH).error == 0
        assert os.pread(first, 1, 0) == b"w"
        assert file.read_bytes() == b"n" * 4096
        loop("--direct-io=off", "loop0")
        assert read(nbd) == b"w" * 512


@pytest.mark.parametrize("after", ["a killed worker", "an upgrade", "a resume"])
def test_it_is_the_open_file_after_whatever_happens(
    loop: Loop, client: Client, file: Path, connect: Callable[[str], NbdClient], after: str
) -> None:
    loop("-f", file)
    with replaced(file, "deleted"):
        loop("--direct-io=on", "loop0")
        if after == "a killed worker":
            os.kill(info(client, "loop0").worker, signal.SIGKILL)
            until(client, "loop0", lambda found: found.restarts == 1)
        elif after == "an upgrade":
            client.upgrade()
        else:
            client.suspend("loop0")
            client.resume("loop0")
        assert read(connect("loop0")) == b"f" * 512
        loop("--direct-io=off", "loop0")
        loop("--direct-io=on", "loop0")
        assert read(connect("loop0")) == b"f" * 512


@pytest.mark.parametrize("after", ["a killed worker", "an upgrade"])
@pytest.mark.parametrize("target", ["loop {file}", "loop {file} 0 1 round_up", "linear {file} 0"])
def test_a_device_whose_file_was_cut_off_stays_and_fails_only_what_is_missing(
    client: Client, file: Path, connect: Callable[[str], NbdClient], target: str, after: str
) -> None:
    client.create("disk", table=f"0 16 {target.format(file=file)}")
    os.truncate(file, 4096)
    if after == "a killed worker":
        os.kill(info(client, "disk").worker, signal.SIGKILL)
        until(client, "disk", lambda found: found.restarts == 1)
    else:
        client.upgrade()
    nbd = connect("disk")
    assert read(nbd, 3584) == b"f" * 512
    assert [nbd.ask(READ, offset, 512).error for offset in (4096, 7680)] == [errno.EIO] * 2
    assert (info(client, "disk").state, info(client, "disk").size) == ("ACTIVE", 8192)


def test_a_table_that_is_loaded_names_the_file_that_is_there_now(
    loop: Loop, client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    loop("-f", file)
    table = client.table("loop0")
    with replaced(file, "renamed"):
        client.load("loop0", table.replace("0 16 ", "0 8 "))
        client.resume("loop0")
        assert read(connect("loop0")) == b"n" * 512
        assert loop("-n", "-l", "-O", "BACK-FILE,BACK-INO").split() == [str(file), str(file.stat().st_ino)]


def test_a_device_is_found_by_the_file_it_has_open(loop: Loop, client: Client, file: Path) -> None:
    loop("-f", file)
    old = file.with_name("old.img")
    with replaced(file, "renamed"):
        assert loop("-j", file) == ""
        assert loop("-j", old).startswith("loop0: ")
        assert loop("-f", "-L", "--show", old) == "loop0\n"
        assert loop("-f", "-L", "--show", file) == "loop1\n"
        old.unlink()
        assert loop("-j", old) == ""
        assert loop("-j", file).startswith("loop1: ")


@pytest.mark.parametrize("how", ["renamed", "deleted"])
def test_lists_name_the_open_file_as_losetup_does(
    loop: Loop, losetup: Callable[..., subprocess.CompletedProcess[str]], file: Path, how: str
) -> None:
    device = losetup("-f", "--show", file).stdout.strip()
    loop("--shared", "loop0", file)
    with replaced(file, how):
        for words in (("-l", "-O", "BACK-FILE,BACK-INO,BACK-MAJ:MIN"), ("-l", "--raw", "-O", "BACK-FILE"), ()):
            assert loop(*words, "loop0") == losetup(*words, device).stdout.replace(device, "loop0")


def test_a_block_map_is_given_up_for_the_open_file_not_for_what_its_path_names(
    program: Callable[[str, str], str], blkloom: str, tmp_path: Path
) -> None:
    with made_on_a_device(program, EXT4, 512, tmp_path) as (place, _), a_life() as life, life.client() as client:
        file = place / "disk.img"
        write_in_extents(str(file), b"f" * 65536, extents=4)
        table = f"0 128 loop {file} 0 2 block_map immutable=off"
        client.create("loop0", table=table, loop=LoopNotes())
        with replaced(file, "renamed"):
            Loop(blkloom, life.run_dir)("--direct-io=on", "loop0")
            assert client.status("loop0")[0][3].split()[0] == "direct_io"
            assert client.read("loop0", 0, 512) == b"f" * 512
        client.remove("loop0")
