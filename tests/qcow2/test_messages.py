"""Messages to an image and their answers after errors, which fault injection causes where necessary."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from blkloom.errors import LostData, UsageError

from . import qemu
from .full_disk import KIB, MIB, Attached, attached, image

pytestmark = pytest.mark.usefixtures("qemu_tools")
SIZE = 8 * MIB
CLEAN = """wants_check=0
md_writeback_error=0
truncate_error=0
metadata_read=0
metadata_write=0
sync=0
allocation=0
data_read=0
data_write=0
no_space=0
corrupt=0
"""


def errors(it: Attached) -> dict[str, str]:
    """By kind, what is not 0."""
    lines = (it.say("get_errors") or "").splitlines()
    return {kind: value for kind, _, value in (line.partition("=") for line in lines) if value != "0"}


def number_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as failed:  # noqa: PT011 - its number is what matters
        call()
    return failed.value.errno


def test_a_healthy_image_has_nothing_to_tell(tmp_path: Path) -> None:
    path = image(tmp_path, SIZE)
    with attached(path, SIZE) as it:
        it.device.pwrite(b"a" * MIB, 0)
        it.device.flush()
        assert it.say("get_errors") == CLEAN
        assert it.say("get_event") == ""
        assert it.say("retry") is None
        it.device.suspend()
        assert it.say("get_errors") == CLEAN
        it.device.resume()
        assert it.say("get_errors") == CLEAN


def test_the_images_of_a_chain_have_numbers_from_the_bottom_up(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(SIZE))
    path = image(tmp_path, SIZE, backing=base)
    with attached(path, SIZE) as it:
        assert [it.say("get_img_name", str(number)) for number in range(3)] == [f"{base}\n", f"{path}\n", ""]


@pytest.mark.parametrize(
    "words",
    [
        ["shrink"],
        ["get_errors", "all"],
        ["get_img_name", "-1"],
        ["get_img_name", "x"],
        ["set_fault_injection"],
        ["set_fault_injection", "metadata_reads", "EIO"],
        ["set_fault_injection", "everything", "EIO", "1"],
        ["set_fault_injection", "syncs", "EWHAT", "1"],
        ["set_fault_injection", "syncs", "EIO", "-1"],
        ["set_fault_injection", "syncs", "EIO", "99999999999"],
    ],
)
def test_what_is_not_understood_is_refused_with_what_would_be(tmp_path: Path, words: list[str]) -> None:
    with attached(image(tmp_path, SIZE), SIZE, "fault_injection") as it:
        with pytest.raises(UsageError, match="Invalid argument") as refused:
            it.say(*words)
        assert "set_fault_injection <what> <errno> <count>" in refused.value.cure
        it.device.pwrite(b"a" * 512, 0)
        it.device.flush()


def test_no_message_makes_a_device_fail_that_was_not_made_for_it(tmp_path: Path) -> None:
    with attached(image(tmp_path, SIZE), SIZE) as it:
        with pytest.raises(UsageError, match="not made for it") as refused:
            it.say("set_fault_injection", "metadata_writes", "EIO", "1")
        assert "fault_injection" in refused.value.cure
        it.device.pwrite(b"a" * 512, 0)
        it.device.flush()


def test_a_failed_write_of_metadata_fails_the_flush_and_the_next_one_does_its_work(tmp_path: Path) -> None:
    path = image(tmp_path, SIZE)
    with attached(path, SIZE, "fault_injection") as it:
        it.device.pwrite(b"a" * MIB, 0)
        it.say("set_fault_injection", "metadata_writes", "EIO", "2")
        assert number_of(it.device.flush) == errno.EIO
        assert errors(it)["md_writeback_error"] == "1"
        assert number_of(it.device.flush) == errno.EIO
        found = errors(it)
        assert found["metadata_write"].startswith("2 EIO: ")
        assert str(path) in found["metadata_write"]
        it.device.flush()
        assert "md_writeback_error" not in errors(it)
    assert qemu.check(path).whole


@pytest.mark.parametrize("flush", [True, False], ids=["flushed", "written back by the target alone"])
def test_a_failed_sync_of_metadata_refuses_the_suspend_and_fails_the_image(tmp_path: Path, flush: bool) -> None:
    path = image(tmp_path, SIZE)
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(LostData, match=f"a sync of {path} had failed"))
        it = stack.enter_context(attached(path, SIZE, "fault_injection"))
        it.device.pwrite(b"a" * MIB, 0)
        it.device.flush()
        it.device.pwrite(b"b" * MIB, 4 * MIB)
        it.say("set_fault_injection", "syncs", "5", "1")
        with pytest.raises(OSError, match="Input/output error"):
            it.device.suspend(flush=flush)
        assert not it.device.suspended
        assert errors(it)["sync"].startswith("1 EIO")
        assert it.device.pread(512, 4 * MIB) == b"b" * 512
        assert number_of(it.device.flush) == errno.EIO
        assert number_of(partial(it.device.pwrite, b"c" * 512, 0)) == errno.EIO
        it.device.suspend()
        it.device.resume()
        assert number_of(it.device.flush) == errno.EIO
        assert it.device.pread(512, 0) == b"a" * 512
    assert qemu.content(path)[:MIB] == b"a" * MIB


def test_failed_reads_fail_their_requests_and_no_others(tmp_path: Path) -> None:
    path = image(tmp_path, SIZE)
    qemu.qemu_io(path, "write -P 1 0 1M", "write -c -P 2 1M 64k")
    with attached(path, SIZE, "fault_injection") as it:
        it.say("set_fault_injection", "metadata_reads", "EIO", "1")
        assert number_of(lambda: it.device.pread(512, 0)) == errno.EIO
        assert it.device.pread(512, 0) == b"\1" * 512
        it.say("set_fault_injection", "data_reads", "EIO", "1")
        assert number_of(lambda: it.device.pread(512, MIB)) == errno.EIO
        assert it.device.pread(512, MIB) == b"\2" * 512
        assert {"metadata_read", "data_read"} == set(errors(it))


def faults(it: Attached) -> int:
    """How many requests the engine has asked for."""
    return int(it.status().split("faults=")[1].split()[0])


PLACES = {"data": 0, "compressed": MIB, "zeros": 2 * MIB, "nothing": 4 * MIB, "backing": 6 * MIB}


def of_all_kinds(folder: Path) -> Path:
    """What lies at `PLACES`: 7 MiB are its own or its backing file's."""
    base = folder / "base.raw"
    base.write_bytes(bytes(6 * MIB) + b"\5" * (2 * MIB))
    path = image(folder, SIZE, backing=base)
    qemu.qemu_io(path, "write -P 1 0 1M", "write -c -P 2 1M 64k", "write -z 2M 64k")
    return path


