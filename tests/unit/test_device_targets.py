"""The built-in targets through a device: the location of their bytes, and refused arguments."""

import errno
import gc
import logging
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import blkloom
from blkloom._engine import Extent
from blkloom.errors import BackingError, BusyError, TableError
from blkloom.targets.holding import SharedFiles
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget, Mapped
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes
from left_behind import open_descriptors

SECTOR = 512


def file(path: Path, size: int = 8 * SECTOR, *, fill: bytes | None = None) -> Path:
    """A file in which every sector holds its own number."""
    numbered = b"".join(bytes([i % 256]) * SECTOR for i in range(size // SECTOR + 1))
    path.write_bytes((fill * size if fill else numbered)[:size])
    return path


def failing(number: int) -> AbstractContextManager[object]:
    """What is inside must raise OSError with this errno."""
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


def sectors(device: blkloom.Device) -> list[int]:
    """The first byte of every sector."""
    return list(device.pread(device.size, 0)[::SECTOR])


def test_linear_begins_at_a_sector_of_the_file(tmp_path: Path) -> None:
    path = file(tmp_path / "f")
    with blkloom.open(f"0 3 linear {path} 5") as device:
        assert sectors(device) == [5, 6, 7]
        device.pwrite(b"x" * SECTOR, SECTOR)
    assert path.read_bytes()[6 * SECTOR : 7 * SECTOR] == b"x" * SECTOR


def test_linear_stands_on_another_device(tmp_path: Path) -> None:
    path = file(tmp_path / "f")
    with (
        blkloom.open(f"0 4 loop {path} 1024", name="base") as base,
        blkloom.open("0 2 linear blkloom:base 1\n2 2 zero\n", devices={"base": base}) as device,
    ):
        assert sectors(device) == [3, 4, 0, 0]
        device.pwrite(b"y" * SECTOR, 0)
        assert base.pread(SECTOR, SECTOR) == b"y" * SECTOR


def test_an_unknown_device_below_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with (
        blkloom.open("0 8 ram") as ram,
        pytest.raises(TableError, match=r"Device lookup failed.*'dist'.*there are: disk"),
    ):
        blkloom.open("0 8 linear blkloom:dist 0", devices={"disk": ram})


def test_a_leg_past_the_end_of_what_is_below_is_refused_with_the_room_there_is(tmp_path: Path) -> None:
    path = file(tmp_path / "f")
    message = r"device too small for target: start=5, len=4, dev_size=8.*3 sectors are there from sector 5 on"
    with pytest.raises(TableError, match=message):
        blkloom.open(f"0 4 linear {path} 5")
    with blkloom.open("0 8 ram") as ram, pytest.raises(TableError, match=message):
        blkloom.open("0 4 linear blkloom:r 5", devices={"r": ram})


def test_striped_deals_chunks_of_any_size_out_in_turn(tmp_path: Path) -> None:
    legs = [file(tmp_path / name, 20 * SECTOR) for name in "abc"]
    with blkloom.open(f"0 18 striped 3 3 {legs[0]} 0 {legs[1]} 4 {legs[2]} 10") as device:
        assert sectors(device) == [0, 1, 2, 4, 5, 6, 10, 11, 12, 3, 4, 5, 7, 8, 9, 13, 14, 15]
        device.pwrite(b"z" * (4 * SECTOR), 2 * SECTOR)
        assert device.pread(4 * SECTOR, 2 * SECTOR) == b"z" * (4 * SECTOR)
    assert legs[1].read_bytes()[4 * SECTOR : 7 * SECTOR] == b"z" * (3 * SECTOR)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (17, "Target length not divisible by number of stripes.*make it 12 or 18 sectors"),
        (16, "Target length not divisible by chunk size.*make it 12 or 18 sectors"),
        (2, "Target length not divisible by chunk size.*make it 6 sectors"),
    ],
)
def test_striped_refuses_lengths_the_kernel_refuses(tmp_path: Path, length: int, message: str) -> None:
    path = file(tmp_path / "f", 64 * SECTOR)
    with pytest.raises(TableError, match=message):
        blkloom.open(f"0 {length} striped 2 3 {path} 0 {path} 32")


def test_zero_swallows_writes() -> None:
    with blkloom.open("0 8 zero") as device:
        device.pwrite(b"x" * 4096, 0)
        device.discard(0, 4096)
        device.write_zeroes(0, 4096, unmap=False)
        device.flush()
        assert device.pread(4096, 0) == bytes(4096)
        assert device.extents() == [(0, 4096, 3)]


