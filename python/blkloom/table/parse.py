"""Text to tables, as dmsetup reads it.

Lines `<start> <length> <target> <arguments>`; blank lines and comments count for nothing. Errors
are TableErrors with source, line and column, the value and the cure. Pure: no file is opened.
Source: dmsetup(8) TABLE FORMAT, and libdevmapper's and the kernel's parsers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from blkloom.errors import Place, TableError
from blkloom.table.arguments import Arguments, Word
from blkloom.table.segments import Segment, Table
from blkloom.table.words import split_words
from blkloom.units import Sectors

if TYPE_CHECKING:
    from blkloom.target.base import Target

_LINE = "<start> <length> <target> <arguments>"
_LONGEST_NUMBER = 20  # digits; 2^64 has as many


class Targets(Protocol):
    """Where target classes are found."""

    def find(self, name: str, *, place: Place | None = None) -> type[Target]:
        """The class of that name. Raises UnknownTarget."""


def parse(text: str, *, targets: Targets, source: str = "table") -> Table:
    """The table that `text` describes. source: what errors call the text. Raises TableError."""
    segments = []
    for number, line in enumerate(text.split("\n"), 1):
        segment = parse_line(line, targets=targets, place=_place_in_line(source, number))
        if segment is not None:
            segments.append(segment)
    if not segments:
        raise TableError("the table is empty", place=Place(source), cure=f"write: {_LINE}")
    return Table(tuple(segments))


def _place_in_line(source: str, number: int) -> Callable[[int], Place]:
    return lambda index: Place(source, number, index + 1)


def parse_line(line: str, *, targets: Targets, place: Callable[[int], Place]) -> Segment | None:
    """One line's segment; None for blank lines and comments. place: of an index into the line."""
    words = split_words(line, place)
    if not words:
        return None
    if len(words) < 3:
        raise TableError("a line needs at least start, length and target", place=place(len(line)), cure=f"write: {_LINE}")
    start, length = _sectors(words[0], "start"), _sectors(words[1], "length")
    if length == 0:
        raise TableError(
            "a segment needs a length of at least one sector", place=words[1].place, value="0", cure="lengths are sectors of 512 bytes"
        )
    cls = targets.find(words[2].text, place=words[2].place)
    target = parse_target(cls, words[3:], end=place(len(line)))
    return Segment(start, length, target, words[0].place)


def parse_target(cls: type[Target], words: Sequence[Word], *, end: Place) -> Target:
    """A target from its arguments; every word must be taken. end: behind the last word."""
    arguments = Arguments(words, target=cls.name, syntax=cls.syntax, end=end)
    target = cls.parse(arguments)
    arguments.finish()
    return target


def _sectors(word: Word, what: str) -> Sectors:
    if not (word.text.isascii() and word.text.isdigit()):
        raise TableError(
            f"{what} is not a number of sectors", place=word.place, value=word.text, cure=f"write: {_LINE}"
        )
    if len(word.text) > _LONGEST_NUMBER:
        raise TableError(f"{what} is larger than any device", place=word.place, value=word.text)
    return Sectors(int(word.text))
