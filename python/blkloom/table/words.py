r"""Words of a table line: split at white space, with `\` making the next character literal.

That is the kernel's dm_split_args, after dmsetup has cut comments. Where we are stricter or kinder
than they are is listed in docs/tables.md. White space is C's isspace in ASCII; other white space,
such as U+00A0, is part of a word. Names that are not UTF-8 come as surrogateescape characters.
Pure functions; what can fail says so and raises TableError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

from blkloom.errors import Place, TableError
from blkloom.table.arguments import Word

Places = Callable[[int], Place]
"""Callable that gives the place of an index into a text."""

_BLANK: Final = r" \t\v\f\r"
_CONTROL: Final = r"\x00-\x08\x0e-\x1f\x7f"
_NO_BYTES: Final = r"\ud800-\udc7f\udd00-\udfff"  # surrogates that surrogateescape never makes

_GAP: Final = re.compile(rf"[{_BLANK}]*")
_RAW_WORD: Final = re.compile(rf"[^{_BLANK}\n]+")
_WORD: Final = re.compile(rf"(?:[^{_BLANK}\n\\#{_CONTROL}{_NO_BYTES}]|\\[^\n\0{_NO_BYTES}])+")
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)
_NEEDS_ESCAPE: Final = re.compile(rf"([{_BLANK}\\#{_CONTROL}])")
_IMPOSSIBLE: Final = re.compile(rf"[\0\n{_NO_BYTES}]")


def skip_blanks(text: str, at: int, end: int) -> int:
    """The first index from `at` on that is not white space, or `end`."""
    found = _GAP.match(text, at, end)
    return found.end() if found else at


def raw_word(text: str, at: int, end: int) -> str:
    r"""The word at `at`, in which neither `\` nor `#` means anything; "" when there is none."""
    found = _RAW_WORD.match(text, at, end)
    return found[0] if found else ""


def split_words(text: str, at: int, end: int, places: Places) -> tuple[list[Word], int]:
    r"""The words of `text[at:end]`, one line at most, up to a `#`; and the index behind the last.

    Raises TableError for a `\` with nothing behind it, and for characters no word can hold.
    """
    words = []
    behind = at
    at = skip_blanks(text, at, end)
    while at < end and text[at] != "#":
        found = _WORD.match(text, at, end)
        behind = found.end() if found else at
        if behind < end and text[behind] not in " \t\v\f\r#":
            raise _unfit(text, behind, end, places)
        word = text[at:behind]
        words.append(Word(_ESCAPED.sub(r"\1", word) if "\\" in word else word, places(at)))
        at = skip_blanks(text, behind, end)
    return words, behind


def join_words(words: Iterable[str], place: Place) -> str:
    """The words as a line that splits into the same words. Raises TableError, at `place`, for words that a table cannot
    represent: empty ones, and those with a NUL, a newline or a surrogate that stands for no byte.
    """
    return " ".join([_escape(word, place) for word in words])


def require_raw(word: str, what: str, place: Place) -> str:
    """Returns `word` if `raw_word` parses it unchanged; otherwise raises a TableError. what: its name in the error."""
    if _RAW_WORD.fullmatch(word) is None or _IMPOSSIBLE.search(word):
        raise TableError(f"a table cannot hold this {what}", place=place, value=word, cure="make it one plain word")
    return word


def _unfit(text: str, at: int, end: int, places: Places) -> TableError:
    """The reason why a word cannot contain the character at `at`."""
    character = text[at]
    if character == "\\":
        if at + 1 == end:
            return TableError(
                "nothing follows the backslash",
                place=places(at),
                value="\\",
                cure="write \\\\ for a backslash itself; a line cannot go on in the next",
            )
        at += 1
        character = text[at]
    if character == "\0":
        return TableError("a table cannot hold a NUL character", place=places(at), value=character, cure="remove it")
    if "\ud800" <= character <= "\udfff":
        return TableError(
            "not a character: no file name can hold it",
            place=places(at),
            value=character,
            cure="decode text with errors='surrogateescape'",
        )
    return TableError(
        "control character in a table",
        place=places(at),
        value=character,
        cure="remove it, or put a backslash before it if a name really has it",
    )


def _escape(word: str, place: Place) -> str:
    if not word:
        raise TableError("a table cannot hold an empty word", place=place, cure="leave the argument out")
    if found := _IMPOSSIBLE.search(word):
        what = {"\0": "a NUL character", "\n": "a newline"}.get(found[0], "a surrogate that stands for no byte")
        raise TableError(f"a table cannot hold {what}", place=place, value=word, cure="rename the file, or link to it")
    return _NEEDS_ESCAPE.sub(r"\\\1", word)