def test_error_fails_everything_and_spares_its_neighbours(tmp_path: Path) -> None:
    with blkloom.open("0 1 zero\n1 1 error\n2 1 zero\n") as device:
        for offset in (0, 2 * SECTOR):
            device.pread(SECTOR, offset)
        with failing(errno.EIO):
            device.pread(2 * SECTOR, 0)
        with failing(errno.EIO):
            device.pwrite(bytes(SECTOR), SECTOR)


@pytest.mark.parametrize("options", ["", " 1 preallocate"])
def test_ram_keeps_what_is_written_and_gives_back_what_is_discarded(options: str) -> None:
    with blkloom.open(f"0 2048 ram{options}") as device:
        assert device.extents() == [(0, 1 << 20, 3)]
        device.pwrite(b"x" * 8192, 4096)
        assert device.pread(3 * 4096, 0) == bytes(4096) + b"x" * 8192
        device.discard(4096, 4096)
        assert device.extents() == [(0, 8192, 3), (8192, 4096, 0), (12288, (1 << 20) - 12288, 3)]


def test_ram_of_an_odd_size_has_exactly_that_size() -> None:
    with blkloom.open("0 3 ram") as device:
        assert device.size == 3 * SECTOR
        device.pwrite(b"e" * SECTOR, 2 * SECTOR)
        with failing(errno.ENOSPC):
            device.pwrite(b"e", 3 * SECTOR)


def test_ram_must_be_alone_in_its_table() -> None:
    with pytest.raises(TableError, match="ram must appear alone in table"):
        blkloom.open("0 8 ram\n8 8 zero\n")


def test_memory_that_cannot_be_had_is_an_error_that_says_what_to_do() -> None:
    free = sum(int(p.read_text()) for p in Path("/sys/kernel/mm/hugepages").glob("hugepages-2048kB/free_hugepages"))
    with pytest.raises(blkloom.ResourceError, match=rf"reserve {free + 1} huge pages"):
        blkloom.open(f"0 {(free + 1) * 4096} ram 1 huge_pages")


def test_loop_counts_its_offset_in_bytes_and_may_end_before_the_file(tmp_path: Path) -> None:
    with blkloom.open(f"0 3 loop {file(tmp_path / 'f')} 1024") as device:
        assert sectors(device) == [2, 3, 4]


def test_loop_serves_several_files_in_one_table(tmp_path: Path) -> None:
    a, b = file(tmp_path / "a"), file(tmp_path / "b")
    with blkloom.open(f"0 2 loop {a}\n2 3 loop {b} 2048\n5 1 loop {a} 3584\n") as device:
        assert sectors(device) == [0, 1, 4, 5, 6, 7]
        device.pwrite(b"s" * (2 * SECTOR), SECTOR)
    assert a.read_bytes()[SECTOR : 2 * SECTOR] == b.read_bytes()[2048 : 2048 + SECTOR] == b"s" * SECTOR


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Target maps area after file end: '{path}' .8 sectors are there from byte 0 on, not 9"),
        ("512", "Target maps area after file end: '{path}' .7 sectors are there from byte 512 on, not 9"),
        ("4096", "Offset is greater than file size: '4096' .{path} has 4096 bytes"),
        ("8192", "Offset is greater than file size"),
    ],
)
def test_loop_refuses_a_table_that_passes_the_file_s_end(tmp_path: Path, arguments: str, message: str) -> None:
    path = file(tmp_path / "f")
    with pytest.raises(TableError, match=message.format(path=re.escape(str(path)))) as caught:
        blkloom.open(f"0 9 loop {path} {arguments}")
    assert caught.value.place.line == 1


@pytest.mark.parametrize(("size", "message"), [(0, "backing file is empty"), (511, "cannot be less than one block")])
def test_a_file_without_a_whole_sector_is_refused(tmp_path: Path, size: int, message: str) -> None:
    path = file(tmp_path / "f", size)
    with pytest.raises(TableError, match=message):
        blkloom.open(f"0 1 loop {path}")


def test_the_end_of_a_file_that_makes_no_sector_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with blkloom.open(f"0 2 loop {file(tmp_path / 'f', 1100)}") as device:
        assert device.size == 1024
    assert "not using 76 bytes in incomplete block at EOF" in caplog.text


def test_holes_of_a_read_only_file_read_as_zeros(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 20)
    with blkloom.open(path, read_only=True) as device:
        assert device.pread(1 << 20, 0) == bytes(1 << 20)
        assert device.extents() == [(0, 1 << 20, 3)]


