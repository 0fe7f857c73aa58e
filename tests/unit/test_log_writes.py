"""The target `log-writes`, its log, and `blkloom replay`."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blkloom
from blkloom.errors import TableError, UsageError
from blkloom.units import SECTOR, Sectors
from blkloom.write_log import (
    DISCARD,
    FLUSH,
    FUA,
    LONGEST_MARK,
    MARK,
    LogEntry,
    WriteLog,
    entry_bytes,
    superblock,
)

SIZE = 64 << 10
SECTORS = SIZE // SECTOR

WRITES = st.builds(
    lambda sector, count, flags, byte: LogEntry(sector, count, flags, bytes([byte]) * (count * SECTOR)),
    st.integers(0, 2**40),
    st.integers(1, 4),
    st.sampled_from((0, FUA)),
    st.integers(0, 255),
)
ENTRIES = st.one_of(
    WRITES,
    st.builds(LogEntry, st.integers(0, 2**40), st.integers(1, 2**40), st.just(DISCARD)),
    st.builds(LogEntry, st.just(0), st.just(0), st.just(FLUSH)),
    st.builds(lambda mark: LogEntry(0, 0, MARK, mark=mark), st.binary(max_size=LONGEST_MARK)),
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").write_bytes(os.urandom(SIZE))
    return tmp_path / "disk"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    with (tmp_path / "log").open("wb") as file:
        file.truncate(1 << 20)
    return tmp_path / "log"


def entries_of(log: Path) -> list[LogEntry]:
    with log.open("rb") as file:
        return list(WriteLog(file, str(log)))


def without_data(entries: list[LogEntry]) -> list[tuple[int, int, int]]:
    return [(entry.sector, entry.sectors, entry.flags) for entry in entries]


@given(st.lists(ENTRIES, max_size=8))
def test_a_log_is_read_as_it_was_written(entries: list[LogEntry]) -> None:
    text = superblock(len(entries)) + b"".join(map(entry_bytes, entries))
    assert list(WriteLog(io.BytesIO(text), "log")) == entries


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1))
def test_a_damaged_log_is_an_error(junk: bytes, entries: int) -> None:
    for text in (junk, superblock(entries) + junk, superblock(entries) + junk.ljust(SECTOR, b"\xff")):
        if text.startswith(superblock(0)[:16]) and not entries:
            continue
        with pytest.raises(UsageError):
            list(WriteLog(io.BytesIO(text), "log"))


def test_writes_are_recorded_at_the_flush_after_them(disk: Path, log: Path) -> None:
    with blkloom.open(f"0 {SECTORS} log-writes {disk} {log}") as device:
        before = device.pread(SIZE, 0)
        device.pwrite(b"a" * 1024, 512)
        assert device.status()[0][3] == "0 0"
        device.pwrite(b"b" * 512, 4096, fua=True)  # at once, without those before
        assert device.status()[0][3] == "1 2"
        device.discard(8192, 4096)
        device.flush()
        device.message(Sectors(0), ["mark", "a", "b"])
        device.write_zeroes(0, 512)
        device.flush()
        device.pwrite(b"c" * 512, 0)
        after = device.pread(SIZE, 0)
    found = entries_of(log)
    assert without_data(found) == [
        (8, 1, FUA),
        (1, 2, 0),
        (16, 8, DISCARD),
        (0, 0, FLUSH),
        (0, 0, MARK),
        (0, 1, 0),
        (0, 0, FLUSH),
        (0, 1, 0),
        (0, 0, FLUSH),
        (0, 0, MARK),
    ]
    assert [entry.mark for entry in found if entry.flags & MARK] == [b"a b", b"dm-log-writes-end"]
    contents = bytearray(before)
    for entry in found:
        data = bytes(entry.sectors * SECTOR) if entry.flags & DISCARD else entry.data
        contents[entry.sector * SECTOR : entry.sector * SECTOR + len(data)] = data
    assert contents == after == disk.read_bytes()


def test_a_segment_is_recorded_with_its_position(disk: Path, log: Path) -> None:
    with blkloom.open(f"0 8 zero\n8 16 log-writes {disk} {log}") as device:
        device.pwrite(b"a" * 512, 9 * SECTOR)
        device.flush()
    assert without_data(entries_of(log))[0] == (9, 1, 0)
    assert disk.read_bytes()[9 * SECTOR : 10 * SECTOR] == b"a" * 512


def test_a_full_log_ends_the_recording_and_not_the_writing(disk: Path, log: Path) -> None:
    os.truncate(log, 6 * SECTOR)
    with blkloom.open(f"0 {SECTORS} log-writes {disk} {log}") as device:
        for number in range(4):
            device.pwrite(bytes([number]) * SECTOR, 0, fua=True)
        assert device.status()[0][3] == "2 4 logging_disabled"
        assert device.pread(SECTOR, 0) == b"\3" * SECTOR
    assert len(entries_of(log)) == 2


def test_wrong_tables_and_messages_are_refused(disk: Path, log: Path) -> None:
    os.truncate(log, SECTOR)
    with pytest.raises(TableError, match="log too small"):
        blkloom.open(f"0 {SECTORS} log-writes {disk} {log}")
    os.truncate(log, 1 << 20)
    with pytest.raises(TableError, match="too small for target"):
        blkloom.open(f"0 {SECTORS + 1} log-writes {disk} {log}")
    with blkloom.open(f"0 {SECTORS} log-writes {disk} {log}") as device:
        for words in (["mark"], ["note", "x"], ["mark", "x" * SECTOR]):
            with pytest.raises(UsageError):
                device.message(Sectors(0), words)


def test_a_read_only_device_takes_no_mark(disk: Path, log: Path) -> None:
    with blkloom.open(f"0 {SECTORS} log-writes {disk} {log}", read_only=True) as device:
        assert device.pread(SIZE, 0) == disk.read_bytes()
        with pytest.raises(UsageError, match="a read-only device records nothing"):
            device.message(Sectors(0), ["mark", "x"])
    assert log.read_bytes() == bytes(1 << 20)


def replay(blkloom: str, *arguments: str | Path, status: int = 0) -> str:
    done = subprocess.run([blkloom, "replay", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def test_replay_makes_each_state_of_the_disk(blkloom: str, disk: Path, log: Path, tmp_path: Path) -> None:
    states = [disk.read_bytes()]
    copy = tmp_path / "copy"
    copy.write_bytes(states[0])
    with _open(f"0 {SECTORS} log-writes {disk} {log}") as device:
        for number in range(3):
            device.pwrite(bytes([number]) * 2048, 512 * number)
            device.flush()
            device.message(Sectors(0), ["mark", f"after {number}"])
            states.append(device.pread(SIZE, 0))
    for number in range(3):
        assert f"up to: mark 'after {number}'" in replay(blkloom, log, copy, "--until", f"after {number}")
        assert copy.read_bytes() == states[number + 1]
    copy.write_bytes(states[0])
    assert "up to: flush" in replay(blkloom, log, copy, "--until", "flush")
    assert copy.read_bytes() == states[1]
    replay(blkloom, log, copy)
    assert copy.read_bytes() == states[3]
    assert replay(blkloom, log, "--list").splitlines()[:3] == [
        "1\twrite of 4 sectors at 0",
        "2\tflush",
        "3\tmark 'after 0'",
    ]
    assert "no such entry" in replay(blkloom, log, copy, "--until", "never", status=64)
    assert "name it after LOG, or give --list" in replay(blkloom, log, status=64)


def test_replay_stops_at_the_first_state_that_fails_the_check(
    blkloom: str, disk: Path, log: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(disk.read_bytes())
    with _open(f"0 {SECTORS} log-writes {disk} {log}") as device:
        for byte in b"abc":
            device.pwrite(bytes([byte]) * SECTOR, 0)
            device.flush()
    found = replay(blkloom, log, copy, "--check", f"! head -c 1 {copy} | grep b", status=1)
    assert "the check failed with status 1 after entry 4: flush" in found
    assert copy.read_bytes()[:SECTOR] == b"b" * SECTOR
    assert "checked 4 times" in replay(blkloom, log, copy, "--check", "true")


_open = blkloom.open
"""The fixture of that name is the path of the command."""
