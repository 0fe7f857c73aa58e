"""`mirror`: the same data on several files or devices (RAID 1), with a log in memory.

Source: Linux Documentation/admin-guide/device-mapper/dm-raid.rst does not describe it; dm-raid1.c and dm-log.c for the
arguments, the texts of errors and the form of the status. Differences from the kernel: see docs/targets.md.

Reads go to one leg natively (`ReadMap`), and where that fails to another (`MirrorSet.read`). Writes go to all legs
natively (`Tee`), except where the legs are not in sync, or one has failed: there to `MirrorSet`.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import ClassVar, Final

from typing_extensions import override

from blkloom._engine import Extent, Tee
from blkloom.errors import ResourceError
from blkloom.table.arguments import Arguments, decimal
from blkloom.table.syntax import Argument, Syntax
from blkloom.targets.device_ref import DeviceRef
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.mirror_set import Leg, MirrorSet, ReadMap, only_read
from blkloom.targets.saved_state import SavedState
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes, Sectors, to_bytes, to_sectors

_MOST_LEGS: Final = 9
"""As in the kernel (DM_KCOPYD_MAX_REGIONS + 1)."""
_FEATURES: Final = ("handle_errors", "keep_log")


def _read_log(arguments: Arguments) -> tuple[int, str]:
    if (log := arguments.word("log type")) != "core":
        raise arguments.error("Error creating mirror dirty log: unknown log type", value=log, cure="write: core")
    count = arguments.integer("mirror log argument count")
    if not 1 <= count <= 2:
        raise arguments.error("Error creating mirror dirty log: wrong number of arguments", value=str(count))
    size = arguments.word("region size")
    region = decimal(size)
    if region is None or region < 2 or region & (region - 1) or region >= 1 << 32:
        cure = "a power of 2, in sectors, at least 2"
        raise arguments.error("Error creating mirror dirty log: invalid region size", value=size, cure=cure)
    sync = arguments.word("sync") if count > 1 else ""
    if sync not in ("", "sync", "nosync"):
        what = "Error creating mirror dirty log: unrecognised sync argument"
        raise arguments.error(what, value=sync, cure="write sync or nosync, or leave it out")
    return region, sync


def _write_log(region: int, sync: str) -> list[str]:
    return ["core", "2" if sync else "1", str(region), *([sync] if sync else [])]


def _read_legs(arguments: Arguments) -> tuple[tuple[DeviceRef, ...]]:
    word = arguments.word("number of mirrors")
    count = decimal(word)
    if count is None or not 2 <= count <= _MOST_LEGS:
        raise arguments.error("Invalid number of mirrors", value=word, cure=f"from 2 to {_MOST_LEGS}")
    if arguments.remaining < 2 * count:
        what = f"Too few mirror arguments: {2 * count} expected, {arguments.remaining} given"
        raise arguments.error(what, value=word)
    return (tuple(DeviceRef.parse(arguments) for _ in range(count)),)


def _write_legs(legs: tuple[DeviceRef, ...]) -> list[str]:
    return [str(len(legs)), *(word for ref in legs for word in ref.format())]


def _read_features(arguments: Arguments) -> tuple[tuple[str, ...]]:
    word = arguments.word("number of features")
    count = decimal(word)
    if count is None or count > len(_FEATURES):
        raise arguments.error("Invalid number of features", value=word, cure=f"features are: {', '.join(_FEATURES)}")
    if count != arguments.remaining:
        what = f"Not enough arguments to support feature count: {count} expected, {arguments.remaining} given"
        raise arguments.error(what if count > arguments.remaining else "Too many mirror arguments", value=word)
    found = set()
    for _ in range(count):
        feature = arguments.word("feature")
        if feature not in _FEATURES:
            cure = f"features are: {', '.join(_FEATURES)}"
            raise arguments.error("Unrecognised feature requested", value=feature, cure=cure)
        found.add(feature)
    if "keep_log" in found and "handle_errors" not in found:
        cure = "write: 2 handle_errors keep_log"
        raise arguments.error("keep_log feature requires the handle_errors feature", value="keep_log", cure=cure)
    return (tuple(feature for feature in _FEATURES if feature in found),)


def _write_features(features: tuple[str, ...]) -> list[str]:
    return [str(len(features)), *features] if features else []


class Mirror(TargetSpec):
    """A segment that all legs have. region: sectors of a region, the unit of what is known to be in sync. sync:
    "nosync" if the legs are the same already, "sync" or "" if the first is to be copied to the others. features: kept
    for the table; errors are always handled.
    """

    region: int
    legs: tuple[DeviceRef, ...]
    sync: str = ""
    features: tuple[str, ...] = ()

    name: ClassVar[str] = "mirror"
    arguments: ClassVar[Syntax] = (
        Argument("core <#log args> <region size> [sync|nosync]", ("region", "sync"), _read_log, _write_log),
        Argument("<#mirrors> [<dev path> <offset>]+", ("legs",), _read_legs, _write_legs),
        Argument(
            "<#features> [handle_errors [keep_log]]", ("features",), _read_features, _write_features, optional=True
        ),
    )
    summary: ClassVar[str] = "the same data on several files or devices (RAID 1)"

    @override
    def device_refs(self) -> Sequence[DeviceRef]:
        return self.legs

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        if self.region > to_sectors(length):
            cure = f"at most {to_sectors(length)} sectors, the length of the segment"
            what = "Error creating mirror dirty log: invalid region size"
            raise context.refuse(what, value=str(self.region), cure=cure)
        return _LoadedMirror(self, context, length)


def _state_of_legs(context: LoadContext) -> SavedState:
    """Which legs have all data. Without it, an old leg could be taken for the primary. Raises ResourceError."""
    state = context.saved_state(if_lost="it is not known which legs have all data")
    if state.is_lost:
        raise ResourceError(
            "which legs have all data is lost with the processes that knew it",
            cure="remove the device and create it again, with a leg first that has all data",
            errno=errno.ESTALE,
        )
    return state


class _LoadedMirror(LoadedTarget):
    spec: Mirror

    def __init__(self, spec: Mirror, context: LoadContext, length: Bytes) -> None:
        lowers = [context.lower(ref.extent(context, length), length) for ref in spec.legs]
        self._read_only = context.read_only
        self._set = MirrorSet(
            [Leg(lower, ref.path) for lower, ref in zip(lowers, spec.legs, strict=True)],
            ReadMap(context.lower(only_read(lowers[0]), length), lowers, length, to_bytes(Sectors(spec.region))),
            _state_of_legs(context),
            context.segment(),
            length=length,
            region=to_bytes(Sectors(spec.region)),
            in_sync=spec.sync == "nosync",
        )
        queue = context.backend(self._set)
        reads, backend = only_read(self._set.read_map.device), Extent.backend(queue, 0, read_only=True)
        writes = backend
        if not context.read_only:
            self._set.tee = Tee(lowers, queue, length, to_bytes(Sectors(spec.region)))
            writes = Extent.tee(self._set.tee, 0)
        extent = Extent.filtered(self._set.read_map.switch, reads, writes, elsewhere=backend)
        super().__init__(spec, [(Bytes(0), length, extent)])

    @override
    def preresume(self) -> None:
        self._set.run(self._set.begin(read_only=self._read_only))

    @override
    def postsuspend(self) -> None:
        self._set.run(self._set.pause(read_only=self._read_only))

    @override
    def status(self) -> str:
        paths = " ".join(ref.path for ref in self.spec.legs)
        return f"{len(self.spec.legs)} {paths} {self._set.progress} 1 {self._set.letters} 1 core"
