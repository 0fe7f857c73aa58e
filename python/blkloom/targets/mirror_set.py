"""The legs of a mirror: writes to all of them, resync, and which of them may be read.

What is known of the legs:
- The *primary* leg has all data. It is the source of a resync.
- A leg is *behind* if it may lack data in regions that are not in sync. Other legs have all data, too.
- A leg is *left out* after a write to it has failed: it gets no writes until the device is resumed.
- A region is *in sync* if all legs have the same data in it.

A failure is saved before the write that has found it is answered, so the next process never takes a leg for good that
lacks data. All methods of `MirrorSet` run in the loop of the backend, except `run`, `progress` and `letters`.

The engine executes reads (`ReadMap`), and writes to regions that are in sync while no leg is left out (`Tee`). What
fails there comes here. A region is shut for the engine's writes while a write, or a copy of the resync, is in progress
here.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import groupby
from typing import Any, Final, Literal, TypeAlias, TypeVar

from typing_extensions import override

from blkloom import _engine
from blkloom._engine import Extent, SwitchFilter, Tee
from blkloom.errors import FaultError
from blkloom.printing import printable
from blkloom.targets.backend import Backend
from blkloom.targets.live_segment import LiveSegment
from blkloom.targets.lower import LowerDevice, LowerView, run_in_loop
from blkloom.targets.saved_state import SavedState
from blkloom.units import Bytes

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_Failed: TypeAlias = Literal["write", "sync", "read"]
_LETTERS: Final[dict[_Failed, str]] = {"write": "D", "sync": "S", "read": "R"}
"""As in the kernel; the first that applies."""
_STEP: Final = 1 << 20
"""Most bytes that a resync copies at once."""
_RUNS: Final = 64
"""Parts of the segment that are read from the legs in turn."""


def only_read(device: _engine.Device, offset: int = 0) -> Extent:
    """The device from `offset` on, for reads."""
    return Extent.device(device, offset, read_only=True)


class ReadMap:
    """The legs that are read natively: a device with a map of its own, behind a filter that sends reads elsewhere while
    the map changes, and at all times those that fail.
    """

    def __init__(self, device: _engine.Device, legs: Sequence[_engine.Device], length: Bytes, region: Bytes) -> None:
        self.device = device
        self.switch = SwitchFilter("elsewhere", "pass")
        self._legs = legs
        self._length = length
        self._run = -(-max(length // _RUNS, 1) // region) * region

    def leave(self) -> None:
        """From now on, no new read goes to a leg natively."""
        self.switch.set("elsewhere", "pass")

    def set(self, numbers: Sequence[int]) -> None:
        """Changes the legs of native reads; they are read in turn. Waits for the reads in flight. Raises OSError."""
        runs = [
            (at, min(self._run, self._length - at), 0, only_read(self._legs[numbers[index % len(numbers)]], at))
            for index, at in enumerate(range(0, self._length, self._run))
        ]
        self.device.swap(_engine.Map(runs))

    def use(self) -> None:
        """Reads go to the legs of the last `set`."""
        self.switch.set("try", "pass")


def _why(error: OSError) -> str:
    """Its text without the operation that has failed."""
    return os.strerror(error.errno or errno.EIO)


class Leg(LowerView):
    """A lower device, its path, and what has failed there."""

    def __init__(self, device: _engine.Device, path: str) -> None:
        super().__init__(device)
        self.path = path
        self.errors: set[_Failed] = set()

    @property
    def letter(self) -> str:
        """For the status."""
        return next((letter for kind, letter in _LETTERS.items() if kind in self.errors), "A")


class _RangeLocks:
    """Locks of ranges of bytes, in the order in which they are asked for."""

    def __init__(self) -> None:
        self._taken: list[tuple[int, int, asyncio.Event]] = []

    def taken(self) -> list[tuple[int, int]]:
        """The ranges that are locked, or that a task waits for: start and end."""
        return [(start, end) for start, end, _ in self._taken]

    @asynccontextmanager
    async def locked(self, offset: int, length: int) -> AsyncIterator[None]:
        """Waits until no earlier holder has a part of the range."""
        end = offset + length
        before = [free for start, stop, free in self._taken if start < end and offset < stop]
        mine = (offset, end, asyncio.Event())
        self._taken.append(mine)
        try:
            for free in before:
                await free.wait()
            yield
        finally:
            self._taken.remove(mine)
            mine[2].set()


class MirrorSet(Backend):
    """Does all operations but those of the engine. in_sync: the legs are the same at first. Without former state, the
    first leg is the primary. tee: None if the device is read-only.
    """

    tee: Tee | None = None

    def __init__(
        self,
        legs: Sequence[Leg],
        read_map: ReadMap,
        saved: SavedState,
        segment: LiveSegment,
        *,
        length: Bytes,
        region: Bytes,
        in_sync: bool,
    ) -> None:
        self.read_map = read_map
        self._legs = legs
        self._saved = saved
        self._segment = segment
        self._length, self._region = length, region
        self._regions = -(-length // region)
        self._primary = 0
        self._left_out: set[int] = set()
        self._behind: set[int] = set() if in_sync else set(range(1, len(legs)))
        self._in_sync = bytearray([in_sync]) * self._regions
        self._count = self._regions if in_sync else 0
        self._locks = _RangeLocks()
        self._diverged = False
        """Since the resync began, a write has failed on the primary and reached another leg, or a part of one."""
        self._pausing = False
        self._resyncing: asyncio.Task[None] | None = None
        self._mapping: asyncio.Task[None] | None = None
        self._mapped: list[int] | None = None
        self._restore()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """See `run_in_loop`."""
        return run_in_loop(self, work)

    # what is known

    @property
    def progress(self) -> str:
        """Regions in sync, and all of them."""
        return f"{self._count}/{self._regions}"

    @property
    def letters(self) -> str:
        """The state of each leg."""
        return "".join(leg.letter for leg in self._legs)

    def _restore(self) -> None:
        """Takes the state of the former process. If that was killed, writes in flight may have reached some legs only:
        no region is in sync.
        """
        former = self._saved.read()
        if former is None:
            return
        self._primary = former["primary"]
        self._left_out = set(former["left_out"])
        for leg, errors in zip(self._legs, former["errors"], strict=True):
            leg.errors = set(errors)
        clean = former["in_sync"] is not None
        self._behind = set(former["behind"] if clean else range(len(self._legs))) - {self._primary}
        self._in_sync = bytearray(bytes.fromhex(former["in_sync"])) if clean else bytearray(self._regions)
        self._count = self._in_sync.count(1)

    def _save(self, *, clean: bool = False) -> None:
        """clean: nothing is in flight. Raises OSError."""
        self._saved.save(
            {
                "primary": self._primary,
                "left_out": sorted(self._left_out),
                "behind": sorted(self._behind),
                "errors": [sorted(leg.errors) for leg in self._legs],
                "in_sync": self._in_sync.hex() if clean else None,
            }
        )

    def _numbers(self, offset: int, length: int) -> range:
        return range(offset // self._region, -(-(offset + length) // self._region))

    def _set_in_sync(self, regions: Iterable[int], value: bool) -> None:
        for region in regions:
            self._count += value - self._in_sync[region]
            self._in_sync[region] = value

    def _complete(self) -> list[int]:
        """Legs that have all data and no error; the primary first."""
        order = [self._primary, *(number for number in range(len(self._legs)) if number != self._primary)]
        return [number for number in order if number not in self._behind and not self._legs[number].errors]

    # requests

    @override
    async def read(self, offset: Bytes, length: Bytes) -> bytes | bytearray:
        numbers = self._complete() or [self._primary]
        if all(self._in_sync[region] for region in self._numbers(offset, length)):
            numbers += [number for number in self._behind if not self._legs[number].errors]
        failure: OSError | None = None
        for number in numbers:
            try:
                return await self._legs[number].lower.pread(length, offset)
            except OSError as error:
                failure = failure or error
                self._note_failure(number, "read", error)
        assert failure is not None, "there is always one leg"
        raise FaultError(failure.errno or errno.EIO, f"no leg can be read: {_why(failure)}") from failure

    @override
    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        await self._change(offset, Bytes(len(data)), lambda lower: lower.pwrite(data, offset, fua=fua))

    @override
    async def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool) -> None:
        await self._change(offset, length, lambda lower: lower.write_zeroes(offset, length, unmap=may_unmap))

    @override
    async def discard(self, offset: Bytes, length: Bytes) -> None:
        async with self._alone(offset, length):
            if self._left_out:
                self._set_in_sync(self._numbers(offset, length), False)
            _, failed = await self._everywhere(lambda lower: lower.discard(offset, length))
            self._mend(offset, length)
        if failed:  # as in the kernel, this does not make a leg a failed one
            raise FaultError(errno.EOPNOTSUPP, "a leg does not discard")

    @override
    async def flush(self) -> None:
        await self._flush(lambda lower: lower.flush())

    @override
    async def flush_for_suspend(self) -> None:
        await self._flush(lambda lower: lower.flush_for_suspend())

    async def _flush(self, work: Callable[[LowerDevice], Coroutine[Any, Any, Any]]) -> None:
        good, failed = await self._everywhere(work)
        if failed:  # nothing tells which writes are lost there
            self._write_failed(good, failed, range(self._regions))

    async def _change(
        self, offset: Bytes, length: Bytes, work: Callable[[LowerDevice], Coroutine[Any, Any, Any]]
    ) -> None:
        """Does the work on all legs. Two changes of the same bytes have the same order on each."""
        async with self._alone(offset, length):
            if self._left_out:
                self._set_in_sync(self._numbers(offset, length), False)
            good, failed = await self._everywhere(work)
            self._mend(offset, length)
            if failed:
                self._write_failed(good, failed, self._numbers(offset, length))

    @asynccontextmanager
    async def _alone(self, offset: int, length: int) -> AsyncIterator[None]:
        """Waits until no earlier change of the range is in progress, here or in the engine."""
        regions = self._numbers(offset, length)
        try:
            async with self._locks.locked(offset, length):
                if self.tee is not None and self.tee.shut(regions.start, len(regions)):
                    await self._wait_for_engine(self.tee, regions)
                yield
        finally:
            self._open(regions)

    async def _wait_for_engine(self, tee: Tee, regions: range) -> None:
        if not await asyncio.to_thread(tee.wait, regions.start, len(regions)):
            raise FaultError(errno.ESHUTDOWN, "the mirror is being closed")

    def _open(self, regions: range) -> None:
        """Leaves the writes to these regions to the engine, where that is possible."""
        if self.tee is None or self._left_out:
            return
        taken = [self._numbers(start, end - start) for start, end in self._locks.taken()]
        free = (self._in_sync[region] and not any(region in other for other in taken) for region in regions)
        for is_free, run in groupby(zip(free, regions, strict=True), key=lambda pair: pair[0]):
            if is_free:
                numbers = [region for _, region in run]
                self.tee.open(numbers[0], len(numbers))

    def _mend(self, offset: int, length: int) -> None:
        """All legs have the same bytes in the range, or else it is known that they have not."""
        if self.tee is not None:
            self.tee.mend(offset, length)

    async def _everywhere(
        self, work: Callable[[LowerDevice], Coroutine[Any, Any, Any]]
    ) -> tuple[list[int], dict[int, OSError]]:
        """The legs where it has succeeded, and those where it has failed. Waits for all of them."""
        numbers = [number for number in range(len(self._legs)) if number not in self._left_out]
        outcomes = await asyncio.gather(*(work(self._legs[number].lower) for number in numbers), return_exceptions=True)
        failed: dict[int, OSError] = {}
        for number, outcome in zip(numbers, outcomes, strict=True):
            if isinstance(outcome, OSError):
                failed[number] = outcome
            elif isinstance(outcome, BaseException):
                raise outcome
        return [number for number in numbers if number not in failed], failed

    # failures

    def _write_failed(self, good: list[int], failed: dict[int, OSError], regions: Iterable[int]) -> None:
        """Leaves failed legs out, saves that, and moves native reads. Raises FaultError where no good leg has all
        data: the write has failed then, and the primary stays in use.
        """
        self.read_map.leave()  # before the write is answered
        if self.tee is not None:
            self.tee.shut(0, self._regions)
        self._set_in_sync(regions, False)
        heirs = [number for number in good if number not in self._behind]
        heirs.sort(key=lambda number: bool(self._legs[number].errors))
        if self._primary in failed and heirs:
            self._primary = heirs[0]
        lost = self._primary in failed
        self._diverged |= lost
        if not good:  # each may have a part of the write
            self._behind = set(range(len(self._legs))) - {self._primary}
        else:
            self._behind |= failed.keys() - {self._primary}
            self._left_out |= failed.keys() - {self._primary}
        for number, error in failed.items():
            self._note_failure(number, "write", error)
        self._save()
        self._map_reads()
        if lost:
            first = failed[self._primary]
            raise FaultError(first.errno or errno.EIO, f"no leg with all data can be written: {_why(first)}")

    def _note_failure(self, number: int, kind: _Failed, error: OSError) -> None:
        leg = self._legs[number]
        if kind in leg.errors:
            return
        leg.errors.add(kind)
        what = {"write": "a write", "sync": "a copy of the resync", "read": "a read"}[kind]
        path = printable(leg.path)
        self._segment.event(f"leg {number} of the mirror ({path}) has failed: {what}: {_why(error)}")
        if kind == "read":
            if number == self._primary and (heirs := self._complete()):
                self._primary = heirs[0]
            self._save()
            self._map_reads()

    def _map_reads(self) -> None:
        """Begins to move native reads to the legs that have all data."""
        if self._mapping is None or self._mapping.done():
            self._mapping = asyncio.create_task(self._keep_mapped(), name="read map of a mirror")
            self._mapping.add_done_callback(self._mapping_ended)

    async def _keep_mapped(self) -> None:
        while (wanted := self._complete() or [self._primary]) != self._mapped:
            self.read_map.leave()
            await asyncio.to_thread(self.read_map.set, wanted)
            self._mapped = wanted
        self.read_map.use()

    def _mapping_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:  # reads stay elsewhere
            _log.error("the reads of a mirror cannot be mapped: %s", error)

    # resync

    async def begin(self, *, read_only: bool) -> None:
        """The device is about to be live: legs that have failed are tried again, and what is not in sync is copied."""
        self._pausing = False
        if not read_only:
            self._left_out.clear()
            for number, leg in enumerate(self._legs):
                if number == self._primary or number not in self._behind:
                    leg.errors.clear()
            self._save()
            self._open(range(self._regions))
            if self._behind and self._resyncing is None:
                self._resyncing = asyncio.create_task(self._resync(), name="resync of a mirror")
        self._map_reads()

    async def pause(self, *, read_only: bool) -> None:
        """The device is suspended: ends the resync until it is resumed."""
        self._pausing = True
        if self._resyncing is not None:
            await asyncio.wait([self._resyncing])
            failure, self._resyncing = self._resyncing.exception(), None
            if failure is not None:
                raise failure
        if self.tee is not None:
            for offset, length in self.tee.torn():  # a write that will be executed again after the resume
                self._set_in_sync(self._numbers(offset, length), False)
                self._behind = set(range(len(self._legs))) - {self._primary}
                self.tee.mend(offset, length)
        if not read_only:
            self._save(clean=True)

    async def _resync(self) -> None:
        """Copies the primary to the legs that are behind; again, if another leg becomes the primary meanwhile."""
        again = True
        while again and not self._pausing:
            self._diverged = False
            again = await self._resync_from(self._primary)

    async def _resync_from(self, source: int) -> bool:
        """Region by region, until the source has failed or is not the primary any more. Returns whether there is more
        to do.
        """
        copied = self._behind - self._left_out
        at = 0
        while at < self._length and not self._pausing:
            region = at // self._region
            if self._in_sync[region]:
                at = (region + 1) * self._region
                continue
            length = min(self._run_length(region) - (at - region * self._region), _STEP, self._length - at)
            async with self._alone(at, length):
                if not await self._copy(source, copied, at, length):
                    return source != self._primary
                if not self._left_out and copied == self._behind and not self._diverged:
                    done = range(region, (at + length) // self._region)
                    last = at + length == self._length
                    self._set_in_sync([*done, *([self._regions - 1] if last else [])], True)
            at += length
        if self._pausing or not copied:
            return False
        for number in sorted(copied):
            await self._flush_copied(number, copied)
        if self._diverged:
            return True
        self._behind -= copied
        if not self._behind:
            for leg in self._legs:
                leg.errors.clear()
            self._segment.event("the mirror is in sync")
        self._save()
        self._map_reads()
        return False

    def _run_length(self, region: int) -> int:
        """Bytes of the regions from this one on that are not in sync, up to a step; at least those of the region."""
        end = region + 1
        while end < self._regions and not self._in_sync[end] and (end + 1 - region) * self._region <= _STEP:
            end += 1
        return (end - region) * self._region

    async def _copy(self, source: int, copied: set[int], at: int, length: int) -> bool:
        """Copies a range; removes legs from `copied` that fail. False: the source has failed, or is not it any more."""
        copied -= self._left_out
        if source != self._primary or not copied:
            return False
        try:
            data = await self._legs[source].lower.pread(length, at)
        except OSError as error:
            self._note_failure(source, "sync", error)
            return False
        for number in sorted(copied):
            try:
                await self._legs[number].lower.pwrite(data, at)
            except OSError as error:
                self._resync_failed(number, copied, error)
        return True

    async def _flush_copied(self, number: int, copied: set[int]) -> None:
        try:
            await self._legs[number].lower.flush()
        except OSError as error:
            self._resync_failed(number, copied, error)

    def _resync_failed(self, number: int, copied: set[int], error: OSError) -> None:
        copied.discard(number)
        self._left_out.add(number)
        self._note_failure(number, "sync", error)
        self._save()

    @override
    async def close(self) -> None:
        self._pausing = True
        if self.tee is not None:
            self.tee.end()
        for task in (self._resyncing, self._mapping):
            if task is not None:
                await asyncio.wait([task])
        for leg in self._legs:
            await leg.close()
