"""Tables to text: `parse(format_table(x)) == x`."""

from __future__ import annotations

from blkloom.table.segments import Segment, Table
from blkloom.table.words import join_words


def format_table(table: Table) -> str:
    """The table in dmsetup's form, a line a segment, without a newline at the end.

    Raises TableError for a path that no table can hold (see `join_words`).
    """
    return "\n".join(map(format_segment, table.segments))


def format_segment(segment: Segment) -> str:
    """One line."""
    target = segment.target
    return join_words([str(segment.start), str(segment.length), target.name, *target.format()])
