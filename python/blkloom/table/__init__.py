"""Tables: the text `dmsetup` reads, as values and back. Pure: nothing is opened here.

Every complaint is a TableError that names source, line, column, value and cure.
"""

from blkloom.table.concise import ConciseDevice, format_concise, parse_concise, split_concise
from blkloom.table.parse import parse
from blkloom.table.printing import format_table
from blkloom.table.segments import Segment, Table

__all__ = [
    "ConciseDevice",
    "Segment",
    "Table",
    "format_concise",
    "format_table",
    "parse",
    "parse_concise",
    "split_concise",
]
