"""A table: contiguous segments from sector 0, each with its target. Pure values.

The checks are functions of numbers and places, so that the parser can point at the very word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from blkloom.errors import Place, TableError
from blkloom.units import DEVICE_LIMIT, SECTOR, Bytes, Sectors, to_sectors

if TYPE_CHECKING:
    from blkloom.target.base import Target

LINE_FORM: Final = "<start> <length> <target> <arguments>"
"""A line of a table, as errors show it."""

MOST_SECTORS: Final = to_sectors(Bytes(DEVICE_LIMIT - 1))
"""What the largest device has: the bytes of a device are fewer than 2^63."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One line of a table. place: where it was written; it does not count in comparisons."""

    start: Sectors
    length: Sectors
    target: Target
    place: Place = field(default_factory=Place, compare=False)

    @property
    def end(self) -> Sectors:
        """The first sector behind it."""
        return Sectors(self.start + self.length)


class Table(msgspec.Struct, frozen=True):
    """Segments in order; without any it is the table of a device of size 0, which no text stands for. Raises
    TableError unless they are contiguous from 0, none is empty, and the device stays below 2^63 bytes; a singleton
    target must be alone.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        expected = Sectors(0)
        for segment in self.segments:
            place = segment.place
            check_range(segment.start, segment.length, expected, start_place=place, length_place=place)
            if segment.target.singleton:
                check_alone(segment.target.name, len(self.segments), place)
            expected = segment.end

    @property
    def length(self) -> Sectors:
        """The device's size."""
        return self.segments[-1].end if self.segments else Sectors(0)


def check_range(start: Sectors, length: Sectors, expected: Sectors, *, start_place: Place, length_place: Place) -> None:
    """Raises TableError for a segment that does not begin at `expected`, that is empty, or that
    would make the device reach 2^63 bytes.
    """
    if start != expected:
        if not expected:
            what = "the first segment must start at sector 0"
        elif start < expected:
            what = f"the segment overlaps the one before it, which ends at sector {expected}"
        else:
            what = f"gap: the segment before it ends at sector {expected}"
        raise TableError(what, place=start_place, value=str(start), cure=f"start it at {expected}")
    if length <= 0:
        raise TableError(
            "a segment needs a length of at least one sector",
            place=length_place,
            value=str(length),
            cure=f"lengths count sectors of {SECTOR} bytes",
        )
    if length > MOST_SECTORS - start:
        room = MOST_SECTORS - start
        raise TableError(
            "the device would reach 2^63 bytes",
            place=length_place,
            value=str(length),
            cure=f"make it {room} sectors at most" if room else "remove the segment: the device is full",
        )


def check_alone(target: str, segments: int, place: Place) -> None:
    """Raises TableError when a table with the singleton `target` has more segments than that."""
    if segments > 1:
        raise TableError(
            f"target type {target} must appear alone in table",
            place=place,
            value=target,
            cure="make it a device of its own and put a linear segment on that",
        )
