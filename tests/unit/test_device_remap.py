"""A loaded target changes its mapping: by `remap`, and between suspend and resume."""

from __future__ import annotations

import errno
import threading
from contextlib import AbstractContextManager
from typing import ClassVar

import pytest

import blkloom
from blkloom import Device
from blkloom._engine import Extent
from blkloom.errors import FaultError, TableError, UsageError
from blkloom.table import Segment, Table, parse_table
from blkloom.targets.limits import BlockLimits
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget, Mapped
from blkloom.targets.registry import builtin_targets
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes, Sectors

SIZE = 64 * 512


class LoadedTurning(LoadedTarget):
    """Zeros at first; a test has it turn into memory, refuse, or grow."""

    def __init__(self, spec: Turning, context: LoadContext, length: Bytes) -> None:
        super().__init__(spec, [(Bytes(0), length, Extent.zero())])
        self.live = context.segment()
        self.memory = context.region(Bytes(4 * SIZE))
        self.calls: list[str] = []
        self.next: Mapped | None = None
        self.no = ""

    def in_memory(self, length: int = SIZE) -> Mapped:
        return [(Bytes(0), Bytes(length), Extent.memory(self.memory, 0))]

    def limits(self) -> BlockLimits:
        return BlockLimits(4096, 65536)

    def postsuspend(self) -> None:
        self.calls.append("postsuspend")
        if self.no == "postsuspend":
            raise OSError(errno.ENOSPC, "no room to write back")

    def preresume(self) -> Mapped | None:
        self.calls.append("preresume")
        if self.no == "preresume":
            raise OSError(errno.EUCLEAN, "not what it was")
        return self.next


class Turning(TargetSpec):
    kind: type[LoadedTurning] = LoadedTurning

    name: ClassVar[str] = "turning"
    loaded: ClassVar[list[LoadedTurning]] = []

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        self.loaded.append(self.kind(self, context, length))
        return self.loaded[-1]


def made(*, segments: int = 1) -> tuple[Device, list[LoadedTurning]]:
    Turning.loaded.clear()
    length = SIZE // 512
    table = Table(tuple(Segment(Sectors(i * length), Sectors(length), Turning()) for i in range(segments)))
    device = blkloom.open(table)
    return device, list(Turning.loaded)


def read_only() -> AbstractContextManager[object]:
    return pytest.raises(OSError, match="Read-only file system")


def test_remap_puts_new_extents_in_once_nothing_is_in_flight() -> None:
    device, [target] = made()
    with device:
        with read_only():
            device.pwrite(b"x" * 512, 0)
        seen: list[bool] = []
        assert target.live.remap(target.in_memory(), drained=lambda: seen.append(device.suspended))
        assert seen == [True]
        assert device.pwrite(b"x" * 512, 0) == 512
        assert device.pread(512, 0) == b"x" * 512


def test_requests_wait_while_a_remap_drains() -> None:
    device, [target] = made()
    with device:
        answers: list[bytes] = []
        reader = threading.Thread(target=lambda: answers.append(device.pread(512, 0)))

        def drained() -> None:
            reader.start()
            assert not answers  # the gate is closed

        assert target.live.remap(target.in_memory(), drained=drained)
        reader.join()
        assert answers == [bytes(512)]


def test_a_remap_of_a_suspended_device_leaves_it_suspended() -> None:
    device, [target] = made()
    with device:
        device.suspend()
        assert target.live.remap(target.in_memory())
        assert device.suspended
        device.resume()
        assert device.pwrite(b"y" * 512, 512) == 512


def test_what_drained_raises_leaves_the_map_as_it_was() -> None:
    device, [target] = made()
    with device:
        with pytest.raises(KeyError):
            target.live.remap(target.in_memory(), drained=lambda: {}["missing"])
        assert not device.suspended
        with read_only():
            device.pwrite(b"x" * 512, 0)


def test_a_remap_that_leaves_a_gap_is_refused() -> None:
    device, [target, _] = made(segments=2)
    with device, pytest.raises(TableError, match="maps 512 of the segment's"):
        target.live.remap(target.in_memory(512))


def test_a_fault_handler_cannot_remap() -> None:
    caught: list[BaseException] = []

    class Reckless(LoadedTurning):
        writes = True

        def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
            try:
                self.live.remap(self.in_memory())
            except UsageError as error:
                caught.append(error)
            raise FaultError(errno.EPERM, "as expected")

    table = Table((Segment(Sectors(0), Sectors(64), Turning(Reckless)),))
    with blkloom.open(table) as device, pytest.raises(PermissionError):
        device.pwrite(b"x" * 512, 0)
    assert len(caught) == 1


def test_after_the_table_has_gone_remap_does_nothing() -> None:
    device, [target] = made()
    device.load(parse_table("0 64 zero", targets=builtin_targets()))
    device.resume()
    assert not target.live.remap(target.in_memory())
    device.close()
    assert not target.live.remap(target.in_memory())


def test_targets_hear_of_suspend_and_resume() -> None:
    device, [target] = made()
    with device:
        calls = target.calls
        assert calls == ["preresume"]
        device.suspend()
        device.suspend()
        device.resume()
        assert calls == ["preresume", "postsuspend", "preresume"]
    assert calls[-1] == "postsuspend"


def test_a_target_that_cannot_write_back_keeps_the_device_live() -> None:
    device, [target] = made()
    with device:
        target.no = "postsuspend"
        with pytest.raises(OSError, match="no room to write back"):
            device.suspend()
        assert not device.suspended
        assert device.pread(512, 0) == bytes(512)
        target.no = None


def test_a_target_that_refuses_to_resume_keeps_the_device_suspended() -> None:
    device, [target] = made()
    with device:
        device.suspend()
        target.no = "preresume"
        with pytest.raises(OSError, match="not what it was"):
            device.resume()
        assert device.suspended
        target.no = None
        device.resume()
        assert device.pread(512, 0) == bytes(512)


def test_the_only_segment_may_come_back_with_another_length() -> None:
    device, [target] = made()
    with device:
        device.suspend()
        target.next = target.in_memory(2 * SIZE)
        device.resume()
        assert device.size == 2 * SIZE
        assert device.table is not None
        assert device.table.length == 2 * SIZE // 512
        assert device.pwrite(b"z" * 512, SIZE) == 512


def test_one_of_several_segments_may_not() -> None:
    device, [target, _] = made(segments=2)
    with device:
        device.suspend()
        target.next = target.in_memory(2 * SIZE)
        with pytest.raises(TableError):
            device.resume()
        assert device.suspended
        target.next = None
        device.resume()


def test_limits_of_a_device_are_those_of_all_that_it_is_made_of() -> None:
    device, _ = made()
    with device:
        assert device.limits == BlockLimits(4096, 65536)
        with blkloom.open("0 64 linear blkloom:low 0", devices={"low": device}) as upper:
            assert upper.limits == device.limits
    with blkloom.open("0 8 zero") as plain:
        assert plain.limits == BlockLimits(512, 4096)


def test_an_event_of_a_target_reaches_the_callback_of_the_device() -> None:
    Turning.loaded.clear()
    heard: list[str] = []
    with Device(Table((Segment(Sectors(0), Sectors(64), Turning()),)), on_event=heard.append):
        Turning.loaded[0].live.event("something happened")
    assert heard == ["something happened"]


@pytest.mark.parametrize(("logical", "optimal"), [(256, 4096), (513, 4096), (4096, 512), (1 << 17, 1 << 17), (0, 0)])
def test_impossible_limits_are_refused(logical: int, optimal: int) -> None:
    with pytest.raises(UsageError, match="block size"):
        BlockLimits(logical, optimal)
