"""A full file system: some requests wait, some fail, others continue, and the image is consistent afterwards."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from blkloom import Device
from blkloom.device import mapper
from blkloom.table import parse_table
from blkloom.targets.registry import all_targets
from longer_times import in_time, with_longer_times

from . import qemu
from .attached import first_difference
from .full_disk import KIB, MIB, PATIENCE, SmallDisk, attached, image, small_disk

SIZE = 24 * MIB
PARK = "on_enospc=park"
Program = Callable[[str, str], str]


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, program: Program, tmp_path: Path) -> Iterator[SmallDisk]:
    for name in ("qemu-img", "qemu-io"):
        program(name, "qemu-utils")
    with small_disk(program, request.param, tmp_path) as disk:
        yield disk


def checked(path: Path, wanted: dict[int, bytes]) -> None:
    """It is whole, and holds these bytes at these offsets."""
    found = qemu.check(path)
    assert not found.corruptions, found.said
    assert not found.errors, found.said
    raw = path.parent.parent / "content"  # not on the small disk
    qemu.qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    content = raw.read_bytes()
    for offset, data in wanted.items():
        assert not first_difference(content[offset : offset + len(data)], data), f"at {offset:#x}"


@pytest.mark.parametrize("kind", ["in a window given ahead", "new cluster", "new table", "copy on write", "data file"])
def test_a_write_without_space_waits_and_all_else_goes_on(disk: SmallDisk, tmp_path: Path, kind: str) -> None:
    cluster, at, backing, more = 64 * KIB, 16 * MIB, None, ""
    if kind == "in a window given ahead":
        at = 2 * MIB
    elif kind == "new table":
        cluster = 4 * KIB
    elif kind == "copy on write":
        backing = tmp_path / "base.raw"
        backing.write_bytes(b"b" * SIZE)
    elif kind == "data file":
        more = f",data_file={disk.folder / 'data'}"
    path = image(disk.folder, SIZE, cluster=cluster, backing=backing, more=more)
    allowed = [f"allow_backing={tmp_path}"] if backing else []
    with attached(path, SIZE, PARK, *allowed) as it:
        it.device.pwrite(b"a" * MIB, 0)
        it.device.flush()
        disk.fill()
        late = it.begin(b"x" * 100_000, at)
        assert "no space; writes wait" in it.events.get(timeout=PATIENCE)
        second = it.begin(b"y" * 100_000, at + 3 * MIB)
        it.until_parked(2)
        assert not late.done()
        assert it.device.pread(MIB, 0) == b"a" * MIB
        it.device.pwrite(b"A" * (64 * KIB), 0)
        it.device.flush()
        qemu.qemu_img("check", "-U", path, accept=(0, 3))  # leaks may be there
        assert it.say("get_event") == "event_ENOSPC\n"
        assert it.say("get_event") == ""
        disk.free()
        it.say("retry")
        assert late.result(PATIENCE) == second.result(PATIENCE) == 100_000
        it.until_parked(0)
        assert it.events.empty(), "told once"
        assert it.device.pread(100_000, at) == b"x" * 100_000
    checked(path, {0: b"A" * (64 * KIB), at: b"x" * 100_000, at + 3 * MIB: b"y" * 100_000})


def waits(request: Future[int]) -> bool:
    """Whether it has not ended. Raises what it failed with."""
    return not request.done() or request.result() is None


@with_longer_times(0.2, 1, 5)
def test_what_waits_is_tried_again_every_few_seconds_and_does_not_time_out(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(mapper, "RETRY_SECONDS", seconds / 4)
    disk.free()  # of what a try with less time left
    path = image(disk.folder, SIZE)
    with attached(path, SIZE, PARK, fault_timeout=seconds) as it, in_time():
        disk.fill()
        late = it.begin(b"x" * 4096, 8 * MIB)
        while it.events.empty():
            assert waits(late)
        it.events.get()
        while "no_space=20 " not in (it.say("get_errors") or ""):
            assert waits(late)
        disk.free()
        assert late.result(PATIENCE) == 4096
        assert it.events.empty()
    checked(path, {8 * MIB: b"x" * 4096})


def test_a_discard_lets_go_on_what_waits(disk: SmallDisk) -> None:
    path = image(disk.folder, SIZE)
    with attached(path, SIZE, PARK, "preallocate=0") as it:
        it.device.pwrite(b"a" * MIB, 0)
        it.device.flush()
        disk.fill()
        late = it.begin(b"x" * 4096, 8 * MIB)
        it.events.get(timeout=PATIENCE)
        it.device.discard(0, MIB)
        assert late.result(PATIENCE) == 4096
    checked(path, {0: bytes(MIB), 8 * MIB: b"x" * 4096})


def test_a_suspended_device_keeps_what_waits_for_its_resume(disk: SmallDisk) -> None:
    path = image(disk.folder, SIZE)
    with attached(path, SIZE, PARK) as it:
        it.device.pwrite(b"a" * MIB, 0)
        disk.fill()
        late = [it.begin(b"x" * 4096, at * MIB) for at in (8, 12, 16)]
        it.events.get(timeout=PATIENCE)
        it.until_parked(3)
        it.device.suspend(timeout=PATIENCE)
        checked(path, {0: b"a" * MIB})
        assert not any(one.done() for one in late)
        it.device.resume()
        assert "no space; writes wait" in it.events.get(timeout=PATIENCE)
        it.until_parked(3)
        it.device.suspend(timeout=PATIENCE)
        disk.free()
        it.device.resume()
        assert [one.result(PATIENCE) for one in late] == [4096] * 3
    checked(path, {0: b"a" * MIB, **{at * MIB: b"x" * 4096 for at in (8, 12, 16)}})


def test_closing_the_device_fails_what_waits_for_want_of_space(disk: SmallDisk) -> None:
    path = image(disk.folder, SIZE)
    with attached(path, SIZE, PARK) as it:
        it.device.pwrite(b"a" * MIB, 0)
        disk.fill()
        late = [it.begin(b"x" * 4096, at * MIB) for at in (8, 12, 16)]
        it.until_parked(3)
        it.device.close()
        for one in late:
            failed = one.exception(PATIENCE)
            assert isinstance(failed, OSError)
            assert failed.errno == errno.ENOSPC
    checked(path, {0: b"a" * MIB, 8 * MIB: bytes(4096)})


def test_a_write_without_space_fails_unless_it_is_to_wait(disk: SmallDisk) -> None:
    path = image(disk.folder, SIZE)
    with attached(path, SIZE) as it:
        it.device.pwrite(b"a" * MIB, 0)
        it.device.flush()
        disk.fill()
        for at in (2, 16):
            with pytest.raises(OSError) as failed:  # noqa: PT011 - its number is what matters
                it.device.pwrite(b"x" * 4096, at * MIB)
            assert failed.value.errno == errno.ENOSPC
        assert "no_space=2 " in (it.say("get_errors") or "")
        it.device.pwrite(b"A" * 4096, 0)
        disk.free()
        it.device.pwrite(b"y" * 4096, 16 * MIB)
        assert it.events.empty()
    checked(path, {0: b"A" * 4096, 2 * MIB: bytes(4096), 16 * MIB: b"y" * 4096})


def test_with_direct_io_what_was_given_ahead_has_its_space(program: Program, tmp_path: Path) -> None:
    with small_disk(program, "ext4", tmp_path) as disk:
        path = image(disk.folder, SIZE)
        with attached(path, SIZE, PARK, "direct_io", "preallocate=1M") as it:
            it.device.pwrite(b"a" * 4096, 0)
            disk.fill()
            it.device.pwrite(b"b" * (4 * MIB - 4096), 4096)
            it.device.flush()
            late = it.begin(b"x" * (8 * MIB), 8 * MIB)
            assert "no space; writes wait" in it.events.get(timeout=PATIENCE)
            assert not late.done()
            disk.free()
            it.say("retry")
            assert late.result(PATIENCE) == 8 * MIB
        checked(path, {0: b"a" * 4096 + b"b" * (4 * MIB - 4096), 4 * MIB: bytes(4 * MIB), 8 * MIB: b"x" * (8 * MIB)})


def test_a_device_above_suspends_past_what_waits_below(disk: SmallDisk) -> None:

    path = image(disk.folder, SIZE)
    with attached(path, SIZE, PARK) as it:
        below = {"below": it.device}
        table = parse_table(f"0 {SIZE // 512} linear blkloom:below 0", targets=all_targets())
        with Device(table, devices=below) as above:
            disk.fill()
            late = it.pool.submit(above.pwrite, b"x" * 4096, 8 * MIB)
            it.events.get(timeout=PATIENCE)
            above.suspend(timeout=PATIENCE)
            it.until_parked(0)
            above.resume()
            it.until_parked(1)
            it.device.suspend(timeout=PATIENCE)
            disk.free()
            it.device.resume()
            assert late.result(PATIENCE) == 4096
    checked(path, {8 * MIB: b"x" * 4096})
