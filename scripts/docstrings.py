"""Checks the first words of module docstrings: `docstrings.py`, for `make lint`.

The first line of a module says what the module is or does: a noun phrase, or a verb phrase with its object. It does not
begin with a word that refers to something else (a question word, a pronoun, a preposition), and it is not empty. Prints
what is wrong; exit code 1.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
FOLDERS: Final = ("python/blkloom", "scripts", "bench", "fuzz")
_REFERRING: Final = re.compile(
    r"(?:what|who|whoever|whose|which|where|when|why|how|whether|if|because|while|until|once"
    r"|it|its|this|that|these|those|they|their|there|here"
    r"|of|for|from|in|on|at|by|with|without|under|over|to|as|like|and|but|so|not)(?=[\s,.:;'])",
    re.IGNORECASE,
)


def complaint(source: str) -> str:
    """What is wrong with the first line of a module's docstring; "" if it is right."""
    docstring = ast.get_docstring(ast.parse(source))
    if not docstring or not docstring.strip():
        return "is missing"
    first = docstring.strip().split("\n", 1)[0]
    if word := _REFERRING.match(first):
        return f"begins with '{word[0]}': say first what the module is or does"
    return ""


def complaints(files: Iterable[Path]) -> list[str]:
    """What is wrong, a line for each module."""
    found = [(path, complaint(path.read_text(encoding="utf-8"))) for path in sorted(files)]
    return [f"{path}: its docstring {what}" for path, what in found if what]


if __name__ == "__main__":
    wrong = complaints(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    print(*wrong, sep="\n", end="\n" if wrong else "")
    sys.exit(bool(wrong))
