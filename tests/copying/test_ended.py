"""Copies that end early: by a signal at each step, a failing or full disk. Continued, they are right."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blkloom import Device, _engine
from blkloom import open as open_device
from blkloom._engine import DeviceCopy
from blkloom.copying import running
from blkloom.copying.ends import End, NewTarget, file_end
from blkloom.copying.failing import ContentsDiffer, CopyFailed
from blkloom.copying.journal import Journal, JournalError
from blkloom.copying.running import Copying, Settings
from blkloom.errors import LostData
from blkloom.write_log import DISCARD, WriteLog
from long_runs import LONG

from .conftest import Copy
from .ended_in_process import SECTORS, SHAPE, SIZE, Stop, copy_to, end, interrupted, new
from .shapes import K, M, make


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk."""
    return make(tmp_path / "disk.img", SHAPE)


@pytest.mark.parametrize("name", ["copy.img", "copy.qcow2"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.timeout(600)
def test_a_copy_that_a_signal_ends_at_any_step_can_be_continued(
    disk: Path, tmp_path: Path, name: str, number: signal.Signals
) -> None:
    script = Path(__file__).with_name("ended_copies.py")
    options = ["--checkpoint", "1M", "--request-size", "64K"]
    stride = 1 if LONG else 7  # of the calls before and after which there is a step
    words = [sys.executable, script, str(int(number)), str(stride), disk, tmp_path / name, *options]
    environment = os.environ | {"BLKLOOM_RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


def test_what_the_journal_says_was_flushed_before(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target logs its writes: what the log has up to its last flush is durable."""
    (tmp_path / "target.img").write_bytes(bytes(SIZE))
    with (tmp_path / "log").open("wb") as log:
        log.truncate(64 * M)
    before = bytes(SIZE)  # the log begins
    said: list[int] = []
    write = Journal.write

    def checked(journal: Journal, path: str) -> None:
        durable = bytearray(before)
        with (tmp_path / "log").open("rb") as file:
            entries = list(WriteLog(file, "log")) if journal.copied else []
        last = max((number for number, entry in enumerate(entries, 1) if entry.is_durable), default=0)
        for entry in entries[:last]:
            begin = entry.sector * 512
            durable[begin : begin + len(entry.data)] = entry.data
            if entry.flags & DISCARD:
                durable[begin : begin + entry.sectors * 512] = bytes(entry.sectors * 512)
        assert durable[: journal.copied] == disk.read_bytes()[: journal.copied]
        said.append(journal.copied)
        write(journal, path)

    monkeypatch.setattr(Journal, "write", checked)
    target = end(f"0 {SECTORS} log-writes {tmp_path}/target.img {tmp_path}/log")
    state = str(tmp_path / "state")

    def reached(position: int) -> None:
        if position:
            raise Stop

    slow = Settings(state=state, rate=1, requests=1, checkpoint=M, request_size=M)  # the second request would wait
    with pytest.raises(Stop):
        copy_to(file_end(str(disk)), target, slow, reached)
    assert said in ([0, M], [0, M + 900 * K]), "the request that waited may be finished at the end"
    before = (tmp_path / "target.img").read_bytes()
    copy_to(file_end(str(disk)), target, Settings(state=state, resume=True, checkpoint=64 * K, request_size=64 * K))
    assert said[-1] == SIZE
    assert not (tmp_path / "state").exists()
    assert (tmp_path / "target.img").read_bytes() == disk.read_bytes()


def test_a_copy_that_is_dropped_ends_what_it_has_begun(tmp_path: Path) -> None:
    """The writes are faults, which Python answers meanwhile."""
    image = NewTarget(path=str(tmp_path / "x.qcow2"), name="x", format="qcow2", size=64 * M).make()
    with Device(image.table) as target, open_device(f"0 {64 * M // 512} ram") as source:
        for at in range(0, 64 * M, M):
            source.pwrite(b"d" * M, at)
        copy = DeviceCopy(source, target, start=0, end=64 * M, request_size=64 * K, requests=8)
        copy.watch(1)
        select.select([copy], [], [])
        del copy
        assert source.stats()["in_flight"] == target.stats()["in_flight"] == 0
        assert target.io_errors == 0
        assert target.pread(1, 0) == b"d"


def test_a_source_that_fails_in_the_middle_can_be_continued_when_it_is_well(disk: Path, tmp_path: Path) -> None:
    good = 2048 * 2
    source = end(f"0 {good} linear {disk} 0\n{good} {SECTORS - good} error")
    well = end(f"0 {SECTORS} linear {disk} 0")
    target = tmp_path / "copy.img"
    settings = Settings(checkpoint=M // 2, request_size=64 * K)
    with pytest.raises(CopyFailed) as caught:
        copy_to(source, new(target), settings)
    assert (caught.value.side, caught.value.errno, caught.value.exit_code) == ("source", errno.EIO, 74)
    assert caught.value.offset >= good * 512
    assert "read of" in str(caught.value)
    journal = Journal.read(f"{target}.blkloom-copy")
    assert journal is not None
    assert 0 < journal.copied <= good * 512
    result = copy_to(well, new(target), Settings(resume=True))
    assert result.start == journal.copied
    assert target.read_bytes() == disk.read_bytes()


def test_a_full_target_says_so_and_can_be_continued(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "target.img").write_bytes(b"\xff" * SIZE)
    state = str(tmp_path / "state")
    full = end(f"0 {SECTORS} full {tmp_path}/target.img 0 1m")
    with pytest.raises(CopyFailed) as caught:
        copy_to(file_end(str(disk)), full, Settings(state=state, checkpoint=M // 2, request_size=64 * K))
    assert (caught.value.side, caught.value.errno) == ("target", errno.ENOSPC)
    assert "make room" in str(caught.value)
    well = end(f"0 {SECTORS} linear {tmp_path}/target.img 0")
    assert copy_to(file_end(str(disk)), well, Settings(state=state, resume=True)).start > 0
    assert (tmp_path / "target.img").read_bytes() == disk.read_bytes()


def test_a_target_that_forgets_writes_is_found_by_verify(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "target.img").write_bytes(bytes(SIZE))
    target = end(f"0 {SECTORS} flakey {tmp_path}/target.img 0 0 1 1 drop_writes")
    with pytest.raises(ContentsDiffer) as caught:
        copy_to(file_end(str(disk)), target, Settings(verify=True))
    first = next(number for number, byte in enumerate(disk.read_bytes()) if byte)
    assert (caught.value.offset, caught.value.exit_code) == (first, 1)


@pytest.mark.parametrize("offset", [0, 700 * K, M + 900 * K - 1, 2 * M + 512, SIZE - 1])
def test_verify_finds_the_first_byte_that_differs(
    copy: Copy, disk: Path, tmp_path: Path, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In data, in holes of the source, and at the end."""
    flush = running.Copying._flush
    target = tmp_path / "copy.img"

    def spoiled(self: Copying, opened: object, end: End) -> None:
        flush(self, opened, end)  # type: ignore[arg-type]
        with target.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)

    monkeypatch.setattr(running.Copying, "_flush", spoiled)
    with pytest.raises(ContentsDiffer) as caught:
        copy_to(file_end(str(disk)), new(target), Settings(verify=True, request_size=64 * K))
    assert caught.value.offset == offset
    assert not Path(f"{target}.blkloom-copy").exists(), "to continue would copy nothing"


def test_a_rate_lets_no_more_through(disk: Path, tmp_path: Path) -> None:
    """At a byte a second, the first request passes, and the next would have to wait for more than an hour. The end does
    not wait for it.
    """
    target = tmp_path / "copy.img"
    done: list[int] = []

    def reached(position: int) -> None:
        done.append(position)
        if position:
            raise Stop

    settings = Settings(rate=1, requests=1, request_size=4096, checkpoint=4096)
    with pytest.raises(Stop):
        copy_to(file_end(str(disk)), new(target), settings, reached)
    assert done == [0, 4096]
    start = copy_to(file_end(str(disk)), new(target), Settings(resume=True)).start
    assert start in (4096, 8192), "the request that waited may be finished at the end"
    assert target.read_bytes() == disk.read_bytes()


def test_a_rate_holds_for_verify(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second request would wait, and without a rate the position would be shown when that has ended."""
    target = tmp_path / "copy.img"

    def stop(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(Copying, "_verify", stop)
        with pytest.raises(Stop):
            copy_to(file_end(str(disk)), new(target), Settings(verify=True))
    shown: list[int] = []

    def reached(what: str, position: int) -> None:
        if what == "verifying" and position:
            shown.append(position)
            raise Stop

    settings = Settings(resume=True, verify=True, rate=1, requests=1, request_size=4096, checkpoint=8192)
    with Copying(file_end(str(disk)), settings, reached, ticking=True) as copying, pytest.raises(Stop):
        copying.to(new(target))
    assert shown == [4096]


def test_a_copy_is_not_continued_from_another_source(copy: Copy, disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy.img"
    interrupted(disk, target)
    before = target.read_bytes()
    os.utime(disk, ns=(1, 1))
    said = copy("--resume", disk, target, status=65).stderr
    assert "SRC is not what it was: its changed was" in said
    assert target.read_bytes() == before
    copy("--force", disk, target)
    assert target.read_bytes() == disk.read_bytes()


def test_a_copy_is_not_continued_in_another_file(copy: Copy, disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy.img"
    interrupted(disk, target)
    target.rename(tmp_path / "kept.img")
    target.write_bytes(b"another" * M)
    assert "DST is not what it was" in copy("--resume", disk, target, status=65).stderr
    assert target.read_bytes() == b"another" * M


def test_nothing_to_continue_is_an_error_only_if_the_target_has_contents(
    copy: Copy, disk: Path, tmp_path: Path
) -> None:
    target = tmp_path / "copy.img"
    copy("--resume", disk, target)
    assert target.read_bytes() == disk.read_bytes()
    assert "was interrupted" in copy("--resume", disk, target, status=64).stderr
    Path(f"{target}.blkloom-copy").write_bytes(b"no state")
    assert "not the state of a copy" in copy("--resume", disk, target, status=65).stderr


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"blkloom_copy":2}', "\x00" * 100])
def test_what_is_no_journal_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "state").write_text(text)
    with pytest.raises(JournalError, match="not the state of a copy"):
        Journal.read(str(tmp_path / "state"))


@pytest.mark.parametrize("made", [True, False])
def test_a_disk_with_part_of_a_sector_is_verified_after_an_end_before_its_size_was_given(
    tmp_path: Path, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = SIZE + 100
    odd, target = make(tmp_path / "odd.img", (size, ((0, size, True),))), tmp_path / "copy.img"

    def stop(copying: Copying, end: End, _size: int) -> None:
        copying._save(end, SIZE, fresh=made)
        raise Stop

    def begin() -> End | NewTarget:
        return new(target, size) if made else file_end(str(target), contents=False)

    if not made:
        target.write_bytes(bytes(size))
    with monkeypatch.context() as patched:
        patched.setattr(Copying, "_give_size", stop)
        with pytest.raises(Stop):
            copy_to(file_end(str(odd)), begin(), Settings())
    assert target.stat().st_size == SIZE + 512
    assert copy_to(file_end(str(odd)), new(target, size), Settings(resume=True, verify=True)).start == SIZE
    assert target.read_bytes() == odd.read_bytes()


def test_after_a_flush_that_failed_nothing_more_is_noted(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some servers report it once: their next flush succeeds."""
    flush, failures = Device.flush, [OSError(errno.EIO, "lost")]

    def fails_once(self: Device) -> None:
        if failures:
            raise failures.pop()
        flush(self)

    monkeypatch.setattr(Device, "flush", fails_once)
    target = tmp_path / "copy.img"
    slow = Settings(rate=1, requests=1, checkpoint=4096, request_size=4096)  # the second request would wait
    with pytest.raises(LostData):
        copy_to(file_end(str(disk)), new(target), slow)
    assert not failures
    journal = Journal.read(f"{target}.blkloom-copy")
    assert journal is not None
    assert journal.copied == 0


@pytest.mark.parametrize("comparing", [False, True])
def test_a_thread_that_is_lost_leaves_no_copy_that_passes_for_whole(
    disk: Path, tmp_path: Path, comparing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its piece is not done, and it has noted no failure."""

    class Lost:
        failure = None
        ended = True
        position = 4096
        counts = (4096, 0)

        def stop(self) -> None:
            """Nothing runs."""

        def close(self) -> None:
            """Nothing runs."""

    def started(*arguments: Any, compare: bool = False, **options: Any) -> Any:
        return Lost() if compare == comparing else DeviceCopy(*arguments, compare=compare, **options)

    monkeypatch.setattr(_engine, "DeviceCopy", started)
    target = tmp_path / "copy.img"
    with pytest.raises(CopyFailed) as caught:
        copy_to(file_end(str(disk)), new(target), Settings(verify=True))
    assert caught.value.offset == 4096
    assert Path(f"{target}.blkloom-copy").exists()


def test_without_flush_nothing_is_flushed(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "target.img").write_bytes(bytes(SIZE))
    with (tmp_path / "log").open("wb") as log:
        log.truncate(64 * M)
    target = end(f"0 {SECTORS} log-writes {tmp_path}/target.img {tmp_path}/log")
    copy_to(file_end(str(disk)), target, Settings(flush=False))
    with (tmp_path / "log").open("rb") as file:
        entries = list(WriteLog(file, "log"))
    assert entries
    assert not any(entry.is_durable for entry in entries)