@pytest.mark.parametrize("place", PLACES)
def test_reads_of_clients_fail_as_often_as_was_said_and_then_are_the_engines_again(tmp_path: Path, place: str) -> None:
    path, at = of_all_kinds(tmp_path), PLACES[place]
    whole = qemu.content(path)
    with attached(path, SIZE, "fault_injection") as it:
        assert it.device.pread(SIZE, 0) == whole
        it.say("set_fault_injection", "data_reads", "ENODATA", "3")
        for count in (1, 2, 3):
            assert number_of(lambda: it.device.pread(512, at)) == errno.ENODATA
            assert errors(it)["data_read"].startswith(f"{count} ENODATA: 512 bytes at {at} of the disk in {path}")
        assert it.device.pread(SIZE, 0) == whole
        asked = faults(it)
        for _ in range(8):
            assert it.device.pread(SIZE, 0) == whole
        assert faults(it) == asked, "nothing is asked any more"
        it.say("set_fault_injection", "data_reads", "EIO", "1000")
        assert number_of(lambda: it.device.pread(512, at)) == errno.EIO
        it.device.suspend()
        it.device.resume()
        assert number_of(lambda: it.device.pread(512, at)) == errno.EIO
        it.say("set_fault_injection", "off")
        assert it.device.pread(SIZE, 0) == whole


def test_writes_of_clients_fail_as_often_as_was_said_and_reads_do_not(tmp_path: Path) -> None:
    path = of_all_kinds(tmp_path)
    with attached(path, SIZE, "fault_injection") as it:
        for place, at in PLACES.items():
            it.device.pwrite(b"a" * 4096, at)
            it.device.pwrite(b"b" * 4096, at)  # where the engine has its place by now
            it.say("set_fault_injection", "data_writes", "EIO", "2")
            for _ in range(2):
                assert it.device.pread(4096, at) == b"b" * 4096
                assert number_of(lambda at=at: it.device.pwrite(b"c" * 4096, at)) == errno.EIO, place
            asked = faults(it)
            it.device.pwrite(b"d" * 4096, at)
            assert faults(it) > asked
            asked = faults(it)
            for fill in range(8):
                it.device.pwrite(bytes([fill]) * 4096, at)
            assert faults(it) == asked, "nothing is asked any more"
            assert it.device.pread(4096, at) == b"\7" * 4096
        assert errors(it)["data_write"].startswith(f"{2 * len(PLACES)} EIO: ")
        it.device.flush()
    assert qemu.check(path).whole
    content = qemu.content(path)
    assert all(content[at : at + 4096] == b"\7" * 4096 for at in PLACES.values())


