"""The arguments of a target in a table line, read from left to right.

`parse` of a target takes the words that it needs and calls `finish`. Every error has the place of the word, its value,
and the syntax of the target as the cure. No I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from blkloom.errors import Place, TableError
from blkloom.units import DEVICE_LIMIT, SECTOR, Sectors

_MOST_DIGITS: Final = 40


class Word(msgspec.Struct, frozen=True):
    """One word of a table without escapes, and its place."""

    text: str
    place: Place


def decimal(text: str) -> int | None:
    """The whole number in ASCII digits (10^40 for all numbers from 10^40 on); None for any other text."""
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0") or "0"
    # int() refuses numbers with thousands of digits, or is slow; only the magnitude matters here.
    return int(digits) if len(digits) <= _MOST_DIGITS else 10**_MOST_DIGITS


class Arguments:
    """A cursor over the words of a line. syntax: the target's arguments, as in its documentation."""

    def __init__(self, words: Sequence[Word], *, target: str, syntax: str, end: Place) -> None:
        self._words = list(words)
        self._next = 0
        self._end = end
        self.target = target
        self.syntax = syntax

    @property
    def remaining(self) -> int:
        """Number of words that were not taken yet."""
        return len(self._words) - self._next

    @property
    def place(self) -> Place:
        """The place of the next word, or of the end of the line."""
        return self._words[self._next].place if self.remaining else self._end

    def error(self, what: str, *, value: str = "", cure: str = "", place: Place | None = None) -> TableError:
        """A TableError at `place`, or at the last taken word; its default remedy is the syntax."""
        at = place or (self._words[self._next - 1].place if self._next else self.place)
        return TableError(what, place=at, value=value, cure=cure or f"write: {self.target} {self.syntax}".rstrip())

    def word(self, what: str) -> str:
        """Takes the next word unchanged. what: its name in the syntax, for the error."""
        if not self.remaining:
            raise self.error(f"Invalid argument count: {what} is missing", place=self._end)
        self._next += 1
        return self._words[self._next - 1].text

    def peek(self) -> str:
        """The next word, which is not taken; "" at the end of the line."""
        return self._words[self._next].text if self.remaining else ""

    def integer(self, what: str, *, least: int = 0, most: int = DEVICE_LIMIT - 1) -> int:
        """Takes the next word as a decimal number; trailing characters are refused, as in dm-loop."""
        text = self.word(what)
        if (number := decimal(text)) is None:
            raise self.error(f"Invalid {what}: not a whole number", value=text)
        if not least <= number <= most:
            raise self.error(f"Invalid {what}: must be from {least} to {most}", value=text)
        return number

    def sectors(self, what: str, *, least: int = 0) -> Sectors:
        """Takes the next word as a number of sectors."""
        return Sectors(self.integer(what, least=least, most=(DEVICE_LIMIT - 1) // SECTOR))

    def options(self) -> list[str]:
        """Takes `<#opts> <opts...>` at the end of a line: [] if absent. The count must be right."""
        if not self.remaining:
            return []
        count = self.integer("number of options")
        if count != self.remaining:
            raise self.error(
                f"Invalid argument count: {count} options announced, {self.remaining} given", value=str(count)
            )
        return [self.word("option") for _ in range(count)]

    def finish(self) -> None:
        """Checks that every word was taken."""
        if self.remaining:
            extra = self._words[self._next]
            raise self.error(
                "Invalid argument count: more words than the target takes", value=extra.text, place=extra.place
            )
