"""A table: contiguous segments from sector 0, each with its target. Pure values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blkloom.errors import Place, TableError
from blkloom.units import DEVICE_LIMIT, SECTOR, Sectors

if TYPE_CHECKING:
    from blkloom.target.base import Target


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


@dataclass(frozen=True, slots=True)
class Table:
    """Segments in order. Raises TableError unless they are contiguous from 0, none is empty, and
    the device stays below 2^63 bytes; a singleton target must be alone.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        check_segments(self.segments)

    @property
    def length(self) -> Sectors:
        """The device's size."""
        return self.segments[-1].end


def check_segments(segments: Sequence[Segment]) -> None:
    """Raises the TableError that `Table` promises."""
    if not segments:
        raise TableError("a table needs at least one segment", cure="write: <start> <length> <target> <arguments>")
    expected = Sectors(0)
    for segment in segments:
        if segment.start != expected:
            what = "segments overlap" if segment.start < expected else "gap between segments"
            if not expected:
                what = "the first segment must start at sector 0"
            raise TableError(what, place=segment.place, value=str(segment.start), cure=f"start it at {expected}")
        if segment.length <= 0:
            raise TableError(
                "a segment needs a length of at least one sector", place=segment.place, value=str(segment.length)
            )
        if segment.end * SECTOR >= DEVICE_LIMIT:
            raise TableError(
                "the device would reach 2^63 bytes",
                place=segment.place,
                value=str(segment.length),
                cure=f"a device has {(DEVICE_LIMIT - 1) // SECTOR} sectors at most",
            )
        if segment.target.singleton and len(segments) > 1:
            raise TableError(
                "this target must be the only line of its table",
                place=segment.place,
                value=segment.target.name,
                cure="put the other segments into a device of their own and stack it with linear",
            )
        expected = segment.end
