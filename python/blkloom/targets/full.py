"""`full`: a part of one file or device that has no space left after so many bytes were written.

As a thin device whose pool is full: blocks that were written may be read, written again, and discarded, which frees
them. A request that needs more blocks than are left fails with ENOSPC and changes nothing. Contents from before the
load use no space. Write-zeroes count as writes. Message: `set <bytes>` changes the limit.

The blocks in use are kept in an upgrade. If the worker is killed, those written since the last message are free again.
"""

from __future__ import annotations

import errno
from typing import ClassVar, Final

from typing_extensions import override

from blkloom._engine import DelayFilter, Extent
from blkloom.errors import FaultError, UsageError
from blkloom.table.arguments import Arguments
from blkloom.table.syntax import Argument, Syntax
from blkloom.targets.device_ref import OnDevice, device_ref
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.lower import LowerBackend
from blkloom.units import Bytes, parse_size

BLOCK: Final = 4096
"""Bytes. Space is used in these units."""


def _read(arguments: Arguments) -> tuple[Bytes]:
    text = arguments.word("bytes")
    try:
        return (parse_size(text),)
    except ValueError as error:
        raise arguments.error(str(error), value=text) from error


class Full(OnDevice):
    """A segment that maps to `device`, and has space for `space` bytes: as many whole blocks as that has."""

    space: Bytes

    name: ClassVar[str] = "full"
    arguments: ClassVar[Syntax] = (
        device_ref("device"),
        Argument("<bytes>", ("space",), _read, lambda space: (str(space),)),
    )
    summary: ClassVar[str] = "a piece of a file or device that has no space left after so many bytes"

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return _LoadedFull(self, context, length)


class _LoadedFull(LoadedTarget):
    spec: Full

    def __init__(self, spec: Full, context: LoadContext, length: Bytes) -> None:
        self._saved = context.saved_state()
        lower = spec.device.extent(context, length)
        self._blocks = _Blocks(context.lower(lower, length), spec.space)
        if (former := self._saved.read()) is not None:
            self._blocks.space = Bytes(former["space"])
            self._blocks.used = {block for start, end in former["used"] for block in range(start, end)}
        extent = lower
        if not context.read_only:
            queue = context.backend(self._blocks)
            extent = Extent.filtered(DelayFilter(0, 0), lower, Extent.backend(queue, 0))  # reads need no look
        super().__init__(spec, [(Bytes(0), length, extent)])

    @override
    def postsuspend(self) -> None:
        self._save()

    def _save(self) -> None:
        self._saved.save({"space": self._blocks.space, "used": _ranges(self._blocks.used)})

    @override
    def status(self) -> str:
        return f"{len(self._blocks.used) * BLOCK} {self._blocks.space}"

    @override
    def message(self, words: list[str]) -> None:
        match [words[0].lower(), *words[1:]] if words else []:
            case ["set", text]:
                try:
                    self._blocks.space = parse_size(text)
                except ValueError as error:
                    raise UsageError(f"Invalid argument: {error}") from error
            case _:
                what = f"Invalid argument: unrecognized message '{' '.join(words)}'"
                raise UsageError(what, cure="set <bytes>")
        self._save()


def _ranges(blocks: set[int]) -> list[tuple[int, int]]:
    """Numbers as (first, past the last)."""
    found: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if found and found[-1][1] == block:
            found[-1] = (found[-1][0], block + 1)
        else:
            found.append((block, block + 1))
    return found


class _Blocks(LowerBackend):
    """Counts the blocks that are written. used: their numbers. space: bytes."""

    def __init__(self, lower: LowerBackend.Lower, space: Bytes) -> None:
        super().__init__(lower)
        self.space = space
        self.used: set[int] = set()

    @override
    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        self._use(offset, Bytes(len(data)))
        await super().write(offset, data, fua=fua)

    @override
    async def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool) -> None:
        self._use(offset, length)
        await super().write_zeroes(offset, length, may_unmap=may_unmap)

    @override
    async def discard(self, offset: Bytes, length: Bytes) -> None:
        await super().discard(offset, length)
        self.used.difference_update(range(-(-offset // BLOCK), (offset + length) // BLOCK))

    def _use(self, offset: Bytes, length: Bytes) -> None:
        """Raises FaultError if there is not enough space."""
        needed = set(range(offset // BLOCK, -(-(offset + length) // BLOCK))) - self.used
        if needed and len(self.used) + len(needed) > self.space // BLOCK:
            raise FaultError(errno.ENOSPC, f"no space left: {len(self.used)} blocks of {BLOCK} bytes are used")
        self.used |= needed
