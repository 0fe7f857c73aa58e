"""Delay extents: which leg gets a request, and which extents may be delayed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

import blkloom
from async_target import PATIENCE, Calls, table
from blkloom._engine import DelayFilter, Extent
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.spec import TargetSpec
from blkloom.targets.zero import Zero
from blkloom.units import Bytes

NEVER = 1e6
"""Seconds that no test waits for."""


class Slow(TargetSpec):
    """Memory behind a delay; reads are of other memory than what is written."""

    read_seconds: float
    other_seconds: float

    name: ClassVar[str] = "slow"

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        reads, others = (Extent.memory(context.region(length), 0) for _ in range(2))
        extent = Extent.filtered(DelayFilter(self.read_seconds, self.other_seconds), reads, others)
        assert extent.kind == "filtered"
        return LoadedTarget(self, [(Bytes(0), length, extent)])


def test_a_request_goes_to_its_own_leg() -> None:
    with blkloom.Device(table(Slow(0.001, 0.002))) as device:
        device.pwrite(b"w" * 512, 0)
        assert device.pread(512, 0) == bytes(512)
        assert device.extents(0, 512) == [(0, 512, 3)]


def test_a_suspend_waits_for_no_delay_and_no_request_is_lost() -> None:
    with Calls() as call, blkloom.Device(table(Slow(NEVER, NEVER))) as device:
        requests = [call(device.pread, 512, 0), call(device.pwrite, b"w" * 512, 0)]
        device.suspend()
        device.resume()
        assert not any(request.done() for request in requests)
        device.load(table(Zero()))
        device.resume()
        assert [request.result(PATIENCE) for request in requests] == [bytes(512), 512]


def test_a_close_waits_for_no_delay() -> None:
    with Calls() as call:
        device = blkloom.Device(table(Slow(NEVER, 0)))
        read = call(device.pread, 512, 0)
        device.pwrite(b"w" * 512, 0)
        device.close()
        assert read.exception(PATIENCE) is None or isinstance(read.exception(), OSError)


def wrong_delays() -> Iterator[tuple[Extent, float, str]]:
    zero = Extent.zero()
    yield Extent.fault(), 1, "only data, memory, zero, error, a device, a backend or a tee"
    yield Extent.stripes(512, [zero]), 1, "only data, memory, zero, error, a device, a backend or a tee"
    yield Extent.filtered(DelayFilter(1, 1), zero), 1, "only data, memory, zero, error, a device, a backend or a tee"
    yield zero, -1, "negative"
    yield zero, float("nan"), "seconds"


@pytest.mark.parametrize(("leg", "seconds", "words"), list(wrong_delays()))
def test_what_cannot_be_delayed_is_refused(leg: Extent, seconds: float, words: str) -> None:
    class Wrong(Slow):
        def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
            return LoadedTarget(self, [(Bytes(0), length, Extent.filtered(DelayFilter(0, seconds), leg))])

    with pytest.raises(ValueError, match=words):
        blkloom.Device(table(Wrong(0, 0)))
