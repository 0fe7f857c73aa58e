"""`torn`: a part of one file or device that loses power on a message.

Writes that no flush has covered are held in memory, all versions of each block. The message `cut` makes all I/O fail,
at once or after a number of writes. Then `restore` chooses for each block its state at the last completed flush, or
that of any later write to it, and shows the result. A completed flush or FUA write is never undone. Discards and
write-zeroes count as writes. A flush that had not completed at the cut may count for some blocks. Blocks are not mixed,
unless `tear_inside` is given.

If the process is killed before the cut, or the table is replaced without a flush, the state is that of the last flush.
From the cut on, the recording is in the memory that the next process of the device gets, which is then cut, too.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import os
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ClassVar, Final

from typing_extensions import override

from blkloom._engine import Extent, SwitchFilter
from blkloom.errors import FaultError, UsageError
from blkloom.table.arguments import decimal
from blkloom.table.syntax import Syntax, choice, flag, number, options, size
from blkloom.targets.device_ref import OnDevice, device_ref
from blkloom.targets.limits import BlockLimits
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.lower import LowerBackend
from blkloom.targets.saved_state import SavedState
from blkloom.units import SECTOR, Bytes

_MEMORY: Final = Bytes(64 << 20)
_BLOCKS: Final = (512, 1024, 2048, 4096)
_MESSAGES: Final = "cut [<number of writes>], restore [<seed>], states <number> <path prefix>"
_COPY: Final = 1 << 20
_TRIES: Final = 32
"""Seeds that are tried for each state that differs from the others."""


class Torn(OnDevice):
    """A segment that maps to `device`. seed: of the choices; each restore without a seed takes the next number. memory:
    bytes of writes that are held at most. on_full: what happens to writes beyond that. block: bytes of a logical block.
    """

    seed: int = 0
    memory: Bytes = _MEMORY
    on_full: str = "wait"
    block: int = SECTOR
    tear_inside: bool = False

    name: ClassVar[str] = "torn"
    arguments: ClassVar[Syntax] = (
        device_ref("device"),
        options(
            number("seed", most=(1 << 64) - 1),
            size("memory"),
            choice("on_full", "wait", "fail"),
            number("block", "<bytes>", among=_BLOCKS),
            flag("tear_inside"),
        ),
    )
    summary: ClassVar[str] = "a piece of a file or device that loses power on a message"

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        if length % self.block:
            raise context.refuse("Target length not divisible by block size", value=str(length))
        return _LoadedTorn(self, context, length)


class _LoadedTorn(LoadedTarget):
    spec: Torn

    def __init__(self, spec: Torn, context: LoadContext, length: Bytes) -> None:
        self._length = length
        self._switch = SwitchFilter()
        lower = spec.device.extent(context, length)
        saved = context.saved_state()
        former = saved.read() or {}
        self._seed = former.get("seed", spec.seed)
        self._cache = VolatileCache(
            context.lower(lower, length), spec, lambda: self._switch.set("fail", "fail"), lambda: self._save(saved)
        )
        self._cache.go_on(former)
        extent = lower
        if not context.read_only:
            extent = Extent.backend(context.backend(self._cache), 0)
        self._read_only = context.read_only
        super().__init__(spec, [(Bytes(0), length, Extent.filtered(self._switch, extent))])

    @override
    def limits(self) -> BlockLimits:
        return BlockLimits(logical=self.spec.block)

    @override
    def status(self) -> str:
        state = "cut" if self._cache.is_cut else "running"
        return f"{state} {self._cache.blocks} {self._cache.held} {self._seed}"

    @override
    def postsuspend(self) -> None:
        if not (self._read_only or self._cache.is_cut):
            self._cache.save()  # how many writes are left until the cut

    def _save(self, saved: SavedState) -> None:
        saved.save({"seed": self._seed, **self._cache.state()})

    @override
    def message(self, words: list[str]) -> None:
        if self._read_only:
            raise UsageError("a read-only device loses nothing", cure="load the table for writing")
        match [words[0].lower(), *words[1:]] if words else []:
            case ["cut"]:
                self._cache.run(self._cache.cut())
            case ["cut", writes]:
                number = decimal(writes)
                if number is None:
                    raise UsageError(f"Invalid argument: '{writes}' is no number of writes", cure=_MESSAGES)
                self._cache.run(self._cache.cut_after(number))
            case ["restore", *seed] if len(seed) <= 1:
                self._check_cut("restore")
                self._cache.run(self._cache.restore(_seed_of(seed[0]) if seed else self._seed))
                self._seed += not seed
                self._cache.save()
                self._switch.set("pass", "pass")
            case ["states", count, prefix]:
                self._check_cut("states")
                number = decimal(count)
                if not number:
                    raise UsageError(f"Invalid argument: '{count}' is no number of states", cure=_MESSAGES)
                self._seed += self._cache.run(self._cache.copies(self._length, self._seed, number, prefix))
                self._cache.save()
            case _:
                raise UsageError(f"Invalid argument: unrecognized message '{' '.join(words)}'", cure=_MESSAGES)

    def _check_cut(self, what: str) -> None:
        if self._cache.is_cut:
            self._cache.run(self._cache.end_waiting())  # a cut at a write has not waited for that
        else:
            raise UsageError(f"{what}: the device has power", cure="first the message `cut`")


def _seed_of(word: str) -> int:
    found = decimal(word)
    if found is None:
        raise UsageError(f"Invalid argument: '{word}' is no seed", cure=_MESSAGES)
    return found


class VolatileCache(LowerBackend):
    """Holds what was written since the last flush, in all versions. The lower device has the state of that flush."""

    def __init__(
        self, lower: LowerBackend.Lower, spec: Torn, power_off: Callable[[], None], save: Callable[[], None]
    ) -> None:
        """power_off: makes all I/O fail from now on. save: saves `state` for the next process, and raises OSError."""
        super().__init__(lower)
        self._spec = spec
        self._power_off = power_off
        self.save = save
        self._writes_left: int | None = None
        """Writes until the cut, if one was asked for."""
        self._versions: dict[int, list[tuple[int, bytes]]] = {}
        """By block: (number of the write, contents), the newest last."""
        self._writes = 0
        self._room = asyncio.Condition()
        self._flushing = asyncio.Lock()
        self.held = 0
        self.is_cut = False
        self._is_saved = False
        """Whether the next process gets the recording. Only after a cut."""

    def state(self) -> dict[str, Any]:
        """For the next process, as JSON's types: of a cut device all versions, otherwise what a message has set."""
        if not self.is_cut:
            return {"writes_left": self._writes_left}
        versions = [
            (block, [base64.b64encode(data).decode("ascii") for _, data in found])
            for block, found in self._versions.items()
        ]
        return {"cut": versions}

    def go_on(self, former: dict[str, Any]) -> None:
        """Takes over the state of a former process. Before the first request."""
        self._writes_left = former.get("writes_left")
        if (versions := former.get("cut")) is None:
            return
        for block, found in versions:
            self._versions[block] = [(0, base64.b64decode(data)) for data in found]
            self.held += sum(len(data) for _, data in self._versions[block])
        self._cut()
        self._is_saved = True

    @property
    def blocks(self) -> int:
        """Number of blocks with versions that no flush covers."""
        return len(self._versions)

    @override
    async def read(self, offset: Bytes, length: Bytes) -> bytes | bytearray:
        # Versions are taken first: a flush that ends meanwhile has written them to the lower device.
        newest = {block: found[-1][1] for block in self._range(offset, length) if (found := self._versions.get(block))}
        data = await super().read(offset, length)
        if not newest:
            return data
        patched = bytearray(data)
        for block, contents in newest.items():
            at = block * self._spec.block - offset
            first, last = max(at, 0), min(at + len(contents), length)
            patched[first:last] = contents[first - at : last - at]
        return patched

    @override
    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        if not fua:
            await self._wait_for_room(len(data))
        if not fua and not (offset | len(data)) % self._spec.block:
            self._hold(offset, data)
            return
        async with self._flushing:  # otherwise a flush could put an older version over this one
            offset, data = await self._whole_blocks(offset, data)
            if not fua:
                self._hold(offset, data)
                return
            number = self._next()
            await super().write(offset, data, fua=True)
            self._check()
            self._forget(self._range(offset, Bytes(len(data))), number)

    def _hold(self, offset: Bytes, data: bytes) -> None:
        """Adds a version to each block of a write."""
        number, size = self._next(), self._spec.block
        for index, block in enumerate(self._range(offset, Bytes(len(data)))):
            self._versions.setdefault(block, []).append((number, data[index * size : (index + 1) * size]))
        self.held += len(data)

    async def _whole_blocks(self, offset: Bytes, data: bytes) -> tuple[Bytes, bytes]:
        """A write with the rest of its first and last block. No other task may wait in such a write or in a flush."""
        size = self._spec.block
        start, end = offset // size * size, -(-(offset + len(data)) // size) * size
        while end - start > len(data):
            before = self._writes
            rest = await self.read(Bytes(start), Bytes(end - start))
            if before == self._writes:  # no other write has come meanwhile
                at = offset - start
                return Bytes(start), bytes(rest[:at]) + data + bytes(rest[at + len(data) :])
        return offset, data

    @override
    async def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool) -> None:
        for at in range(offset, offset + length, _COPY):
            await self.write(Bytes(at), bytes(min(_COPY, offset + length - at)), fua=False)

    @override
    async def discard(self, offset: Bytes, length: Bytes) -> None:
        await self.write_zeroes(offset, length, may_unmap=True)

    @override
    async def flush(self) -> None:
        await self._flush(super().flush)

    async def _flush(self, flush_lower: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async with self._flushing:
            self._check()
            number = self._writes
            covered = {}
            for block, versions in self._versions.items():
                if contents := [data for written, data in versions if written <= number]:
                    covered[block] = contents[-1]
            await self._put(covered)
            await flush_lower()
            self._check()
            self._forget(covered, number)
        async with self._room:
            self._room.notify_all()

    @override
    async def flush_for_suspend(self) -> None:
        if not self.is_cut:  # otherwise the recording stays as it is
            await self._flush(super().flush_for_suspend)

    def _range(self, offset: Bytes, length: Bytes) -> range:
        size = self._spec.block
        return range(offset // size, -(-(offset + length) // size))

    def _next(self) -> int:
        self._check()
        if self._writes_left is not None:
            if not self._writes_left:
                self._cut()
                self._ending = asyncio.create_task(self.end_waiting())
                self._check()
            self._writes_left -= 1
        self._writes += 1
        return self._writes

    def _check(self) -> None:
        if self.is_cut:
            raise FaultError(errno.EIO, "the power is off")

    async def _wait_for_room(self, length: int) -> None:
        """Until the write fits into the memory. A single write may exceed it. Raises FaultError."""
        full = self.held and self.held + length > self._spec.memory
        if full and self._spec.on_full == "fail":
            raise FaultError(errno.EIO, "the memory for writes is full, and nothing was flushed")
        if full:
            async with self._room:
                await self._room.wait_for(
                    lambda: self.is_cut or not self.held or self.held + length <= self._spec.memory
                )
        self._check()

    def _forget(self, blocks: Sequence[int] | dict[int, bytes], number: int) -> None:
        """Drops all versions up to a write: they are older than what the lower device has."""
        for block in blocks:
            versions = self._versions.get(block, [])
            kept = [version for version in versions if version[0] > number]
            self.held -= sum(len(data) for written, data in versions if written <= number)
            if kept:
                self._versions[block] = kept
            else:
                self._versions.pop(block, None)

    async def _put(self, blocks: dict[int, bytes]) -> None:
        """Writes blocks to the lower device, neighbours together."""
        run: list[bytes] = []
        first = 0
        for block in sorted(blocks):
            if run and (block != first + len(run) or len(run) * self._spec.block >= _COPY):
                await self.lower.pwrite(b"".join(run), first * self._spec.block)
                run = []
            if not run:
                first = block
            run.append(blocks[block])
        if run:
            await self.lower.pwrite(b"".join(run), first * self._spec.block)

    # a power cut

    async def cut(self) -> None:
        """The power fails now."""
        self._cut()
        await self.end_waiting()

    async def cut_after(self, writes: int) -> None:
        """The power fails at the write after so many more."""
        self._check()
        self._writes_left = writes

    def _cut(self) -> None:
        self._power_off()
        self.is_cut = True
        self._writes_left = None

    async def end_waiting(self) -> None:
        """After the cut: writes that wait for room fail, a flush in flight ends, and the recording is saved for the
        next process. Raises OSError.
        """
        async with self._room:
            self._room.notify_all()
        async with self._flushing:
            if not self._is_saved:
                self.save()
                self._is_saved = True

    async def _chosen(self, seed: int) -> dict[int, bytes]:
        """The blocks that are not as the lower device has them, in the state that the seed chooses."""
        chance = random.Random(seed)
        chosen = {}
        for block in sorted(self._versions):
            versions = [data for _, data in self._versions[block]]
            index = chance.randrange(len(versions) + 1)
            tear = chance.randrange(1, self._spec.block) if self._spec.tear_inside else 0
            if not index:
                continue
            data = versions[index - 1]
            if tear:
                older = versions[index - 2] if index > 1 else await self.lower.pread(len(data), block * len(data))
                data = data[:tear] + older[tear:]
            chosen[block] = data
        return chosen

    async def restore(self, seed: int) -> None:
        """Makes a state the contents of the lower device, and forgets the versions. Raises OSError."""
        await self._put(await self._chosen(seed))
        await self.lower.flush()
        self._versions.clear()
        self.held = 0
        self.is_cut = self._is_saved = False

    async def copies(self, length: Bytes, seed: int, number: int, prefix: str) -> int:
        """Writes so many different states, or as many as there are, to new files: `prefix`.1 and so on. Returns the
        number of seeds that were tried. Raises OSError.
        """
        seen: set[int] = set()
        tried = 0
        while len(seen) < number and tried < number * _TRIES:
            chosen = await self._chosen(seed + tried)
            tried += 1
            key = hash(tuple(chosen.items()))
            if key in seen:
                continue
            seen.add(key)
            await self._copy(length, chosen, f"{prefix}.{len(seen)}")
        return tried

    async def _copy(self, length: Bytes, chosen: dict[int, bytes], path: str) -> None:
        file = await asyncio.to_thread(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            await asyncio.to_thread(os.ftruncate, file, length)
            for at in range(0, length, _COPY):
                data = await self.lower.pread(min(_COPY, length - at), at)
                if data.strip(b"\0"):
                    await asyncio.to_thread(os.pwrite, file, data, at)
            for block, data in chosen.items():
                await asyncio.to_thread(os.pwrite, file, data, block * self._spec.block)
        finally:
            os.close(file)