@pytest.mark.parametrize("whole", [True, False])
def test_read_only_refuses_every_kind_of_write_with_erofs(tmp_path: Path, whole: bool) -> None:
    path = file(tmp_path / "f")
    path.chmod(0o444)
    content = path.read_bytes()
    device = blkloom.open(path, read_only=True) if whole else blkloom.open(f"0 8 loop {path} 0 1 read_only")
    with device:
        for write in (
            lambda: device.pwrite(b"x" * 512, 0),
            lambda: device.pwrite(b"x", 0, fua=True),
            lambda: device.discard(0, 4096),
            lambda: device.write_zeroes(0, 4096),
            lambda: device.write_zeroes(0, 4096, unmap=False, fast=True),
        ):
            with failing(errno.EROFS):
                write()
        device.flush()
        assert device.pread(4096, 0) == content


@pytest.mark.parametrize("table", ["0 8 zero", "0 8 ram"])
def test_a_read_only_device_of_zeros_refuses_writes(table: str) -> None:
    with blkloom.open(table, read_only=True) as device:
        assert device.pread(4096, 0) == bytes(4096)
        with failing(errno.EROFS):
            device.pwrite(b"x", 0)


def test_a_read_only_device_never_writes_to_the_one_below(tmp_path: Path) -> None:
    for below in (blkloom.open("0 8 ram"), blkloom.open(file(tmp_path / "f"), read_only=True)):
        with below, blkloom.open("0 8 linear blkloom:b 0", devices={"b": below}, read_only=True) as device:
            before = below.pread(4096, 0)
            for write in (
                lambda: device.pwrite(b"x", 0),
                lambda: device.discard(0, 4096),
                lambda: device.write_zeroes(0, 4096),
            ):
                with failing(errno.EROFS):
                    write()
            assert device.pread(4096, 0) == below.pread(4096, 0) == before


def test_discard_punches_a_hole_and_write_zeroes_without_unmap_does_not(tmp_path: Path) -> None:
    path = file(tmp_path / "f", 1 << 20, fill=b"x")
    with blkloom.open(path) as device:
        device.flush()
        before = path.stat().st_blocks
        device.write_zeroes(0, 1 << 19, unmap=False)
        assert path.stat().st_blocks >= before
        device.discard(0, 1 << 18)
        assert path.stat().st_blocks <= before - (1 << 18) // 512
        device.write_zeroes(1 << 18, 1 << 18)
        assert path.stat().st_blocks <= before - (1 << 19) // 512
        assert device.pread(1 << 20, 0) == bytes(1 << 19) + b"x" * (1 << 19)


def test_a_file_truncated_underneath_gives_eio_and_no_crash(tmp_path: Path) -> None:
    path = file(tmp_path / "f", 1 << 16)
    with blkloom.open(path) as device:
        os.truncate(path, 4096)
        assert len(device.pread(4096, 0)) == 4096
        with failing(errno.EIO):
            device.pread(8192, 0)


def test_direct_io_reads_and_writes_what_buffered_io_does(tmp_path: Path) -> None:
    path = file(tmp_path / "f", 1 << 16)
    for table in (f"0 128 loop {path} 0 1 direct_io", f"0 128 linear {path} 0"):
        with blkloom.open(table, direct_io=True) as device:
            assert device.pread(1000, 777) == path.read_bytes()[777:1777]
            device.pwrite(b"d" * 700, 333)
        assert path.read_bytes()[333:1033] == b"d" * 700


def test_direct_io_that_the_offset_does_not_allow_is_buffered_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = file(tmp_path / "f", 1 << 16)
    with blkloom.open(f"0 8 loop {path} 0 1 direct_io") as device:
        assert sectors(device) == list(range(8))
    quiet = caplog.text
    # No storage transfers less than a sector; 512 fits only where sectors have 512 bytes.
    with blkloom.open(f"0 8 loop {path} 512 1 direct_io") as device:
        assert sectors(device) == list(range(1, 9))
    said = caplog.text.removeprefix(quiet)
    assert said == "" or re.search(r"offset 512 is not a multiple of the \d+ bytes.*using buffered I/O", said)


def test_direct_io_that_the_file_system_refuses_is_buffered_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = "/proc/version"  # a regular file of a file system without O_DIRECT
    with caplog.at_level(logging.WARNING):
        context = LoadContext(SharedFiles(), read_only=True, direct_io=True, shared=True)
        assert not context.file(path).direct
        context.close()
    assert "does not do direct I/O (O_DIRECT: EINVAL); using buffered I/O" in caplog.text


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "character device", "null byte", "dangling"])
def test_what_is_no_file_is_refused_with_its_name(tmp_path: Path, kind: str) -> None:
    path, number, message = {
        "missing": (str(tmp_path / "no"), errno.ENOENT, "could not be opened: No such file"),
        "directory": (str(tmp_path), errno.EISDIR, "must be a regular file or a block device"),
        "fifo": (str(tmp_path / "fifo"), errno.EINVAL, "must be a regular file or a block device"),
        "character device": ("/dev/null", errno.EINVAL, "must be a regular file or a block device"),
        "null byte": ("a\0b", errno.EINVAL, "not a path"),
        "dangling": (str(tmp_path / "link"), errno.ENOENT, "could not be opened"),
    }[kind]
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(BackingError, match=message) as caught:
        blkloom.open(path)
    assert caught.value.errno == number
    assert caught.value.cure or kind == "null byte"


