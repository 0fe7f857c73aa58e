"""Tables in dmsetup's format: parser and printer. Pure: no file is opened.

Every error is a TableError with source, line, column, value and remedy.
"""

from blkloom.table.concise import ConciseDevice, format_concise, parse_concise, split_concise
from blkloom.table.parse import parse_table
from blkloom.table.printing import format_table
from blkloom.table.segments import Segment, Table

__all__ = [
    "ConciseDevice",
    "Segment",
    "Table",
    "format_concise",
    "format_table",
    "parse_concise",
    "parse_table",
    "split_concise",
]
