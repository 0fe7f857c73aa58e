"""A FUSE file used by common programs: cp, dd, fio, fallocate, mkfs, the kernel's loop device.

The file is served by the example server of `engine/fuse-wire`; by the engine on memory, on a file, on a file with
direct I/O and on a QCOW2 image; and by the engine over io_uring.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fuse_memory import fuse_memory, fuse_null
from fuse_served import FuseProcess

SIZE = 64 << 20
PAGE = 4096
Program = Callable[[str, str], str]


@pytest.fixture
def memory_node(tmp_path: Path) -> Iterator[Path]:
    """Of the example server, which knows how many bytes it has stored."""
    with fuse_memory(tmp_path / "node", SIZE) as path:
        yield path


@pytest.fixture(params=["example", "ram", "clones", "file", "direct", "qcow2", "uring", "uring-direct", "uring-qcow2"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Of a server and what it serves: an empty disk. clones: of memory, by two descriptors. uring: over io_uring."""
    disk, sectors, uring = tmp_path / "disk", SIZE // 512, request.param.startswith("uring")
    kind = request.param.removeprefix("uring").removeprefix("-")
    if kind == "example":
        yield request.getfixturevalue("memory_node")
        return
    if kind == "qcow2":
        qemu_img = request.getfixturevalue("qemu_img")
        run(qemu_img, "create", "-q", "-f", "qcow2", "-o", f"cluster_size={PAGE}", disk, str(SIZE))
    elif kind in {"file", "direct"}:
        disk.touch()
        os.truncate(disk, SIZE)
    tables = {
        "file": f"0 {sectors} loop {disk}",
        "direct": f"0 {sectors} loop {disk} 0 1 direct_io=require",
        "qcow2": f"0 {sectors} qcow2 {disk}",
    }
    with FuseProcess(
        tmp_path / "node", tables.get(kind, f"0 {sectors} ram"), clones=int(kind == "clones"), uring=uring
    ) as served:
        yield served.path
    if kind == "qcow2":
        run(qemu_img, "check", "-q", disk)


@pytest.fixture
def qemu_img(program: Program) -> str:
    """QEMU's program for images."""
    return program("qemu-img", "qemu-utils")


def run(*words: str | Path) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def extents(fd: int) -> list[tuple[int, int]]:
    """Where there is data, by SEEK_DATA and SEEK_HOLE."""
    found, at = [], 0
    while True:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return found
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        found.append((begin, at))


def stored(path: Path) -> int:
    """Bytes that are no holes."""
    with path.open("rb", buffering=0) as file:
        return sum(end - begin for begin, end in extents(file.fileno()))


def test_it_is_a_regular_file_of_its_owner(node: Path) -> None:
    status = node.stat()
    assert (status.st_size, stat.S_ISREG(status.st_mode), status.st_uid) == (SIZE, True, os.getuid())
    assert stat.S_IMODE(status.st_mode) == 0o600
    node.chmod(0o640)
    os.utime(node, ns=(1_000_000_001, 2_000_000_002))
    status = node.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_atime_ns, status.st_mtime_ns) == (
        0o640,
        1_000_000_001,
        2_000_000_002,
    )


def test_its_size_stays_what_it_is(node: Path) -> None:
    for size in (0, 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.truncate(node, size)
    with pytest.raises(PermissionError):
        node.open("wb")  # a program that truncates takes what is there for zeros
    os.truncate(node, SIZE)
    assert node.stat().st_size == SIZE


def test_writes_end_at_its_end(node: Path) -> None:
    with node.open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), b"x" * 100, SIZE - 10) == 10
        with pytest.raises(OSError, match="No space left") as caught:
            os.pwrite(file.fileno(), b"x", SIZE)
        assert caught.value.errno == errno.ENOSPC
        assert os.pread(file.fileno(), 100, SIZE - 10) == b"x" * 10
        assert os.pread(file.fileno(), 100, SIZE) == b""


def test_what_is_stored_is_counted(memory_node: Path) -> None:
    with memory_node.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"x" * 3 * PAGE, 5 * PAGE)
    assert memory_node.stat().st_blocks * 512 == 3 * PAGE


def test_holes_and_data_are_told_apart(node: Path, program: Program) -> None:
    with node.open("r+b", buffering=0) as file:
        fd = file.fileno()
        assert extents(fd) == []
        os.pwrite(fd, b"x" * 3 * PAGE, 5 * PAGE)
        os.pwrite(fd, b"x", SIZE - 1)
        assert extents(fd) == [(5 * PAGE, 8 * PAGE), (SIZE - PAGE, SIZE)]
        run(program("fallocate", "util-linux"), "--punch-hole", "-o", str(6 * PAGE), "-l", str(PAGE), node)
        assert extents(fd) == [(5 * PAGE, 6 * PAGE), (7 * PAGE, 8 * PAGE), (SIZE - PAGE, SIZE)]
        assert os.pread(fd, 3 * PAGE, 5 * PAGE) == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE
        run("fallocate", "--zero-range", "--keep-size", "-o", str(7 * PAGE), "-l", str(PAGE), node)
        assert os.pread(fd, PAGE, 7 * PAGE) == bytes(PAGE)
        collapse = ["fallocate", "--collapse-range", "-o", "0", "-l", str(PAGE), node]
        refused = subprocess.run(collapse, check=False, capture_output=True, text=True)
        assert (refused.returncode, "not supported" in refused.stderr) == (1, True)


