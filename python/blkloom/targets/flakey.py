"""`flakey`: a part of one file or device that is unreliable for some seconds, in turn with seconds in which it is not.

Source: Linux Documentation/admin-guide/device-mapper/dm-flakey.rst; dm-flakey.c for the rules of the features. A *bio*
of the kernel is a part of a request here: what is contiguous in the lower device, up to 1 MiB. The next process of a
device goes on where the former one was in the intervals.
"""

from __future__ import annotations

import random
import time
from typing import ClassVar, Final, Literal, Self

import msgspec
from typing_extensions import override

from blkloom._engine import Extent, FlakeyFilter
from blkloom.table.arguments import Arguments
from blkloom.table.syntax import Argument, Syntax, integer
from blkloom.targets.device_ref import OnDevice, device_ref
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.lower import LowerBackend
from blkloom.units import Bytes

_MOST: Final = (1 << 32) - 1
CERTAIN: Final = 1_000_000_000
"""Probabilities are in billionths."""


class Corruption(msgspec.Struct, frozen=True):
    """`corrupt_bio_byte`: byte number `nth` (from 1 on) of each read (or write) becomes `value`. flags: kept for the
    table; requests have no such flags here, so that other values than 0 corrupt nothing.
    """

    nth: int
    direction: Literal["r", "w"]
    value: int
    flags: int


class Features(msgspec.Struct, frozen=True):
    """What happens while the device is down."""

    error_reads: bool = False
    drop_writes: bool = False
    error_writes: bool = False
    corrupt: Corruption | None = None
    random_read: int = 0
    random_write: int = 0

    @property
    def any(self) -> bool:
        """Whether a feature is given."""
        return self != Features()

    @property
    def corrupts_reads(self) -> bool:
        """Whether bytes that are read may change."""
        return self.random_read > 0 or (self.corrupt is not None and self.corrupt.direction == "r")

    @property
    def corrupts_writes(self) -> bool:
        """Whether bytes that are written may change."""
        return self.random_write > 0 or (self.corrupt is not None and self.corrupt.direction == "w")


def _read(arguments: Arguments) -> tuple[Features]:
    found: dict[str, object] = {}
    left = arguments.integer("number of feature args", most=13)
    if arguments.remaining < left:
        raise arguments.error(f"Insufficient feature arguments: {left} expected, {arguments.remaining} given")
    end = arguments.remaining - left
    while arguments.remaining > end:
        word = arguments.word("feature")
        name = word.lower()
        if name in found:
            raise arguments.error(f"Feature {name} duplicated", value=word)
        match name:
            case "error_reads" | "drop_writes" | "error_writes":
                found[name] = True
            case "corrupt_bio_byte":
                found[name] = _read_corruption(arguments, end)
            case "random_read_corrupt" | "random_write_corrupt":
                _check_left(arguments, end, name, 1)
                found[name] = arguments.integer("random corrupt argument", most=CERTAIN)
            case _:
                known = (
                    "error_reads, drop_writes, error_writes, corrupt_bio_byte <nth byte> <r|w> <value> <flags>, "
                    "random_read_corrupt <billionths>, random_write_corrupt <billionths>"
                )
                what = "Unrecognised flakey feature requested"
                raise arguments.error(what, value=word, cure=f"features are: {known}")
    features = Features(
        error_reads="error_reads" in found,
        drop_writes="drop_writes" in found,
        error_writes="error_writes" in found,
        corrupt=msgspec.convert(found.get("corrupt_bio_byte"), Corruption | None),
        random_read=msgspec.convert(found.get("random_read_corrupt", 0), int),
        random_write=msgspec.convert(found.get("random_write_corrupt", 0), int),
    )
    _check_compatible(arguments, features)
    return (features,)


def _check_left(arguments: Arguments, end: int, name: str, count: int) -> None:
    if arguments.remaining - end < count:
        raise arguments.error(f"Feature {name} requires parameters", value=name)


def _read_corruption(arguments: Arguments, end: int) -> Corruption:
    _check_left(arguments, end, "corrupt_bio_byte", 4)
    nth = arguments.integer("corrupt bio byte", least=1, most=_MOST)
    direction = arguments.word("corrupt bio direction").lower()
    if direction not in ("r", "w"):
        raise arguments.error("Invalid corrupt bio direction (r or w)", value=direction)
    value = arguments.integer("corrupt value to write into bio byte (0-255)", most=255)
    flags = arguments.integer("corrupt bio flags mask", most=_MOST)
    return Corruption(nth, "r" if direction == "r" else "w", value, flags)


def _check_compatible(arguments: Arguments, features: Features) -> None:
    """Raises TableError for features that exclude each other."""
    pairs = (
        (features.drop_writes and features.error_writes, "drop_writes", "error_writes"),
        (features.drop_writes and features.corrupts_writes, "drop_writes", "corruption of writes"),
        (features.error_writes and features.corrupts_writes, "error_writes", "corruption of writes"),
        (features.error_reads and features.corrupts_reads, "error_reads", "corruption of reads"),
    )
    for excluded, first, second in pairs:
        if excluded:
            raise arguments.error(f"Feature {first} is incompatible with {second}", cure="leave one of them out")


