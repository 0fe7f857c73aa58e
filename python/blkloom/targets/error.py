"""`error`: fails every request, or those that its features select.

Source: dm-target.c of Linux, the `error` target, which has no features and ignores the device of
`error <dev> <offset>`.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import ClassVar, Final

import msgspec
from typing_extensions import override

from blkloom._engine import ErrorFilter, Extent
from blkloom.table.arguments import Arguments, decimal
from blkloom.table.syntax import Argument, Option, Syntax, number, options
from blkloom.targets.device_ref import DeviceRef
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget, Mapped
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes, Sectors, to_bytes, to_sectors

CERTAIN: Final = 1_000_000_000
"""A probability of 1: probabilities are in billionths."""
OPERATIONS: Final = ("read", "write", "discard", "write_zeroes", "flush")


class Range(msgspec.Struct, frozen=True):
    """Sectors of the segment."""

    start: Sectors
    length: Sectors


def _option(word: str, value: str, read: Callable[[str], object], write: Callable[..., str], **more: bool) -> Option:
    return Option(word, word, value, read, write, **more)


def _read_probability(text: str) -> int:
    try:
        found = Decimal(text)
    except InvalidOperation:
        found = Decimal(-1)
    billionths = found * CERTAIN if found.is_finite() else Decimal(-1)
    if not 0 <= billionths <= CERTAIN or billionths != int(billionths):
        raise ValueError("must be from 0 to 1, with at most 9 decimal places")
    return int(billionths)


def _write_probability(billionths: int) -> str:
    return f"{Decimal(billionths) / CERTAIN:f}"


def _read_operations(text: str) -> tuple[str, ...]:
    given = text.split("+")
    if any(name not in OPERATIONS for name in given):
        raise ValueError(f"must be one or more of {', '.join(OPERATIONS)}, joined by +")
    return tuple(name for name in OPERATIONS if name in given)


def _read_errno(text: str) -> int:
    numbers = {name: number for number, name in errno.errorcode.items()}
    found = numbers.get(text.upper()) or decimal(text)
    if found is None or found not in errno.errorcode:
        raise ValueError("must be the name of an error, such as EIO or ENOSPC")
    return found


def _read_range(text: str) -> Range:
    start, plus, length = text.partition("+")
    found = decimal(start), decimal(length)
    if not plus or found[0] is None or not found[1]:
        raise ValueError("must be <first sector>+<number of sectors>")
    return Range(Sectors(found[0]), Sectors(found[1]))


FEATURES: Final = options(
    _option("probability", "<0 to 1>", _read_probability, _write_probability),
    _option("operations", "<operation>[+<operation>]...", _read_operations, "+".join),
    _option("errno", "<name>", _read_errno, lambda number: errno.errorcode[number]),
    _option("range", "<sector>+<sectors>", _read_range, lambda of: f"{of.start}+{of.length}", many=True),
    number("seed", most=(1 << 64) - 1),
)


def _read(arguments: Arguments) -> tuple[DeviceRef | None]:
    """The device, if the next word is not the number of features."""
    return (None if decimal(arguments.peek()) is not None else DeviceRef.parse(arguments),)


class Error(TargetSpec):
    """A segment whose requests fail with `errno`. Requests that the features do not select go to `device`; without a
    device reads give zeros, and writes are discarded. probability: in billionths. range: only these; () for all.
    seed: of the random numbers; None for another one at each load.
    """

    device: DeviceRef | None = None
    probability: int = CERTAIN
    operations: tuple[str, ...] = OPERATIONS
    errno: int = errno.EIO
    range: tuple[Range, ...] = ()
    seed: int | None = None

    name: ClassVar[str] = "error"
    raw: ClassVar[bool] = True
    arguments: ClassVar[Syntax] = (
        Argument(
            "<dev path> <offset>",
            ("device",),
            _read,
            lambda device: [] if device is None else device.format(),
            optional=True,
            is_path=True,
        ),
        FEATURES,
    )
    summary: ClassVar[str] = "fails every request, or those that its features select"

    @property
    def has_features(self) -> bool:
        """Whether it does not fail everything."""
        return bool(self.range) or self.probability < CERTAIN or self.operations != OPERATIONS

    @override
    def device_refs(self) -> Sequence[DeviceRef]:
        return () if self.device is None else (self.device,)

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        if not self.has_features:
            if self.device is not None:
                self.device.extent(context, length)  # it must exist, as in the kernel
            return LoadedTarget(self, [(Bytes(0), length, Extent.error(self.errno))])
        seed = random.getrandbits(64) if self.seed is None else self.seed
        filter = ErrorFilter(self.errno, self.operations, probability=self.probability, seed=seed)
        return LoadedTarget(self, _map(self, filter, context, length))


def _map(spec: Error, filter: ErrorFilter, context: LoadContext, length: Bytes) -> Mapped:
    """Runs without the filter, and filtered ones."""
    mapped: Mapped = []
    at = Bytes(0)
    for start, end in _merged(spec, context, length):
        if at < start:
            mapped.append((at, Bytes(start - at), _lower(spec, context, at, Bytes(start - at))))
        lower = _lower(spec, context, start, Bytes(end - start))
        mapped.append((start, Bytes(end - start), Extent.filtered(filter, lower)))
        at = end
    if at < length:
        mapped.append((at, Bytes(length - at), _lower(spec, context, at, Bytes(length - at))))
    return mapped


def _lower(spec: Error, context: LoadContext, at: Bytes, length: Bytes) -> Extent:
    if spec.device is None:
        return Extent.zero(discard_writes=not context.read_only)
    return DeviceRef(spec.device.path, Sectors(spec.device.offset + to_sectors(at))).extent(context, length)


def _merged(spec: Error, context: LoadContext, length: Bytes) -> list[tuple[Bytes, Bytes]]:
    """The ranges that fail, as (start, end) in bytes, in order and without overlaps. Raises TableError."""
    if not spec.range:
        return [(Bytes(0), length)]
    found: list[tuple[Bytes, Bytes]] = []
    for one in sorted(spec.range, key=lambda one: one.start):
        start, end = to_bytes(one.start), to_bytes(Sectors(one.start + one.length))
        if end > length:
            cure = f"the segment has {to_sectors(length)} sectors"
            raise context.refuse("range past the end of the segment", value=f"{one.start}+{one.length}", cure=cure)
        if found and start <= found[-1][1]:
            start, end = found[-1][0], max(end, found.pop()[1])
        found.append((start, end))
    return found
