"""From a table to a map: every segment's target says where its bytes are, the runs become one map.

Each load gets copies of its targets and numbers of its own for them (owners), so faults of a table
that is on its way out never reach a target of the next. If a segment fails, everything opened for
the load is given up and the error, with the segment's place, goes to the caller.
Called by the thread that loads, under the device's control lock.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from blkloom._engine import Extent, Map
from blkloom.errors import BackingError, BlkloomError, TableError
from blkloom.table import Segment, Table
from blkloom.target.base import Target
from blkloom.target.opening import Opening
from blkloom.units import Bytes, to_bytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Owner:
    """A target as it is loaded: whom faults of the range go to. read_only: as the opening was."""

    target: Target
    start: Bytes
    length: Bytes
    read_only: bool


@dataclass(frozen=True, eq=False)
class LoadedTable:
    """A table, its map, its targets by owner number (in order), and what was opened for it."""

    table: Table
    map: Map
    owners: dict[int, Owner]
    opening: Opening

    @property
    def read_only(self) -> bool:
        """Writes fail with EROFS."""
        return self.opening.read_only

    def close(self) -> None:
        """Closes the targets, then what was opened. A target that fails to is logged."""
        _close_targets(self.owners)
        self.opening.close()


def compose(table: Table, opening: Opening, numbers: Iterator[int]) -> LoadedTable:
    """Maps every segment. numbers: owner numbers nobody has. `opening` is closed if this raises:
    TableError, BackingError, or whatever a target of a user's raises, as TableError.
    """
    owners: dict[int, Owner] = {}
    runs: list[tuple[int, int, int, Extent]] = []
    try:
        for segment in table.segments:
            number = next(numbers)
            start, length = to_bytes(segment.start), to_bytes(segment.length)
            owner = Owner(copy.copy(segment.target), start, length, opening.read_only)
            owners[number] = owner
            opening.place = segment.place
            runs.extend((start, length, number, extent) for start, length, extent in _runs(owner, opening, segment))
        flushing = [number for number, owner in owners.items() if owner.target.flushes]
        return LoadedTable(table, Map(runs, flush_owners=flushing), owners, opening)
    except BaseException:
        _close_targets(owners)
        opening.close()
        raise


def _runs(owner: Owner, opening: Opening, segment: Segment) -> Iterator[tuple[int, int, Extent]]:
    """What the target maps, checked, with starts counted from the device's."""
    name = owner.target.name
    try:
        mapped = owner.target.map(opening, owner.start, owner.length)
    except BackingError as error:
        error.add_note(f"in the segment at {segment.place}")
        raise
    except BlkloomError:
        raise
    except Exception as error:
        raise TableError(f"target {name} failed to map: {error!r}", place=segment.place) from error
    at = 0
    for start, length, extent in mapped:
        if start != at or length <= 0:
            raise TableError(f"target {name} maps {length} bytes at {start}, expected at {at}", place=segment.place)
        yield owner.start + start, length, extent
        at += length
    if at != owner.length:
        raise TableError(f"target {name} maps {at} of the segment's {owner.length} bytes", place=segment.place)


def _close_targets(owners: dict[int, Owner]) -> None:
    for owner in owners.values():
        try:
            owner.target.close()
        except Exception:
            _log.exception("closing target %s at byte %d", owner.target.name, owner.start)
