"""`throttle`: a part of one file or device with limits of operations and bytes a second.

The rate over any time is at most the limit plus one burst. Requests over a limit wait; they do not hold up a suspend.
Message: `set <limits>` replaces all limits, `set` alone removes them. Names as in QEMU's block I/O throttling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import msgspec
from typing_extensions import override

from blkloom._engine import Extent, ThrottleFilter
from blkloom.errors import UsageError
from blkloom.table.syntax import Option, Syntax, number, options
from blkloom.targets.device_ref import OnDevice, device_ref
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.units import DEVICE_LIMIT, Bytes, parse_size

if TYPE_CHECKING:
    from blkloom._engine import _Of, _Per

_LONGEST_BURST: Final = 1 << 32
_BURST: Final = 100
"""Milliseconds."""
_LIMITS: Final[dict[str, tuple[_Per, _Of]]] = {
    "iops": ("operations", "all"),
    "iops_rd": ("operations", "reads"),
    "iops_wr": ("operations", "writes"),
    "bps": ("bytes", "all"),
    "bps_rd": ("bytes", "reads"),
    "bps_wr": ("bytes", "writes"),
}


def _rate(word: str) -> Option:
    if not word.startswith("bps"):
        return number(word, "<operations>", least=1)

    def read(value: str) -> int:
        if not 1 <= (found := parse_size(value)) < DEVICE_LIMIT:
            raise ValueError(f"must be from 1 to {DEVICE_LIMIT - 1} bytes")
        return int(found)

    return Option(word, word, "<bytes>", read)


_SETTINGS: Final = {
    option.word: option for option in (*map(_rate, _LIMITS), number("burst", "<ms>", most=_LONGEST_BURST))
}
"""Options of the table, and words of the message `set`."""
_OPTIONS: Final = options(*_SETTINGS.values())


class Throttle(OnDevice):
    """A segment that maps to `device`, with limits a second: operations (`iops`) and bytes (`bps`), of all requests, of
    reads, and of writes, discards and write-zeroes. 0: no limit. burst: milliseconds.
    """

    iops: int = 0
    iops_rd: int = 0
    iops_wr: int = 0
    bps: int = 0
    bps_rd: int = 0
    bps_wr: int = 0
    burst: int = _BURST

    name: ClassVar[str] = "throttle"
    raw: ClassVar[bool] = True
    arguments: ClassVar[Syntax] = (device_ref("device"), _OPTIONS)
    summary: ClassVar[str] = "a piece of a file or device, with limits of operations and bytes a second"

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return _LoadedThrottle(self, context, length)

    def limits(self) -> list[tuple[_Per, _Of, int, float]]:
        """For the engine's filter."""
        rates = ((word, getattr(self, word)) for word in _LIMITS)
        return [(*_LIMITS[word], rate, self.burst / 1000) for word, rate in rates if rate]


class _LoadedThrottle(LoadedTarget):
    spec: Throttle

    def __init__(self, spec: Throttle, context: LoadContext, length: Bytes) -> None:
        self._filter = ThrottleFilter()
        self._now = spec
        self._saved = context.saved_state()
        if (former := self._saved.read()) is not None:
            self._now = msgspec.structs.replace(spec, **former)
        self._filter.set(self._now.limits())
        extent = Extent.filtered(self._filter, spec.device.extent(context, length))
        super().__init__(spec, [(Bytes(0), length, extent)])

    @override
    def status(self) -> str:
        return " ".join([str(self._filter.waiting), *_OPTIONS.format(self._now)[1:]])

    @override
    def message(self, words: list[str]) -> None:
        if not words or words[0].lower() != "set":
            what = f"Invalid argument: unrecognized message '{' '.join(words)}'"
            raise UsageError(what, cure="set [iops=<n>] [bps=<bytes>] ...")
        found: dict[str, object] = {**dict.fromkeys(_LIMITS, 0), "burst": _BURST}
        for word in words[1:]:
            name, _, value = word.partition("=")
            if name not in _SETTINGS:
                raise UsageError(
                    f"Invalid argument: unknown limit '{word}'", cure=f"limits are: {', '.join(_SETTINGS)}"
                )
            try:
                found[name] = _SETTINGS[name].read(value)
            except ValueError as error:
                raise UsageError(f"Invalid argument: '{word}': {error}") from error
        self._now = msgspec.structs.replace(self.spec, **found)
        self._filter.set(self._now.limits())
        self._saved.save(found)