@pytest.mark.parametrize("more", ["", ",extended_l2=on"])
def test_what_is_written_while_reads_fail_is_there_afterwards(tmp_path: Path, more: str) -> None:
    path = image(tmp_path, SIZE, more=more)
    qemu.qemu_io(path, f"write -P 1 0 {SIZE // 2}")
    with attached(path, SIZE, "fault_injection") as it:
        wanted = bytearray(it.device.pread(SIZE, 0))
        it.say("set_fault_injection", "data_reads", "EIO", "1000")
        dice = random.Random(1)
        for _ in range(40):
            length = dice.randrange(1, 200_000)
            at = dice.randrange(SIZE - length)
            data = dice.randbytes(length)
            if it.device.pwrite(data, at) == length:
                wanted[at : at + length] = data
            assert number_of(lambda at=at: it.device.pread(512, at)) == errno.EIO
        it.device.flush()
        it.say("set_fault_injection", "off")
        assert it.device.pread(SIZE, 0) == wanted
    assert qemu.check(path).whole
    assert qemu.content(path) == wanted


def test_an_injected_want_of_space_at_a_write_parks_it(tmp_path: Path) -> None:
    path = image(tmp_path, SIZE)
    qemu.qemu_io(path, "write 0 1M")
    with attached(path, SIZE, "fault_injection", "on_enospc=park") as it:
        it.device.pwrite(b"a" * 512, 0)
        it.say("set_fault_injection", "data_writes", "ENOSPC", "1")
        late = it.begin(b"b" * 512, 0)
        assert "no space" in it.events.get(timeout=60)
        it.say("retry")
        assert late.result(60) == 512
        assert it.device.pread(512, 0) == b"b" * 512


def test_an_allocation_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = image(tmp_path, SIZE)
    with attached(path, SIZE, "fault_injection") as it:
        it.say("set_fault_injection", "allocations", "ENOSPC", "1000")
        assert number_of(lambda: it.device.pwrite(b"a" * 512, 0)) == errno.ENOSPC
        assert {"allocation", "no_space"} == set(errors(it))
        it.say("set_fault_injection", "off")
        it.device.pwrite(b"a" * 512, 0)
    assert qemu.check(path).whole


def test_an_injected_want_of_space_parks_and_retry_ends_it(tmp_path: Path) -> None:
    path = image(tmp_path, SIZE)
    with attached(path, SIZE, "fault_injection", "on_enospc=park") as it:
        for turn in range(1, 4):
            it.say("set_fault_injection", "allocations", "EDQUOT", "1000")
            late = it.begin(b"a" * 512, turn * 64 * KIB)
            it.events.get(timeout=60)
            it.say("set_fault_injection", "off")
            it.say("retry")
            assert late.result(60) == 512
            assert it.say("get_event") == "event_ENOSPC\n"
            it.until_parked(0)
            assert it.events.empty()
            it.device.suspend()
            it.device.resume()
    assert qemu.check(path).whole


def test_corrupt_metadata_is_counted_and_told_of(tmp_path: Path) -> None:
    path = image(tmp_path, SIZE)
    qemu.qemu_io(path, "write -P 1 0 64k")
    with path.open("r+b") as file:  # the L1 entry leads past the end of the file
        file.seek(40)
        l1 = int.from_bytes(file.read(8), "big")
        file.seek(l1)
        file.write((1 << 63 | 1 << 40).to_bytes(8, "big"))
    for options, event in (("read_only",), ""), ((), "event_CORRUPT\n"):
        with attached(path, SIZE, *options) as it:
            for met in (1, 2):
                assert number_of(lambda: it.device.pread(512, 0)) == errno.EIO
                assert errors(it)["corrupt"].startswith(f"{met} {path}: ")
            assert "L2 table 0" in errors(it)["corrupt"]
            assert errors(it)["wants_check"] == "1"
            assert it.say("get_event") == event, "it is marked where it is written to, and only there"


def test_an_image_that_is_marked_corrupt_is_an_event(tmp_path: Path) -> None:
    path = image(tmp_path, SIZE)
    with path.open("r+b") as file:  # the L1 table's cluster counts as free
        header = file.read(104)
        l1, counts = (int.from_bytes(header[at : at + 8], "big") for at in (40, 48))
        file.seek(counts)
        file.seek(int.from_bytes(file.read(8), "big") + (l1 >> 16) * 2)
        file.write(bytes(2))
    with attached(path, SIZE) as it:
        it.device.pwrite(b"a" * 512, 0)  # past the end of the file
        assert "corrupt" in it.events.get(timeout=60)
        assert f"{l1:#x} is in use, and free by its refcount" in errors(it)["corrupt"]
        assert it.say("get_event") == "event_CORRUPT\n"
        assert number_of(lambda: it.device.pwrite(b"a" * 512, 0)) == errno.EIO
