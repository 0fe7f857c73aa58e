"""From a table to a map: every segment's target says where its bytes are, the runs become one map.

Each load gets copies of its targets and numbers of its own for them (owners), so faults of a table
that is on its way out never reach a target of the next. If a segment fails, everything opened for
the load is given up and the error, with the segment's place, goes to the caller.
Called by the thread that loads, under the device's control lock.
"""

from __future__ import annotations

import copy
import errno
import logging
from collections.abc import Iterator
from dataclasses import replace

import msgspec

from blkloom import open_files
from blkloom._engine import Extent, Map
from blkloom.errors import BackingError, BlkloomError, ResourceError, TableError
from blkloom.table import Segment, Table
from blkloom.target.base import Mapped, Target
from blkloom.target.limits import BlockLimits
from blkloom.target.opening import Opening
from blkloom.units import Bytes, to_bytes, to_sectors

_log = logging.getLogger(__name__)


class Owner(msgspec.Struct, frozen=True, eq=False):
    """A target as it is loaded: whom faults of the range go to. read_only: as the opening was."""

    target: Target
    start: Bytes
    length: Bytes
    read_only: bool


Run = tuple[int, int, int, Extent]
"""(start, length, owner, extent), as the engine's Map takes it: bytes of the device."""


class LoadedTable:
    """A table, its map, its targets by owner number (in order), what was opened for it, and its metadata contexts."""

    def __init__(self, table: Table, owners: dict[int, Owner], runs: dict[int, list[Run]], opening: Opening) -> None:
        self.table = table
        self.owners = owners
        self.opening = opening
        self._runs = runs
        self.map = self._whole(runs)
        self.contexts: tuple[str, ...] = ()
        self.ask_contexts()

    def ask_contexts(self) -> None:
        """Learns from the targets what `contexts` they have: those that all of them do, in the first one's order."""
        first, *others = [owner.target.contexts() for owner in self.owners.values()] or [()]
        self.contexts = tuple(name for name in first if all(name in names for names in others))

    @property
    def read_only(self) -> bool:
        """Writes fail with EROFS."""
        return self.opening.read_only

    @property
    def limits(self) -> BlockLimits:
        """What satisfies every target, and every device below."""
        below = (device.limits for device in self.opening.below)
        return BlockLimits.of_all([*below, *(owner.target.limits() for owner in self.owners.values())])

    def remap(self, number: int, mapped: Mapped) -> None:
        """What the owner `number` maps from now on; `table` gets the length of that where it is the only one.
        Raises TableError; then nothing has changed.
        """
        owner, segment = self.owners[number], self._segment(number)
        length = Bytes(sum(length for _, length, _ in mapped))
        if length != owner.length and len(self.owners) == 1:
            owner = msgspec.structs.replace(owner, length=length)
            segment = replace(segment, length=to_sectors(length))
        runs = self._runs | {number: _checked(mapped, owner, number, segment)}
        self.map = self._whole(runs)
        self._runs = runs
        if owner is not self.owners[number]:
            self.owners[number] = owner
            self.table = Table((segment,))

    def close(self) -> None:
        """Closes the targets, then what was opened. A target that fails to is logged."""
        _close_targets(self.owners)
        self.opening.close()

    def _segment(self, number: int) -> Segment:
        return self.table.segments[list(self.owners).index(number)]

    def _whole(self, runs: dict[int, list[Run]]) -> Map:
        flushing = [number for number, owner in self.owners.items() if owner.target.flushes]
        return Map([run for own in runs.values() for run in own], flush_owners=flushing)


def compose(table: Table, opening: Opening, numbers: Iterator[int]) -> LoadedTable:
    """Maps every segment. numbers: owner numbers nobody has. `opening` is closed if this raises:
    TableError, BackingError, or whatever a target of a user's raises, as TableError.
    """
    owners: dict[int, Owner] = {}
    runs: dict[int, list[Run]] = {}
    try:
        opening.alone = len(table.segments) == 1
        for segment in table.segments:
            number = next(numbers)
            start, length = to_bytes(segment.start), to_bytes(segment.length)
            owner = Owner(copy.copy(segment.target), start, length, opening.read_only)
            owners[number] = owner
            opening.place, opening.owner = segment.place, number
            runs[number] = _checked(_map(owner, opening, segment), owner, number, segment)
        opening.owner = -1
        return LoadedTable(table, owners, runs, opening)
    except BaseException:
        _close_targets(owners)
        opening.close()
        raise


def _map(owner: Owner, opening: Opening, segment: Segment) -> Mapped:
    """What the target maps."""
    try:
        return owner.target.map(opening, owner.start, owner.length)
    except BackingError as error:
        error.add_note(f"in the segment at {segment.place}")
        raise
    except BlkloomError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            what = f"target {owner.target.name} needs more open files than there may be"
            raise ResourceError(what, cure=open_files.advice(), errno=error.errno) from error
        raise TableError(f"target {owner.target.name} failed to map: {error!r}", place=segment.place) from error


def _checked(mapped: Mapped, owner: Owner, number: int, segment: Segment) -> list[Run]:
    """What the target mapped, with starts counted from the device's."""
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