def _write(features: Features) -> list[str]:
    words = [name for name in ("error_reads", "drop_writes", "error_writes") if getattr(features, name)]
    if (corrupt := features.corrupt) is not None:
        words += ["corrupt_bio_byte", str(corrupt.nth), corrupt.direction, str(corrupt.value), str(corrupt.flags)]
    if features.random_read:
        words += ["random_read_corrupt", str(features.random_read)]
    if features.random_write:
        words += ["random_write_corrupt", str(features.random_write)]
    return [str(len(words)), *words]


class Flakey(OnDevice):
    """A segment that maps to `device`; it is up for `up` seconds, and then has its features for `down` seconds. Without
    features all requests fail while it is down.
    """

    up: int
    down: int
    features: Features = Features()

    name: ClassVar[str] = "flakey"
    arguments: ClassVar[Syntax] = (
        device_ref("device"),
        integer("up", most=_MOST)._replace(syntax="<up interval>"),
        integer("down", most=_MOST)._replace(syntax="<down interval>"),
        Argument(
            "<#features> [error_reads] [drop_writes] [error_writes] "
            "[corrupt_bio_byte <nth byte> <r|w> <value> <flags>] "
            "[random_read_corrupt <billionths>] [random_write_corrupt <billionths>]",
            ("features",),
            _read,
            _write,
            optional=True,
        ),
    )
    summary: ClassVar[str] = "a piece of a file or device, unreliable for some seconds at a time"

    @classmethod
    @override
    def parse(cls, arguments: Arguments) -> Self:
        found = super().parse(arguments)
        if not found.up + found.down:
            raise arguments.error("Total (up + down) interval is zero", cure="give seconds for one of them")
        if found.up + found.down > _MOST:
            raise arguments.error("Interval overflow", cure=f"up and down together have at most {_MOST} seconds")
        if not found.features.any:  # as the kernel since Linux 6.5, which also shows it
            return msgspec.structs.replace(found, features=Features(error_reads=True, error_writes=True))
        return found

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return _LoadedFlakey(self, context, length)


class _LoadedFlakey(LoadedTarget):
    spec: Flakey

    def __init__(self, spec: Flakey, context: LoadContext, length: Bytes) -> None:
        features = spec.features
        lower, elsewhere = spec.device.extent(context, length), None
        if features.corrupts_reads or features.corrupts_writes:
            backend = _Corrupting(context.lower(lower, length), features)
            elsewhere = Extent.backend(context.backend(backend), 0, read_only=context.read_only)
        fails = not features.any
        reads: Literal["pass", "fail", "elsewhere"] = "fail" if fails or features.error_reads else "pass"
        others: Literal["pass", "fail", "drop", "elsewhere"] = "fail" if fails or features.error_writes else "pass"
        if features.drop_writes:
            others = "drop"
        filter = FlakeyFilter(
            spec.up,
            spec.down,
            reads="elsewhere" if features.corrupts_reads else reads,
            others="elsewhere" if features.corrupts_writes else others,
            elapsed=_elapsed(spec, context),
        )
        super().__init__(spec, [(Bytes(0), length, Extent.filtered(filter, lower, elsewhere=elsewhere))])


def _elapsed(spec: Flakey, context: LoadContext) -> float:
    """Seconds since the table was loaded, also by a former process of the device."""
    if not (spec.up and spec.down):
        return 0.0  # it never changes
    saved, now = context.saved_state(), time.monotonic()
    if (former := saved.read()) is not None:
        return max(0.0, now - float(former["began"]))
    saved.save({"began": now})
    return 0.0


class _Corrupting(LowerBackend):
    """Reads and writes of a lower device with changed bytes."""

    def __init__(self, lower: LowerBackend.Lower, features: Features) -> None:
        super().__init__(lower)
        self._features = features
        self._random = random.Random()

    @override
    async def read(self, offset: Bytes, length: Bytes) -> bytearray:
        data = bytearray(await super().read(offset, length))
        self._corrupt(data, "r", self._features.random_read)
        return data

    @override
    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        changed = bytearray(data)
        self._corrupt(changed, "w", self._features.random_write)
        await super().write(offset, bytes(changed), fua=fua)

    def _corrupt(self, data: bytearray, direction: str, probability: int) -> None:
        corrupt = self._features.corrupt
        if corrupt is not None and corrupt.direction == direction and not corrupt.flags and corrupt.nth <= len(data):
            data[corrupt.nth - 1] = corrupt.value
        if probability and self._random.randrange(CERTAIN) < probability:
            data[self._random.randrange(len(data))] = self._random.randrange(256)
