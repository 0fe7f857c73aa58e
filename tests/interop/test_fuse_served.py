"""A device as a FUSE file: programs for disk images, and starts and ends of servers."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import blkloom
from blkloom import _engine
from blkloom.errors import LostData
from blkloom.export.fuse.mount import unmount
from blkloom.table.parse import parse_table
from blkloom.targets.registry import builtin_targets
from faulty_fs import FaultyFileSystem
from fuse_served import FuseProcess, FuseServed

SIZE = 64 << 20
SECTORS = SIZE // 512
PAGE = 4096
TIMEOUT = 60.0
Program = Callable[[str, str], str]


def run(*words: str | Path) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def fio_verifies(fio: str, path: Path, *more: str) -> subprocess.Popen[str]:
    """A running load that reads back and checks what it has written."""
    options = ["--ioengine=io_uring", "--direct=1", "--rw=randrw", "--bsrange=4k-128k", "--iodepth=16", "--size=48M"]
    options += ["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64", "--end_fsync=1"]
    options += ["--serialize_overlap=1"]  # of two writes to one block that are under way together either may win
    words = [fio, "--name=verify", f"--filename={path}", *options, *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended_well(process: subprocess.Popen[str]) -> None:
    said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, said


@pytest.fixture
def served(tmp_path: Path) -> Iterator[FuseServed]:
    with FuseServed(tmp_path / "node", blkloom.open(f"0 {SECTORS} ram"), clones=1) as served:
        yield served


def until_in_flight(served: FuseServed, count: int) -> None:
    while served.device.stats()["in_flight"] != count:
        threading.Event().wait(0.001)


@contextmanager
def suspended(served: FuseServed) -> Iterator[None]:
    served.device.suspend()
    try:
        yield
    finally:
        served.device.resume()


# Programs


def test_programs_use_blocks_of_any_size(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    data = os.urandom(100_003)
    (tmp_path / "data").write_bytes(data)
    table = f"0 {SECTORS} loop {tmp_path / 'disk'} 0 1 direct_io=require"
    with FuseServed(tmp_path / "node", blkloom.open(table)) as served:
        run("dd", f"if={tmp_path / 'data'}", f"of={served.path}", "bs=100", "seek=3", "conv=notrunc,fsync")
        counted = [f"count={len(data) + 300}", "iflag=count_bytes"]
        run("dd", f"if={served.path}", f"of={tmp_path / 'back'}", "bs=77", *counted)
        assert (tmp_path / "back").read_bytes() == bytes(300) + data
    assert (tmp_path / "disk").read_bytes()[:200_000] == bytes(300) + data + bytes(200_000 - 300 - len(data))


def test_qemu_uses_it_as_an_image(served: FuseServed, tmp_path: Path, qemu_tools: None) -> None:
    source = tmp_path / "source.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", source, str(SIZE))
    run("qemu-io", "-c", "write -P 7 1M 5M", "-c", "write -P 9 60M 4M", source)
    node = served.path
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", source, node)
    assert f"virtual size: 64 MiB ({SIZE} bytes)" in run("qemu-img", "info", "-f", "raw", node)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", source, node)
    run("qemu-io", "-f", "raw", "-n", "-c", "read -P 7 1M 5M", "-c", "write -z 2M 1M", "-c", "flush", node)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-T", "none", node, tmp_path / "copy.qcow2")
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", node, tmp_path / "copy.qcow2")
    assert b"\x07" * PAGE not in served.device.pread(1 << 20, 2 << 20)


def test_a_file_system_is_made_filled_and_checked_without_mounting_it(
    served: FuseServed, tmp_path: Path, program: Program
) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "data").write_bytes(data)
    run(program("mkfs.ext4", "e2fsprogs"), "-q", "-F", served.path)
    debugfs = program("debugfs", "e2fsprogs")
    run(debugfs, "-w", "-R", f"write {tmp_path / 'data'} inside", served.path)
    run(debugfs, "-R", f"dump inside {tmp_path / 'back'}", served.path)
    assert (tmp_path / "back").read_bytes() == data
    run(program("e2fsck", "e2fsprogs"), "-f", "-n", served.path)


def test_a_read_only_file_refuses_writers(tmp_path: Path) -> None:
    with FuseServed(tmp_path / "node", blkloom.open("0 8 ram"), read_only=True) as served:
        assert served.path.read_bytes() == bytes(PAGE)
        for refused in (lambda: served.path.open("r+b"), lambda: os.truncate(served.path, 1)):
            with pytest.raises(OSError, match="Read-only file system") as caught:
                refused()
            assert caught.value.errno == errno.EROFS


@pytest.mark.parametrize("synced", ["fdatasync", "O_DSYNC", "RWF_DSYNC"])
def test_what_was_synced_is_on_the_disk(tmp_path: Path, synced: str) -> None:
    with FaultyFileSystem(tmp_path / "faulty") as faulty:
        disk = faulty.file("disk.img", size=SIZE)
        with FuseServed(tmp_path / "node", blkloom.open(f"0 {SECTORS} loop {disk}")) as served:
            descriptor = os.open(served.path, os.O_WRONLY | (os.O_DSYNC if synced == "O_DSYNC" else 0))
            os.pwritev(descriptor, [b"x" * PAGE], PAGE, os.RWF_DSYNC if synced == "RWF_DSYNC" else 0)
            if synced == "fdatasync":
                os.fdatasync(descriptor)
            assert faulty.on_disk("disk.img").read_bytes()[: 2 * PAGE] == bytes(PAGE) + b"x" * PAGE
            os.close(descriptor)


def test_a_sync_that_fails_is_told_to_who_asked(tmp_path: Path) -> None:
    def sync_twice(faulty: FaultyFileSystem, disk: Path) -> None:
        with (
            FuseServed(tmp_path / "node", blkloom.open(f"0 {SECTORS} loop {disk}")) as served,
            served.path.open("r+b", buffering=0) as file,
        ):
            file.write(b"x" * PAGE)
            faulty.fail("write", errno.EIO)
            with pytest.raises(OSError, match="Input/output error"):
                os.fsync(file.fileno())
            faulty.mend()
            with pytest.raises(OSError, match="Input/output error"):
                os.fsync(file.fileno())

    with FaultyFileSystem(tmp_path / "faulty") as faulty:
        disk = faulty.file("disk.img", size=SIZE)
        with pytest.raises(LostData):  # when its device is closed
            sync_twice(faulty, disk)


def test_closing_a_file_flushes_nothing(served: FuseServed) -> None:
    with served.path.open("r+b", buffering=0) as file:
        file.write(b"x" * PAGE)
    assert served.export.stats()["flush"]["count"] == 0
    os.sync()
    with served.path.open("r+b", buffering=0) as file:
        os.fsync(file.fileno())
    while not (count := served.export.stats()["flush"]["count"]):  # what was done is counted once it is answered
        threading.Event().wait(0.001)
    assert count == 1


# Devices that change


def test_what_is_asked_of_a_suspended_device_waits(served: FuseServed) -> None:
    with served.path.open("r+b", buffering=0) as file, ThreadPoolExecutor(2) as threads:
        with suspended(served):
            writing = threads.submit(os.pwrite, file.fileno(), b"x" * PAGE, 0)
            until_in_flight(served, 1)
            assert served.path.stat().st_size == SIZE
            assert not writing.done()
        assert writing.result(TIMEOUT) == PAGE
        assert os.pread(file.fileno(), 1, 0) == b"x"


def test_large_requests_beyond_the_buffers_wait_in_the_kernel(served: FuseServed) -> None:
    buffers, writes, size = 9, 32, 1 << 20
    with served.path.open("r+b", buffering=0) as file, ThreadPoolExecutor(writes) as threads:
        with suspended(served):
            waiting = [threads.submit(os.pwrite, file.fileno(), bytes([n]) * size, n * size) for n in range(writes)]
            until_in_flight(served, len(served.descriptors) * buffers)
            served.detach()
            served.serve(resend=True)
            until_in_flight(served, len(served.descriptors) * buffers)
        assert [write.result(TIMEOUT) for write in waiting] == [size] * writes
    assert served.path.read_bytes()[: writes * size] == b"".join(bytes([n]) * size for n in range(writes))


def test_who_waits_can_be_killed_and_the_others_go_on(served: FuseServed) -> None:
    with suspended(served):
        reader = subprocess.Popen(["cat", served.path], stdout=subprocess.DEVNULL)
        until_in_flight(served, 1)
        reader.send_signal(signal.SIGINT)
        reader.kill()
    assert reader.wait(TIMEOUT) in {-signal.SIGINT, -signal.SIGKILL}
    assert served.path.read_bytes() == bytes(SIZE)
    assert served.device.stats()["in_flight"] == 0


def test_a_larger_table_shows_once_the_kernel_is_told(tmp_path: Path) -> None:
    with FuseServed(tmp_path / "node", blkloom.open("0 8 zero")) as served, served.path.open("rb", buffering=0) as file:
        with mmap.mmap(file.fileno(), PAGE, prot=mmap.PROT_READ) as mapping:
            assert mapping[:4] == bytes(4)
            (tmp_path / "disk").write_bytes(b"disk" * 2048)
            served.device.load(parse_table(f"0 16 loop {tmp_path / 'disk'}", targets=builtin_targets()))
            served.device.resume()
            _engine.fuse_invalidate(served.descriptors[0])
            assert mapping[:4] == b"disk"
        assert os.fstat(file.fileno()).st_size == 8192
        assert os.pread(file.fileno(), PAGE, PAGE) == b"disk" * 1024


# Mounts


def test_a_file_that_is_open_is_unmounted_lazily_only(tmp_path: Path) -> None:
    with FuseServed(tmp_path / "node", blkloom.open("0 8 ram")) as served:
        with served.path.open("r+b", buffering=0) as file:
            with pytest.raises(OSError, match="busy") as caught:
                served.unmount()
            assert caught.value.errno == errno.EBUSY
            closing = threading.Timer(0, file.close)
            unmount(served._mount, lazy=True)
            assert not (tmp_path / "node").exists()
            file.write(b"x")
            closing.start()
        assert {reason for _, reason in served.ends()} == {"unmounted"}
        assert served.device.pread(1, 0) == b"x"
        served._is_mounted = False


def test_a_connection_that_sends_no_init_is_told_apart(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with pytest.raises(TimeoutError, match="INIT"):
        _engine.fuse_init(reading, timeout=0)
    os.write(writing, b"what is this?")
    with pytest.raises(OSError, match="header") as caught:
        _engine.fuse_init(reading)
    assert caught.value.errno == errno.EPROTO
    os.close(reading)
    os.close(writing)
    with blkloom.open("0 8 ram") as device, pytest.raises(ValueError, match="64 bytes"):
        _engine.FuseFile(_engine.Export(device), b"", (0, 0, 0o600))


# Servers that come and go


def test_what_waits_at_a_gate_is_asked_of_the_next_server(served: FuseServed) -> None:
    assert _engine.fuse_can_resend(served.negotiated)
    with served.path.open("r+b", buffering=0) as file, ThreadPoolExecutor(8) as threads:
        with suspended(served):
            waiting = [threads.submit(os.pwrite, file.fileno(), bytes([n]) * PAGE, n * PAGE) for n in range(8)]
            until_in_flight(served, 8)
            served.detach()
            assert served.unserved == [b"", b""]
            assert served.device.stats()["in_flight"] == 0
            served.serve(resend=True)
        assert [write.result(TIMEOUT) for write in waiting] == [PAGE] * 8
        assert os.pread(file.fileno(), 8 * PAGE, 0) == b"".join(bytes([n]) * PAGE for n in range(8))


def test_a_kernel_that_cannot_resend_has_it_handed_over(served: FuseServed) -> None:
    # Bit 39 of the capabilities, as if the kernel had not offered it.
    negotiated = bytearray(served.negotiated)
    negotiated[32] &= ~(1 << 7)
    served.negotiated = bytes(negotiated)
    assert not _engine.fuse_can_resend(served.negotiated)
    served.detach()
    served.serve()
    with served.path.open("r+b", buffering=0) as file, ThreadPoolExecutor(8) as threads:
        with suspended(served):
            waiting = [threads.submit(os.pwrite, file.fileno(), bytes([n]) * PAGE, n * PAGE) for n in range(8)]
            until_in_flight(served, 8)
            served.detach()
            assert sum(map(len, served.unserved)) == 8 * (80 + PAGE)
            served.serve()
        assert [write.result(TIMEOUT) for write in waiting] == [PAGE] * 8
        assert os.pread(file.fileno(), 8 * PAGE, 0) == b"".join(bytes([n]) * PAGE for n in range(8))


def test_owner_and_mode_stay_when_another_server_goes_on(served: FuseServed) -> None:
    served.path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(served.path, 1234, 5678)
    before = served.path.stat()
    served.detach()
    served.serve(resend=True)
    after = served.path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert served.file.owner == (before.st_uid, before.st_gid, 0o640)


def test_a_load_goes_on_while_servers_take_turns(served: FuseServed, program: Program) -> None:
    load = fio_verifies(program("fio", "fio"), served.path, "--loops=3")
    turns = 0
    while load.poll() is None:
        served.detach()
        served.serve(resend=True)
        turns += 1
    ended_well(load)
    assert turns > 1
    assert served.device.stats()["in_flight"] == 0


def test_a_load_goes_on_when_servers_are_killed(tmp_path: Path, program: Program) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SIZE))
    with FuseProcess(tmp_path / "node", f"0 {SECTORS} loop {disk}", clones=1) as served:
        load = fio_verifies(program("fio", "fio"), served.path, "--time_based", "--runtime=10")
        for _ in range(10):
            assert load.poll() is None, load.communicate()
            served.kill()
            served.start()
        ended_well(load)


def test_requests_to_a_killed_server_are_served_by_the_next(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"disk" * (SIZE // 4))
    with FuseProcess(tmp_path / "node", f"0 {SECTORS} loop {disk}") as served, ThreadPoolExecutor(1) as threads:
        served.kill()
        reading = threads.submit(served.path.read_bytes)
        served.start()
        assert reading.result(TIMEOUT) == disk.read_bytes()