def test_a_file_in_use_is_refused_to_a_second_device_and_free_after_close(tmp_path: Path) -> None:
    path = file(tmp_path / "f")
    with blkloom.open(path):
        with pytest.raises(BusyError, match=f"already in use by process {os.getpid()}"):
            blkloom.open(path)
        with pytest.raises(BusyError):
            blkloom.open(path, read_only=True)
        blkloom.open(path, shared=True).close()
    with blkloom.open(path, read_only=True), blkloom.open(path, read_only=True):
        pass
    blkloom.open(path).close()


def test_ten_thousand_segments_share_one_open_file(tmp_path: Path) -> None:
    path = file(tmp_path / "f", 10_000 * SECTOR)
    before = open_descriptors()
    table = "".join(f"{i} 1 linear {path} {9_999 - i}\n" for i in range(10_000))
    with blkloom.open(table) as device:
        assert device.size == 10_000 * SECTOR
        assert sectors(device) == [i % 256 for i in reversed(range(10_000))]
        assert len(open_descriptors() - before) < 20


def test_what_is_asked_for_anew_is_what_the_path_leads_to_and_the_rest_is_given_up(tmp_path: Path) -> None:
    stays, goes, leaves = (file(tmp_path / name) for name in ("stays", "goes", "leaves"))
    held = SharedFiles()
    context = LoadContext(held)
    before = [context.file(str(path)) for path in (stays, goes, leaves)]
    context.files.lend(context.owner)
    file(tmp_path / "new").rename(goes)
    with blkloom.open(str(stays)), pytest.raises(BusyError), context.reacquired(context.owner):
        context.file(str(stays))
    with context.reacquired(context.owner):
        assert context.file(str(stays)) is before[0]
        after = context.file(str(goes))
    assert os.fstat(after.fileno()).st_ino == goes.stat().st_ino
    assert context.deps == [str(stays), str(goes)]
    with blkloom.open(str(leaves)):
        pass
    for path in (stays, goes):
        with pytest.raises(BusyError):
            blkloom.open(str(path))
    context.close()
    assert len(held) == 0


def test_files_lent_while_suspended_can_be_had_by_others_and_are_claimed_again(tmp_path: Path) -> None:
    path = str(file(tmp_path / "f"))
    held = SharedFiles()
    context = LoadContext(held)
    context.file(path)
    context.file(path, direct_io=True)
    with pytest.raises(BusyError):
        blkloom.open(path)
    context.files.lend(context.owner)
    with blkloom.open(path), pytest.raises(BusyError), context.reacquired(context.owner):
        context.file(path)
    with blkloom.open(path):
        pass  # a refused claim leaves nothing behind
    for _ in range(2):
        with context.reacquired(context.owner):
            context.file(path)
            context.file(path, direct_io=True)
    with pytest.raises(BusyError):
        blkloom.open(path)
    context.close()
    with blkloom.open(path):
        pass


@contextmanager
def uncollected() -> Iterator[None]:
    """Objects that refer to themselves stay, with the descriptors that they have."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@pytest.mark.parametrize(
    "line", ["zero", "ram", "linear {} 0", "loop {}", "loop {} 0 1 round_up", "striped 2 4 {0} 0 {0} 8"]
)
def test_a_closed_device_is_freed_at_once(tmp_path: Path, line: str) -> None:
    path = file(tmp_path / "a.img", 64 * SECTOR)
    with uncollected():
        device = blkloom.open(f"0 16 {line.format(path)}")
        device.pread(512, 0)
        device.close()
        freed = weakref.ref(device)
        del device
        assert freed() is None


def test_the_files_of_a_target_that_refers_to_itself_are_closed_with_its_device(tmp_path: Path) -> None:
    path = file(tmp_path / "a.img", 8 * SECTOR)

    class LoadedLooped(LoadedTarget):
        def __init__(self, spec: TargetSpec, map: Mapped) -> None:
            super().__init__(spec, map)
            self.itself = self

    class Looped(TargetSpec):
        name = "looped"

        def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
            return LoadedLooped(self, [(Bytes(0), length, Extent.data(context.file(str(path)), 0))])

    def is_open() -> bool:
        return str(path) in map(os.path.realpath, Path("/proc/self/fd").iterdir())

    with uncollected():
        with blkloom.open("0 8 looped", targets=[Looped]):
            assert is_open()
        assert not is_open()
