r"""Words of a table line: split at white space, with `\` making the next character literal.

That is what the kernel's dm_split_args does, after dmsetup has cut comments (from an unescaped `#`
on) and white space at both ends. Escaping a `#` is ours: dmsetup cannot write one in a table.
White space is C's isspace in ASCII. NUL and an escaped end of line cannot be in a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

from blkloom.errors import Place, TableError
from blkloom.table.arguments import Word

_WORD: Final = re.compile(r"(?:\\.|[^ \t\v\f\r\\#])+", re.DOTALL)
_SPACE: Final = re.compile(r"[ \t\v\f\r]*")
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)
_SPECIAL: Final = re.compile(r"([ \t\v\f\r\\#])")


def split_words(line: str, place: Callable[[int], Place]) -> list[Word]:
    """The words of one line (no newline in it). place: of an index into the line. Raises TableError."""
    if (nul := line.find("\0")) >= 0:
        raise TableError("a table cannot hold a NUL character", place=place(nul), cure="remove it")
    words = []
    at = _end_of_space(line, 0)
    while at < len(line) and line[at] != "#":
        found = _WORD.match(line, at)
        if found is None or (found.end() < len(line) and line[found.end()] == "\\"):
            at = found.end() if found else at
            raise TableError(
                "nothing follows the backslash", place=place(at), value="\\", cure="write \\\\ for a backslash itself"
            )
        text = found[0]
        words.append(Word(_ESCAPED.sub(r"\1", text) if "\\" in text else text, place(at)))
        at = _end_of_space(line, found.end())
    return words


def _end_of_space(line: str, at: int) -> int:
    found = _SPACE.match(line, at)
    return found.end() if found else at


def join_words(words: Iterable[str]) -> str:
    """The words as one line that splits into them again. Raises TableError for words no table can
    hold: empty ones, and those with a NUL or a newline.
    """
    return " ".join(map(_escape, words))


def _escape(word: str) -> str:
    for bad, name in (("\0", "a NUL character"), ("\n", "a newline")):
        if bad in word:
            raise TableError(f"a table cannot hold {name}", value=word, cure="rename the file or link to it")
    if not word:
        raise TableError("a table cannot hold an empty word", cure="leave the argument out")
    return _SPECIAL.sub(r"\\\1", word)
