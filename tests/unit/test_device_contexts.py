"""Metadata contexts of targets: the contexts of a device, the queries to its targets, and wrong answers."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import pytest

import blkloom
from blkloom._engine import Extent
from blkloom.errors import FaultError
from blkloom.table import Segment, Table
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.spec import TargetSpec
from blkloom.targets.zero import Zero
from blkloom.units import Bytes, Sectors

PART = 8 * 512


class LoadedTold(LoadedTarget):
    spec: Told

    def contexts(self) -> Sequence[str]:
        return list(self.spec.names)

    def block_status(self, context: str, offset: Bytes, length: Bytes) -> Iterable[tuple[Bytes, int]]:
        self.spec.asked.append((context, offset, length))
        if context not in self.spec.names:
            raise FaultError(errno.EINVAL, "not that one")
        for at in range(offset, offset + length, 512):
            yield Bytes(512), self.spec.value + at // 512 % 2


class Told(TargetSpec):
    """Has `names`, and says of every context that sectors alternate, beginning with `value`."""

    names: list[str]
    value: int = 1
    asked: list[tuple[str, int, int]] = []  # noqa: RUF012 - a struct copies it
    kind: type[LoadedTold] = LoadedTold

    name: ClassVar[str] = "told"

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return self.kind(self, [(Bytes(0), length, Extent.zero())])


def table(*targets: TargetSpec) -> Table:
    sectors = PART // 512
    return Table(tuple(Segment(Sectors(sectors * i), Sectors(sectors), target) for i, target in enumerate(targets)))


def failing(number: int) -> AbstractContextManager[object]:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


def test_a_device_has_the_contexts_that_all_its_segments_have() -> None:
    first, second = Told(["x-a:1", "x-a:2", "x-a:3"]), Told(["x-a:3", "x-a:1"])
    for targets, wanted in (
        ([first], ("x-a:1", "x-a:2", "x-a:3")),
        ([first, second], ("x-a:1", "x-a:3")),
        ([first, Zero()], ()),
    ):
        with blkloom.Device(table(*targets)) as device:
            assert device.contexts == wanted


def test_every_segment_is_asked_once_for_its_part_of_the_range() -> None:
    first, second = Told(["x-a:1"]), Told(["x-a:1"], value=7)
    with blkloom.Device(table(first, second)) as device:
        found = device.extents(PART - 1024, 2048, context="x-a:1")
        assert found == [
            (PART - 1024, 512, 1),
            (PART - 512, 512, 2),
            (PART, 512, 7),
            (PART + 512, 512, 8),
        ]
        assert device.extents(PART - 1024, 2048) == [(PART - 1024, 2048, 3)]
        assert device.extents(PART - 1024, 2048, context="base:allocation") == [(PART - 1024, 2048, 3)]
    assert first.asked == [("x-a:1", PART - 1024, 1024)]
    assert second.asked == [("x-a:1", 0, 1024)]


def test_coroutines_ask_for_contexts_too() -> None:
    async def ask(device: blkloom.Device) -> None:
        async with device.asyncio() as disk:
            assert await disk.extents(512, 512, context="x-a:1") == [(512, 512, 2)]
            assert await disk.extents(512, 512) == [(512, 512, 3)]
            with failing(errno.EINVAL):
                await disk.extents(context="x-a:2")

    with blkloom.Device(table(Told(["x-a:1"]))) as device:
        asyncio.run(ask(device))


def test_a_context_a_segment_does_not_know_is_an_error_and_nothing_else_is() -> None:
    with blkloom.Device(table(Told(["x-a:1"]), Zero())) as device:
        with failing(errno.EINVAL):
            device.extents(context="x-a:1")
        with failing(errno.EINVAL):
            device.extents(PART, 512, context="x-a:1")
        assert device.extents(0, 512, context="x-a:1") == [(0, 512, 1)]
        assert device.extents() == [(0, 2 * PART, 3)]


def test_a_device_above_does_not_answer_for_the_one_below() -> None:
    with (
        blkloom.Device(table(Told(["x-a:1"])), name="below") as below,
        blkloom.open("0 8 linear blkloom:below 0", devices={"below": below}) as above,
    ):
        assert above.contexts == ()
        with failing(errno.EINVAL):
            above.extents(context="x-a:1")
        assert above.extents() == [(0, PART, 3)]


def test_contexts_are_those_of_the_last_resume() -> None:
    told = Told(["x-a:1"])
    with blkloom.Device(table(told)) as device:
        told.names[:] = ["x-a:2"]
        assert device.contexts == ("x-a:1",)
        with failing(errno.EINVAL):
            device.extents(context="x-a:1")
        device.suspend()
        assert device.contexts == ("x-a:1",)
        device.resume()
        assert device.contexts == ("x-a:2",)
        device.load(table(Zero()))
        assert device.contexts == ("x-a:2",)
        device.resume()
        assert device.contexts == ()


def test_an_answer_that_says_nothing_or_fails_midway_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    class Silent(LoadedTold):
        def block_status(self, context: str, offset: Bytes, length: Bytes) -> Iterable[tuple[Bytes, int]]:
            return []

    class Failing(LoadedTold):
        def block_status(self, context: str, offset: Bytes, length: Bytes) -> Iterable[tuple[Bytes, int]]:
            yield Bytes(512), 1
            raise OSError(errno.ENXIO, "gone")

    kinds: tuple[tuple[type[LoadedTold], int], ...] = ((Silent, errno.EIO), (Failing, errno.ENXIO))
    for kind, number in kinds:
        with blkloom.Device(table(Told(["x-a:1"], kind=kind))) as device:
            with failing(number):
                device.extents(context="x-a:1")
            assert device.extents() == [(0, PART, 3)]
    assert "says nothing" in caplog.text


def test_no_more_is_taken_of_an_answer_than_a_request_may_have() -> None:
    taken = 0

    class Endless(LoadedTold):
        def block_status(self, context: str, offset: Bytes, length: Bytes) -> Iterable[tuple[Bytes, int]]:
            nonlocal taken
            for at in range(offset, offset + length):
                taken += 1
                yield Bytes(1), at % 2

    with blkloom.Device(Table((Segment(Sectors(0), Sectors(200), Told(["x-a:1"], kind=Endless)),))) as device:
        found = device.extents(context="x-a:1")
    assert len(found) == taken == 200 * 512, "the rest was asked for again, and nothing of it twice"
