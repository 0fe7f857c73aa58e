"""The words of one table line behind the target's name, read left to right.

A target's `parse` takes what it needs and calls `finish`; every complaint carries the word's
place, its value and the target's syntax as the cure. No I/O here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from blkloom.errors import Place, TableError
from blkloom.units import DEVICE_LIMIT, SECTOR, Sectors

_MOST_DIGITS: Final = 40


class Word(msgspec.Struct, frozen=True):
    """One word of a table after escapes were undone, and where it stood."""

    text: str
    place: Place


def decimal(text: str) -> int | None:
    """The whole number that ASCII digits write (from 10^40 on: 10^40); None for any other text."""
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0") or "0"
    # int() refuses, and takes long over, thousands of digits: so large, only the size matters.
    return int(digits) if len(digits) <= _MOST_DIGITS else 10**_MOST_DIGITS


class Arguments:
    """A cursor over words. syntax: the target's arguments as its documentation writes them."""

    def __init__(self, words: Sequence[Word], *, target: str, syntax: str, end: Place) -> None:
        self._words = list(words)
        self._next = 0
        self._end = end
        self.target = target
        self.syntax = syntax

    @property
    def remaining(self) -> int:
        """Words not taken yet."""
        return len(self._words) - self._next

    @property
    def place(self) -> Place:
        """Where the next word stands (or would)."""
        return self._words[self._next].place if self.remaining else self._end

    def error(self, what: str, *, value: str = "", cure: str = "", place: Place | None = None) -> TableError:
        """A TableError at `place`, else at the last word taken; its default cure is the syntax."""
        at = place or (self._words[self._next - 1].place if self._next else self.place)
        return TableError(what, place=at, value=value, cure=cure or f"write: {self.target} {self.syntax}".rstrip())

    def word(self, what: str) -> str:
        """The next word as it is. what: its name in the syntax, for the error."""
        if not self.remaining:
            raise self.error(f"Invalid argument count: {what} is missing", place=self._end)
        self._next += 1
        return self._words[self._next - 1].text

    def integer(self, what: str, *, least: int = 0, most: int = DEVICE_LIMIT - 1) -> int:
        """The next word as a decimal number; junk after it is refused, as dm-loop does."""
        text = self.word(what)
        if (number := decimal(text)) is None:
            raise self.error(f"Invalid {what}: not a whole number", value=text)
        if not least <= number <= most:
            raise self.error(f"Invalid {what}: must be from {least} to {most}", value=text)
        return number

    def sectors(self, what: str, *, least: int = 0) -> Sectors:
        """The next word as a number of sectors."""
        return Sectors(self.integer(what, least=least, most=(DEVICE_LIMIT - 1) // SECTOR))

    def options(self) -> list[str]:
        """`<#opts> <opts...>` at the end of a line: [] when absent. The count must be right."""
        if not self.remaining:
            return []
        count = self.integer("number of options")
        if count != self.remaining:
            raise self.error(
                f"Invalid argument count: {count} options announced, {self.remaining} given", value=str(count)
            )
        return [self.word("option") for _ in range(count)]

    def finish(self) -> None:
        """Every word must have been taken."""
        if self.remaining:
            extra = self._words[self._next]
            raise self.error(
                "Invalid argument count: more words than the target takes", value=extra.text, place=extra.place
            )
