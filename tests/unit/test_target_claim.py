"""Claims of files: many readers or one writer, errors that name the holder, and QEMU's locks."""

import fcntl
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blkloom.errors import BusyError
from blkloom.targets.claim import Claim

HOLDER = """
import os, sys
from blkloom.targets.claim import Claim
claim = Claim(os.open(sys.argv[1], os.O_RDWR), sys.argv[1], writable=True)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "disk"
    file.write_bytes(bytes(4096))
    return file


def claim(path: Path, *, writable: bool) -> Claim:
    with opened(path, os.O_RDWR if writable else os.O_RDONLY) as fd:
        return Claim(fd, str(path), writable=writable)


def test_many_may_read(path: Path) -> None:
    for held in [claim(path, writable=False) for _ in range(3)]:
        held.release()


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_one_who_writes_is_alone(path: Path, first: bool, second: bool) -> None:
    held = claim(path, writable=first)
    with pytest.raises(BusyError, match=rf"already in use by process {os.getpid()} \(this one\);"):
        claim(path, writable=second)
    held.release()
    claim(path, writable=second).release()


def test_a_refused_claim_leaves_no_locks_behind(path: Path) -> None:
    reader = claim(path, writable=False)
    with pytest.raises(BusyError):
        claim(path, writable=True)
    claim(path, writable=False).release()
    reader.release()


def test_a_released_claim_is_free_although_duplicates_of_its_descriptor_live(path: Path) -> None:
    with opened(path) as fd:
        held = Claim(fd, str(path), writable=True)
        held.release()
        held.release()
        claim(path, writable=True).release()


def test_a_reader_becomes_the_writer_when_it_is_alone(path: Path) -> None:
    held, other = claim(path, writable=False), claim(path, writable=False)
    with pytest.raises(BusyError):
        held.extend()
    claim(path, writable=False).release()
    other.release()
    held.extend()
    with pytest.raises(BusyError):
        claim(path, writable=False)
    held.release()


def test_another_process_is_named_by_its_pid(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=rf"in use by process {process.pid} \(-c .*\);"):
            claim(path, writable=False)
    claim(path, writable=True).release()


def test_a_foreign_lock_on_the_whole_file_is_respected(path: Path) -> None:
    with opened(path) as fd:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        with pytest.raises(BusyError):
            claim(path, writable=False)


@pytest.mark.parametrize(("writable", "in_use"), [(True, {0, 1, 3}), (False, {0})])
def test_the_locked_bytes_are_those_of_qemu(path: Path, writable: bool, in_use: set[int]) -> None:
    held = claim(path, writable=writable)
    with opened(path) as fd:
        locked = {byte for byte in range(300) if is_locked(fd, byte)}
    held.release()
    assert locked == {100 + permission for permission in in_use} | {201, 203}


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img (qemu-utils) is missing")
def test_qemu_img_refuses_a_claimed_file_as_it_would_refuse_qemu_s(path: Path, tmp_path: Path) -> None:
    def convert(*options: str) -> int:
        command = ["qemu-img", "convert", *options, "-f", "raw", "-O", "raw", str(path), str(tmp_path / "copy")]
        return subprocess.run(command, check=False, capture_output=True).returncode

    held = claim(path, writable=True)
    assert convert() == 1
    assert convert("--force-share") == 0
    held.release()
    held = claim(path, writable=False)
    assert convert() == 0
    held.release()


def is_locked(fd: int, byte: int) -> bool:
    ask = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, ask)
    return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)