def test_cp_and_dd_copy_into_it_and_out_of_it(node: Path, tmp_path: Path) -> None:
    data = os.urandom(5 << 20)
    (tmp_path / "data").write_bytes(data)
    run("dd", f"if={tmp_path / 'data'}", f"of={node}", "bs=1M", "seek=3", "conv=notrunc,fsync")
    run("cp", "--sparse=always", node, tmp_path / "copy")
    copied = (tmp_path / "copy").read_bytes()
    assert copied[3 << 20 : 8 << 20] == data
    assert not any(copied[: 3 << 20])
    assert len(copied) == SIZE
    assert (tmp_path / "copy").stat().st_blocks * 512 < 2 * len(data)
    run("dd", f"if={node}", f"of={tmp_path / 'direct'}", "bs=1M", "iflag=direct")
    assert (tmp_path / "direct").read_bytes() == copied


def test_a_shared_mapping_reads_and_writes_it(node: Path) -> None:
    with node.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"before", PAGE)
        with mmap.mmap(file.fileno(), 1 << 20) as mapping:
            assert mapping[PAGE : PAGE + 6] == b"before"
            mapping[PAGE : PAGE + 6] = b"mapped"
            mapping.flush()
            assert os.pread(file.fileno(), 6, PAGE) == b"mapped"
            os.pwrite(file.fileno(), b"direct", PAGE)
            assert mapping[PAGE : PAGE + 6] == b"direct"


@pytest.mark.parametrize("direct", [False, True])
def test_fio_verifies_a_load(node: Path, program: Program, direct: bool) -> None:
    fio = program("fio", "fio")
    options = ["--ioengine=io_uring", "--rw=randrw", "--bsrange=512-256k", "--iodepth=32", f"--direct={int(direct)}"]
    options += ["--verify=crc32c", "--verify_fatal=1", "--size=32M", "--loops=2"]
    run(fio, "--name=verify", f"--filename={node}", *options)


def test_fio_writes_from_two_processes(node: Path, program: Program) -> None:
    fio = program("fio", "fio")
    options = ["--ioengine=libaio", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--direct=1", "--size=16M"]
    options += ["--numjobs=2", "--offset_increment=32M", "--verify=crc32c", "--verify_fatal=1"]
    run(fio, "--name=verify", f"--filename={node}", *options)


def test_a_file_system_lives_in_it_through_the_loop_device(node: Path, program: Program, tmp_path: Path) -> None:
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("a loop device is made by root, with the kernel's module loop")
    losetup = program("losetup", "mount")
    run(program("mkfs.ext4", "e2fsprogs"), "-q", "-F", node)
    device = run(losetup, "--find", "--show", "--direct-io=on", node).strip()
    mounted = tmp_path / "ext4"
    mounted.mkdir()
    try:
        run(program("mount", "mount"), device, mounted)
        try:
            (mounted / "file").write_bytes(b"hello" * 100_000)
            (mounted / "gone").write_bytes(os.urandom(8 << 20))
            run("sync", "-f", mounted / "file")
            before = stored(node)
            (mounted / "gone").unlink()
            run("sync", "-f", mounted / "file")  # what is freed is trimmed once that is committed
            run(program("fstrim", "util-linux"), mounted)
            assert stored(node) < before - (7 << 20)
        finally:
            run("umount", mounted)
    finally:
        run(losetup, "--detach", device)
    run(program("e2fsck", "e2fsprogs"), "-f", "-n", node)


def test_the_null_server_reads_zeros_and_forgets_writes(tmp_path: Path, program: Program) -> None:
    fio = program("fio", "fio")
    with fuse_null(tmp_path / "node", SIZE, clones=1) as node:
        with node.open("r+b", buffering=0) as file:
            assert os.pwrite(file.fileno(), b"x" * PAGE, SIZE - PAGE) == PAGE
            assert os.pread(file.fileno(), 2 * PAGE, SIZE - PAGE) == bytes(PAGE)
        options = ["--ioengine=io_uring", "--rw=randrw", "--bs=4k", "--iodepth=16", "--direct=1", "--io_size=16M"]
        run(fio, "--name=null", f"--filename={node}", "--numjobs=2", f"--size={SIZE}", *options)
