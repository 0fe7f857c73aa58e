"""Where an index into a text is: its line and column. Immutable once made."""

from __future__ import annotations

from bisect import bisect_right

from blkloom.errors import Place


class LinePlaces:
    """Call it with an index: the Place, lines and columns (in characters) counted from 1."""

    def __init__(self, text: str, source: str) -> None:
        """source: what errors call the text."""
        self._source = source
        self._starts = [0]
        at = text.find("\n")
        while at >= 0:
            self._starts.append(at + 1)
            at = text.find("\n", at + 1)

    def __call__(self, index: int) -> Place:
        """The place of `index`; the text's length is a place too."""
        line = bisect_right(self._starts, index)
        return Place(self._source, line, index - self._starts[line - 1] + 1)
