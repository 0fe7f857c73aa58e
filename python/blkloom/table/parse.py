"""Parser for tables in dmsetup's format.

Lines are `<start> <length> <target> <arguments>`; blank lines and comments are ignored. Errors are TableErrors with
source, line and column, the value and the remedy; only the first faulty line is reported. Pure: no file is opened.
Source: dmsetup(8) TABLE FORMAT, and the rules of dmsetup's and the kernel's parsers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from blkloom.errors import BlkloomError, Place, TableError
from blkloom.printing import described
from blkloom.table.arguments import Arguments, Word, decimal
from blkloom.table.places import LinePlaces
from blkloom.table.segments import LINE_FORM, MOST_SECTORS, Segment, Table, check_alone, check_range
from blkloom.table.words import Places, raw_word, skip_blanks, split_words
from blkloom.units import Sectors

if TYPE_CHECKING:
    from blkloom.targets.spec import TargetSpec

_HEAD_WORDS: Final = 3  # start, length, target


class Targets(Protocol):
    """Lookup of target classes."""

    def find(self, name: str, *, place: Place | None = None) -> type[TargetSpec]:
        """The class with that name. Raises UnknownTarget."""


class _Line(NamedTuple):
    """A line with a segment: its first three words, and the range of its arguments in the text."""

    start: Word
    length: Word
    target: Word
    at: int
    end: int


def parse_table(text: str, *, targets: Targets, source: str = "table") -> Table:
    """Parses the table in `text`: the argument of `--table`, a file or standard input.

    text: bytes that are not UTF-8 are surrogateescape characters (`os.fsdecode`). source: name of the text in errors.
    Raises TableError.
    """
    return read_table(text, targets=targets, places=LinePlaces(text, source))


def read_table(text: str, *, targets: Targets, places: Places) -> Table:
    """As `parse_table`; places: gives the place of an index into `text`. Raises TableError."""
    segments: list[Segment] = []
    expected = Sectors(0)
    alone: Word | None = None
    classes: dict[str, type[TargetSpec]] = {}
    for line in _lines(text, places):
        start, length = _sectors(line.start, "start"), _sectors(line.length, "length")
        check_range(start, length, expected, start_place=line.start.place, length_place=line.length.place)
        cls = classes.get(line.target.text)
        if cls is None:
            cls = classes[line.target.text] = targets.find(line.target.text, place=line.target.place)
        if alone is None and cls.singleton:
            alone = line.target
        if alone is not None:
            check_alone(alone.text, len(segments) + 1, alone.place)
        segment = Segment(start, length, _target(cls, text, line, places), line.start.place)
        segments.append(segment)
        expected = segment.end
    if not segments:
        raise TableError("the table is empty", place=places(0), cure=f"write: {LINE_FORM}")
    return Table(tuple(segments))


def _lines(text: str, places: Places) -> Iterator[_Line]:
    """The lines that are neither blank nor a comment. Raises TableError for a line with too few words."""
    behind = -1
    while behind < len(text):
        at = behind + 1
        behind = text.find("\n", at)
        if behind < 0:
            behind = len(text)
        at = first = skip_blanks(text, at, behind)
        if at == behind or text[at] == "#":
            continue
        head = []
        for _ in range(_HEAD_WORDS):
            word = raw_word(text, at, behind)
            if not word:
                shown = text[first:behind].rstrip()
                raise TableError(
                    "a line needs at least start, length and target",
                    place=places(at),
                    value=shown,
                    cure=f"write: {LINE_FORM}",
                )
            head.append(Word(word, places(at)))
            after = at + len(word)
            at = skip_blanks(text, after, behind)
        yield _Line(head[0], head[1], head[2], after, behind)


def _sectors(word: Word, what: str) -> Sectors:
    number = decimal(word.text)
    if number is None:
        raise TableError(
            f"{what} is not a number of sectors", place=word.place, value=word.text, cure=f"write: {LINE_FORM}"
        )
    if number > MOST_SECTORS:
        raise TableError(
            f"{what} is larger than any device: it would reach 2^63 bytes",
            place=word.place,
            value=word.text,
            cure=f"a device has {MOST_SECTORS} sectors at most",
        )
    return Sectors(number)


def _target(cls: type[TargetSpec], text: str, line: _Line, places: Places) -> TargetSpec:
    """Parses the target of a line; every word must be taken. Raises TableError, also for other exceptions of
    `parse`.
    """
    words, behind = split_words(text, line.at, line.end, places)
    arguments = Arguments(words, target=cls.name, syntax=cls.syntax, end=places(behind))
    try:
        target = cls.parse(arguments)
    except BlkloomError:
        raise
    except Exception as error:  # a user's target may raise anything
        raise arguments.error(f"target {cls.name} failed to parse its arguments: {described(error)}") from error
    arguments.finish()
    return target
