"""Loads a table: each target loads its segment, and their maps become one map for the engine.

Each load has loaded targets of its own, with new owner numbers, so a fault of the old table never reaches a target
of the new one. If a segment fails, everything that the load has opened is closed, and the error names the segment.
Called by the thread that loads, under the control lock of the device.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from dataclasses import replace

import msgspec

from blkloom import open_files
from blkloom._engine import Extent, Map
from blkloom.errors import BackingError, BlkloomError, ResourceError, TableError
from blkloom.printing import described
from blkloom.table import Segment, Table
from blkloom.targets.limits import BlockLimits
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget, Mapped
from blkloom.units import Bytes, to_bytes, to_sectors

_log = logging.getLogger(__name__)


class Owner(msgspec.Struct, frozen=True, eq=False):
    """A loaded target, which gets the faults of its segment. read_only: as the table was loaded."""

    target: LoadedTarget
    start: Bytes
    length: Bytes
    read_only: bool


Run = tuple[int, int, int, Extent]
"""(start, length, owner, extent), as in the engine's Map: bytes of the device."""


class LoadedTable:
    """A loaded table: its map, its targets by owner number (in order), its open files, and its metadata contexts."""

    def __init__(
        self, table: Table, owners: dict[int, Owner], runs: dict[int, list[Run]], load_context: LoadContext
    ) -> None:
        self.table = table
        self.owners = owners
        self.load_context = load_context
        self._runs = runs
        self.map = self._whole(runs)
        self._cluster_runs: dict[int, list[tuple[int, int, int]]] = {}
        self.contexts: tuple[str, ...] = ()
        self.ask_contexts()

    def ask_contexts(self) -> None:
        """Asks the targets for their metadata `contexts`. The result has the contexts that all of them have, in the
        order of the first.
        """
        first, *others = [owner.target.contexts() for owner in self.owners.values()] or [()]
        self.contexts = tuple(name for name in first if all(name in names for names in others))

    @property
    def read_only(self) -> bool:
        """Whether writes fail with EROFS."""
        return self.load_context.read_only

    @property
    def limits(self) -> BlockLimits:
        """Block limits that suit every target and every lower device."""
        below = (device.limits for device in self.load_context.below)
        return BlockLimits.of_all([*below, *(owner.target.limits() for owner in self.owners.values())])

    @property
    def is_raw(self) -> bool:
        """Whether all targets of the table and of lower devices are raw; see `TargetSpec.raw`."""
        below = (device.is_raw for device in self.load_context.below)
        return all(owner.target.spec.raw for owner in self.owners.values()) and all(below)

    @property
    def rotational(self) -> bool:
        """Whether a file of the table or of a lower device is on a rotating disk."""
        own = any(open_files.is_rotational(descriptor) for descriptor in self.load_context.files.descriptors())
        return own or any(device.rotational for device in self.load_context.below)

    def remap(self, number: int, mapped: Mapped) -> None:
        """Replaces the mapping of the owner `number`. `table` gets the length of the new mapping if it has only this
        segment. Raises TableError; then nothing has changed.
        """
        owner, segment = self.owners[number], self._segment(number)
        length = Bytes(sum(length for _, length, _ in mapped))
        if length != owner.length and len(self.owners) == 1:
            owner = msgspec.structs.replace(owner, length=length)
            segment = replace(segment, length=to_sectors(length))
        runs = self._runs | {number: _checked(mapped, owner, number, segment)}
        self.map = self._whole(runs)
        self._runs = runs
        owner.target.map = mapped
        self._cluster_runs.pop(number, None)
        if owner is not self.owners[number]:
            self.owners[number] = owner
            self.table = Table((segment,))

    def cluster_runs(self, number: int) -> list[tuple[int, int, int]]:
        """Ranges where the owner `number` has cluster tables: (start, end, cluster size), in bytes of the device."""
        runs = self._cluster_runs.get(number)
        if runs is None:
            found = self._runs[number]
            runs = [(start, start + length, extent.cluster) for start, length, _, extent in found if extent.cluster]
            self._cluster_runs[number] = runs
        return runs

    def close(self) -> None:
        """Closes the targets, then the open files. Errors of targets are logged."""
        _close_targets(self.owners)
        self.load_context.close()

    def _segment(self, number: int) -> Segment:
        return self.table.segments[list(self.owners).index(number)]

    def _whole(self, runs: dict[int, list[Run]]) -> Map:
        flushing = [number for number, owner in self.owners.items() if owner.target.flushes]
        fua_flushes = any(self.owners[number].target.fua_flushes for number in flushing)
        return Map([run for own in runs.values() for run in own], flush_owners=flushing, fua_flushes=fua_flushes)


def compose(table: Table, context: LoadContext, numbers: Iterator[int]) -> LoadedTable:
    """Loads every segment. numbers: unused owner numbers. `context` is closed if this raises TableError or
    BackingError. Any other exception of a user's target is raised as TableError.
    """
    owners: dict[int, Owner] = {}
    runs: dict[int, list[Run]] = {}
    try:
        context.alone = len(table.segments) == 1
        for segment in table.segments:
            number = next(numbers)
            start, length = to_bytes(segment.start), to_bytes(segment.length)
            context.place, context.owner = segment.place, number
            target = _load(segment, context, start, length)
            owners[number] = owner = Owner(target, start, length, context.read_only)
            runs[number] = _checked(target.map, owner, number, segment)
        context.owner = -1
        return LoadedTable(table, owners, runs, context)
    except BaseException:
        _close_targets(owners)
        context.close()
        raise


def _load(segment: Segment, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
    name = segment.target.name
    try:
        target: object = segment.target.load(context, start, length)
    except BackingError as error:
        error.add_note(f"in the segment at {segment.place}")
        raise
    except BlkloomError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            what = f"target {name} needs more open files than there may be"
            raise ResourceError(what, cure=open_files.advice(), errno=error.errno) from error
        raise TableError(f"target {name} failed to map: {described(error)}", place=segment.place) from error
    if not isinstance(target, LoadedTarget):
        raise TableError(f"target {name} loads no LoadedTarget but {type(target).__name__}", place=segment.place)
    return target


def _checked(mapped: Mapped, owner: Owner, number: int, segment: Segment) -> list[Run]:
    """Converts the map of a target to offsets from the start of the device."""
    name, at = owner.target.name, 0
    runs: list[Run] = []
    for start, length, extent in mapped:
        if start != at or length <= 0:
            raise TableError(f"target {name} maps {length} bytes at {start}, expected at {at}", place=segment.place)
        runs.append((owner.start + start, length, number, extent))
        at += length
    if at != owner.length:
        raise TableError(f"target {name} maps {at} of the segment's {owner.length} bytes", place=segment.place)
    return runs


def _close_targets(owners: dict[int, Owner]) -> None:
    for owner in owners.values():
        try:
            owner.target.close()
        except Exception:
            _log.exception("closing target %s at byte %d", owner.target.name, owner.start)
        owner.target.map = []  # its files go at once, also where the target refers to itself
