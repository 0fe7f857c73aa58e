"""A file that cannot be mapped is refused with the reason; with `block_map=try`, it is used in file mode."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import blkloom
from blkloom._engine import File
from blkloom.errors import BackingError, TableError
from blkloom.filemap import fiemap, page_cache
from blkloom.filemap.fiemap import Extents
from blkloom.filemap.immutable import hold, release, release_abandoned
from blkloom.table import parse_table
from blkloom.targets.registry import all_targets
from conformance.backing_files import write_in_extents
from conformance.block_map.conftest import SECTORS, SIZE, Program
from conformance.file_systems import EXT4, made_on_a_device, mounted


def mode(device: blkloom.Device) -> str:
    ((_, _, _, text),) = device.status()
    return text.split()[0]


def refused(path: Path | str, reason: str, caplog: pytest.LogCaptureFixture, *, offset: int = 0) -> None:
    """A block map is refused for the reason; with `=try` the reason is a warning."""
    sectors = SECTORS - 8
    with pytest.raises((BackingError, TableError), match=reason):
        blkloom.open(f"0 {sectors} loop {path} {offset} 1 block_map")
    with caplog.at_level(logging.WARNING), blkloom.open(f"0 {sectors} loop {path} {offset} 1 block_map=try") as device:
        assert mode(device) == "file"
        assert len(device.pread(512, 0)) == 512
    assert any(reason in record.getMessage() for record in caplog.records)


def test_a_file_with_a_hole(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with file.open("r+b") as stream:
        stream.truncate(65536)
        stream.truncate(SIZE)
    refused(file, "File is sparse: there is a hole at byte 65536", caplog)


def test_a_read_only_device_may_have_holes(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(65536)
        stream.truncate(SIZE)
    content = file.read_bytes()
    for options, read_only in (("1 block_map", True), ("2 block_map read_only", False)):
        with blkloom.open(f"0 {SECTORS} loop {file} 0 {options}", read_only=read_only) as device:
            assert mode(device) == "block_map"
            assert device.pread(SIZE, 0) == content


def test_blocks_that_were_never_written(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with file.open("r+b") as stream:
        stream.truncate(0)
        os.posix_fallocate(stream.fileno(), 0, SIZE)
    refused(file, "its extent at byte 0 is allocated but not written", caplog)


def test_a_file_that_is_open_elsewhere(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with file.open("rb"):
        refused(file, "it is open elsewhere", caplog)


def test_a_file_whose_data_goes_through_the_journal(place: Path, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    if subprocess.run(["chattr", "+j", file], capture_output=True, check=False).returncode:
        pytest.skip("this file system journals no data")
    refused(file, "its data goes through the journal", caplog)


def test_pages_that_stay_in_the_page_cache(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is in a pipe stays in the page cache, and would be read there when the blocks have changed."""
    source, pipe = os.pipe()
    try:
        with file.open("rb") as stream:
            assert os.splice(stream.fileno(), pipe, 16384, offset_src=0) == 16384
        refused(file, "pages of it stay in the page cache", caplog)
    finally:
        os.close(source)
        os.close(pipe)
    with blkloom.open(f"0 {SECTORS} loop {file} 0 1 block_map") as device:
        assert mode(device) == "block_map"


