"""A table: contiguous segments from sector 0, each with its target. Pure values.

The checks are functions of numbers and places, so that the parser can name the faulty word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from blkloom.errors import Place, TableError
from blkloom.units import DEVICE_LIMIT, SECTOR, Bytes, Sectors, to_sectors

if TYPE_CHECKING:
    from blkloom.targets.spec import TargetSpec

LINE_FORM: Final = "<start> <length> <target> <arguments>"
"""The form of a table line, for errors."""

MOST_SECTORS: Final = to_sectors(Bytes(DEVICE_LIMIT - 1))
"""Size of the largest device: it has less than 2^63 bytes."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One line of a table. place: its position in the text, ignored in comparisons."""

    start: Sectors
    length: Sectors
    target: TargetSpec
    place: Place = field(default_factory=Place, compare=False)

    @property
    def end(self) -> Sectors:
        """The first sector after the segment."""
        return Sectors(self.start + self.length)


class Table(msgspec.Struct, frozen=True):
    """Segments in order. Without segments, it is the table of a device of size 0, which has no text form. Raises
    TableError unless the segments are contiguous from 0, none is empty, and the device is smaller than 2^63 bytes; a
    singleton target must be the only one.
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
        """The size of the device."""
        return self.segments[-1].end if self.segments else Sectors(0)


def check_range(start: Sectors, length: Sectors, expected: Sectors, *, start_place: Place, length_place: Place) -> None:
    """Raises TableError for a segment that does not begin at `expected`, is empty, or makes the device 2^63 bytes or
    larger.
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
    """Raises TableError if a table with the singleton `target` has more than one segment."""
    if segments > 1:
        raise TableError(
            f"target type {target} must appear alone in table",
            place=place,
            value=target,
            cure="make it a device of its own and put a linear segment on that",
        )
