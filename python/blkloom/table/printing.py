"""Printer for tables: `parse_table(format_table(x)) == x`."""

from __future__ import annotations

from blkloom.table.segments import Segment, Table
from blkloom.table.words import join_words, require_raw


def format_table(table: Table) -> str:
    """The table in dmsetup's format, one line per segment, without a newline at the end.

    Raises TableError, at the segment's place, for a name that a table cannot represent: an empty one, or one with a
    newline, a NUL, or a surrogate that stands for no byte.
    """
    return "\n".join(map(format_segment, table.segments))


def format_segment(segment: Segment) -> str:
    """One line. Raises TableError as `format_table`."""
    target = segment.target
    head = f"{segment.start} {segment.length} {require_raw(target.name, 'target name', segment.place)}"
    arguments = join_words(target.format(), segment.place)
    return f"{head} {arguments}" if arguments else head
