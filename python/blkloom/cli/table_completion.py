"""Shell completion of tables and names of targets: what follows from the arguments that target specs declare."""

from __future__ import annotations

import os
import re
from typing import Final

import click
from click.shell_completion import CompletionItem

from blkloom.errors import Place, TableError, UnknownTarget

_WORD: Final = re.compile(r"(?:\\.|\S)+")
_BEFORE_TARGET: Final = 2
"""Words of a line: start and length."""


def complete_table(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The table with its next word: the target, a path, or an option. Only for a table of one line, because a shell
    takes each line of the answer for another completion.
    """
    from blkloom.table.syntax import next_words
    from blkloom.targets.registry import all_targets

    if "\n" in incomplete:
        return []
    given = _WORD.findall(incomplete)
    word = given.pop() if given and incomplete.endswith(given[-1]) else ""
    targets = all_targets()
    choices: list[str] = []
    if len(given) == _BEFORE_TARGET:
        choices = targets.names()
    elif len(given) > _BEFORE_TARGET:
        try:
            spec = targets.find(given[_BEFORE_TARGET])
        except UnknownTarget:
            return []
        choices, is_path = next_words(spec.arguments, given[_BEFORE_TARGET + 1 :])
        if is_path:
            choices = _paths(word)
    before = incomplete.removesuffix(word)
    return [CompletionItem(before + choice) for choice in choices if choice.startswith(word)]


def complete_targets(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of targets."""
    from blkloom.targets.registry import all_targets

    return [CompletionItem(name) for name in all_targets().names() if name.startswith(incomplete)]


def _paths(word: str) -> list[str]:
    """The files that begin as the word does, as words of a table."""
    from blkloom.table.words import join_words

    folder, start = os.path.split(re.sub(r"\\(.)", r"\1", word))
    found: list[str] = []
    try:
        for name in sorted(os.listdir(folder or ".")):
            if name.startswith(start) and (start or not name.startswith(".")):
                path = os.path.join(folder, name)
                found.append(join_words([path + "/" * os.path.isdir(path)], Place()))
    except (OSError, ValueError, TableError):  # a name with a newline cannot be in a table
        return found
    return found