def test_pages_are_counted_by_older_kernels_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with file.open("rb") as stream:
        fd = stream.fileno()
        opened = File(fd, writable=False)
        assert page_cache.empty(opened)
        assert page_cache.cached(fd) == 0
        os.pread(fd, 1, SIZE // 2)
        counted = page_cache.cached(fd)
        monkeypatch.setattr(page_cache, "_CACHESTAT", -1)  # ENOSYS
        assert page_cache.cached(fd) == counted > 0
        assert page_cache.empty(opened)
        assert page_cache.cached(fd) == 0


def test_extents_shared_with_a_clone(place: Path, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    clone = place / "clone"
    done = subprocess.run(["cp", "--reflink=always", file, clone], capture_output=True, check=False)
    if done.returncode:
        clone.unlink(missing_ok=True)
        pytest.skip("this file system has no reflinks")
    try:
        refused(file, "is shared with another file", caplog)
    finally:
        os.truncate(clone, 0)
        clone.unlink()


def test_a_file_system_that_is_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Path("/dev/shm") / f"blkloom-{os.getpid()}"
    path.write_bytes(bytes(SIZE))
    try:
        refused(path, "tmpfs may move the blocks of a file at any time", caplog)
    finally:
        path.unlink()


def test_a_piece_that_does_not_begin_with_a_block(
    program: Program, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with made_on_a_device(program, EXT4, 4096, tmp_path) as (place, _):
        path = place / "f"
        write_in_extents(str(path), os.urandom(SIZE), extents=2)
        refused(path, "Unaligned offset 512: its block device has blocks of 4096 bytes", caplog, offset=512)


def test_several_segments_hold_one_file_together(file: Path) -> None:
    content = file.read_bytes()
    table = f"0 512 loop {file} 262144 1 block_map\n512 512 loop {file} 0 1 block_map"
    with blkloom.open(table) as device:
        assert [text.split()[0] for *_, text in device.status()] == ["block_map"] * 2
        device.pwrite(b"m" * 8192, 256 * 1024 - 4096)
        assert (
            file.read_bytes()
            == content[:4096].replace(content[:4096], b"m" * 4096)
            + content[4096:520192]
            + (b"m" * 4096)
            + content[524288:]
        )
        assert [text.split()[0] for *_, text in device.status()] == ["file"] * 2


def test_segments_that_call_one_file_by_two_names_let_it_go_together(file: Path) -> None:
    """To open it by the second name takes the lease from the first segment, which must not take the second's for
    its own.
    """
    other = file.with_name("g")
    os.link(file, other)
    try:
        table = f"0 512 loop {file} 262144 1 block_map\n512 512 loop {other} 0 1 block_map"
        with blkloom.open(table) as device:
            assert [text.split()[0] for *_, text in device.status()] == ["block_map"] * 2
            with file.open("rb") as stream:
                assert [text.split()[0] for *_, text in device.status()] == ["file"] * 2
                device.pwrite(b"m" * 4096, 0)
                stream.seek(262144)
                assert stream.read(4096) == b"m" * 4096
    finally:
        other.unlink()


LEASE_UNTIL_TOLD = """
import fcntl, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
fd = os.open(sys.argv[1], os.O_RDONLY)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
print("leased", flush=True)
signal.sigwait({signal.SIGIO})
print("asked for", flush=True)
sys.stdin.readline()
"""


def test_a_file_is_let_go_while_a_table_waits_for_another_to_open(place: Path, file: Path) -> None:
    """The kernel waits for us for a while only, and opening may take longer."""
    slow = place / "slow"
    slow.write_bytes(bytes(SIZE))
    command = [sys.executable, "-c", LEASE_UNTIL_TOLD, str(slow)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other,
        blkloom.open(f"0 {SECTORS} loop {file} 0 2 block_map immutable=off") as device,
    ):
        assert other.stdout is not None
        assert other.stdout.readline() == "leased\n"
        table = parse_table(f"0 {SECTORS} loop {slow}", targets=all_targets())
        loading = threading.Thread(target=device.load, args=(table,))
        loading.start()
        assert other.stdout.readline() == "asked for\n"
        file.open("r+b").close()
        assert mode(device) == "file"
        assert loading.is_alive()
        other.communicate("go on\n")
        loading.join()
        assert device.inactive_table is not None
    slow.unlink()


def test_a_table_replaced_by_one_on_the_same_file_is_mapped_again(file: Path) -> None:
    with blkloom.open(f"0 1024 loop {file} 0 1 block_map") as device:
        device.pwrite(b"1" * 512, 0)
        table = device.table
        assert table is not None
        device.load(table)
        assert mode(device) == "file"
        device.resume()
        assert mode(device) == "block_map"
        assert device.pread(512, 0) == b"1" * 512


ATTEMPTS = 10
"""A supervisor of another test may start in between and free the file."""
HOLD_AND_DIE = """
import os, signal, sys
import blkloom
device = blkloom.open(f"0 {sys.argv[2]} loop {sys.argv[1]} 0 1 block_map")
device.pwrite(b"k" * 4096, 0)
device.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def writable(file: Path) -> bool:
    try:
        file.open("r+b").close()
    except PermissionError:
        return False
    return True


def test_the_next_device_frees_a_file_that_a_killed_process_left_immutable(file: Path) -> None:
    for _ in range(ATTEMPTS):
        subprocess.run([sys.executable, "-c", HOLD_AND_DIE, file, str(SECTORS)], check=False, timeout=60)
        if not writable(file):
            break
    else:
        pytest.fail("the file is not left immutable")
    with blkloom.open(f"0 {SECTORS} loop {file} 0 1 block_map") as device:
        assert mode(device) == "block_map"
        assert device.pread(4096, 0) == b"k" * 4096
    file.open("r+b").close()


def test_a_file_made_immutable_by_its_owner_stays_so(file: Path, tmp_path: Path) -> None:
    subprocess.run(["chattr", "+i", file], check=True)
    try:
        with file.open("rb") as stream:
            assert hold(stream.fileno(), str(file), tmp_path) is None
        assert not release(str(file), tmp_path)
        assert release_abandoned(tmp_path) == []
        with pytest.raises(PermissionError):
            file.open("r+b")
    finally:
        subprocess.run(["chattr", "-i", file], check=True)


def test_a_device_that_has_the_file_open_with_direct_io_is_not_mapped_but_goes_on(file: Path) -> None:
    with blkloom.open(f"0 {SECTORS} loop {file} 0 1 direct_io") as device:
        with pytest.raises(BackingError, match="the device itself has it open in another way"):
            device.load(parse_table(f"0 {SECTORS} loop {file} 0 1 block_map", targets=all_targets()))
        device.resume()
        assert mode(device) == "direct_io"
        device.load(parse_table(f"0 {SECTORS} loop {file} 0 1 block_map=try", targets=all_targets()))
        device.resume()
        assert mode(device) == "file"


def test_a_record_outlasts_another_file_system_in_the_place_of_its_own(
    file: Path, tmp_path: Path, program: Program
) -> None:
    with file.open("rb") as stream:
        held = hold(stream.fileno(), str(file), tmp_path)
        assert held is not None
        held.abandon()
    with mounted(program, "tmpfs", "tmpfs", file.parent, "rw"):
        file.write_bytes(b"another")
        assert release_abandoned(tmp_path) == []
    (line,) = release_abandoned(tmp_path)
    assert str(file) in line


def test_a_record_of_another_file_system_that_had_the_device_number_is_no_obstacle(file: Path, tmp_path: Path) -> None:
    with file.open("rb") as stream:
        held = hold(stream.fileno(), str(file), tmp_path)
        assert held is not None
        (record,) = tmp_path.iterdir()
        gone = record.with_name(record.name.rpartition("-")[0] + "-0")  # sorts first, and is not read last
        gone.write_bytes(record.read_bytes().replace(bytes(file), b"/not/mounted/now"))
        held.abandon()
    assert release(str(file), tmp_path)
    file.open("r+b").close()
    assert list(tmp_path.iterdir()) == [gone]


def test_an_invalid_record_does_no_harm(file: Path, tmp_path: Path) -> None:
    (tmp_path / "1-2-3").write_bytes(b"{")
    (tmp_path / "1-2-4").write_bytes(b'{"path":"/dev/null","device":1,"inode":1,"generation":0}')
    assert release_abandoned(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_locked_record_is_not_released_by_others(file: Path, tmp_path: Path) -> None:
    with file.open("rb") as stream:
        held = hold(stream.fileno(), str(file), tmp_path)
        assert held is not None
        again = hold(stream.fileno(), str(file), tmp_path)  # the next process of the device
        assert again is not None
        held.abandon()
        assert release_abandoned(tmp_path) == []
        again.release()
    file.open("r+b").close()
    assert list(tmp_path.iterdir()) == []


def test_a_record_has_the_real_path_of_the_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker stands in another directory than the client who gave the path, and opened the file."""
    monkeypatch.chdir(tmp_path)
    records = tmp_path / "records"
    with file.open("rb") as stream:
        held = hold(stream.fileno(), file.name, records)
        assert held is not None
        held.abandon()
    (line,) = release_abandoned(records)
    assert line.startswith(f"{file}: ")
    file.open("r+b").close()


def test_a_record_goes_only_after_the_flag_is_durably_off(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a crash between the two leaves an immutable file without a record."""
    there: list[bool] = []
    sync = os.fsync

    def fsync(fd: int) -> None:
        sync(fd)
        if os.path.sameopenfile(fd, stream.fileno()):
            there.append(any(tmp_path.iterdir()))

    with file.open("rb") as stream:
        held = hold(stream.fileno(), str(file), tmp_path)
        assert held is not None
        monkeypatch.setattr(os, "fsync", fsync)
        held.release()
        monkeypatch.undo()
    assert there == [True]
    assert list(tmp_path.iterdir()) == []


def test_leases_of_others_are_waited_for(file: Path) -> None:
    """The lease of another process delays an open; it does not make the open fail."""
    code = (
        "import fcntl, os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)\n"
        "print('leased', flush=True)\n"
        "signal.sigwait({signal.SIGIO})\n"
        "fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, file], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "leased\n"
        with blkloom.open(f"0 {SECTORS} loop {file}", shared=True) as device:
            assert device.pwrite(b"x" * 512, 0) == 512
    assert other.returncode == 0


def extents(*runs: tuple[int, int, int]) -> Extents:
    columns = [np.array(column, np.uint64) for column in zip(*runs, strict=True)]
    return Extents(columns[0], columns[1], columns[2], np.zeros(len(runs), np.uint32))


def test_neighbours_on_the_disk_become_one_extent() -> None:
    found = extents((0, 1000, 10), (10, 1010, 5), (15, 2000, 5), (30, 2015, 5), (35, 2020, 1)).merged()
    assert found.logical.tolist() == [0, 15, 30]
    assert found.physical.tolist() == [1000, 2000, 2015]
    assert found.length.tolist() == [15, 5, 6]


def test_a_piece_of_a_file_has_a_piece_of_its_extents() -> None:
    found = extents((0, 1000, 10), (10, 2000, 10), (20, 3000, 10)).within(5, 25)
    assert found.logical.tolist() == [5, 10, 20]
    assert found.physical.tolist() == [1005, 2000, 3000]
    assert found.length.tolist() == [5, 10, 5]


def test_more_extents_than_one_answer_holds(place: Path) -> None:
    path = place / "many"
    write_in_extents(str(path), bytes(4096 * 4300), extents=4200)
    try:
        with path.open("rb") as stream:
            found = fiemap.extents_of(stream.fileno())
        assert len(found) >= 4200
        ends = found.logical + found.length
        assert found.logical[0] == 0
        assert np.array_equal(ends[:-1], found.logical[1:])
    finally:
        path.unlink()
