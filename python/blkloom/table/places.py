"""Converts an index into a text to line and column. Immutable."""

from __future__ import annotations

from bisect import bisect_right

from blkloom.errors import Place


class LinePlaces:
    """Callable that gives the Place of an index: line and column (in characters), counted from 1."""

    def __init__(self, text: str, source: str) -> None:
        """source: name of the text in errors."""
        self._source = source
        self._starts = [0]
        at = text.find("\n")
        while at >= 0:
            self._starts.append(at + 1)
            at = text.find("\n", at + 1)

    def __call__(self, index: int) -> Place:
        """The place of `index`; the length of the text is a valid index, too."""
        line = bisect_right(self._starts, index)
        return Place(self._source, line, index - self._starts[line - 1] + 1)
