"""Flags at the end of a table line: `<#opts> <opts...>`, each a word of its own, at most once."""

from __future__ import annotations

from collections.abc import Sequence

from blkloom.table.arguments import Arguments


def parse_options(arguments: Arguments, known: Sequence[str]) -> dict[str, bool]:
    """Takes what remains of the line as flags: every known flag and whether it was given.

    Raises TableError for a wrong count, an unknown flag or one given twice.
    """
    found = dict.fromkeys(known, False)
    for option in arguments.options():
        if option not in found:
            raise arguments.error("unknown option", value=option, cure=f"options are: {', '.join(known)}")
        if found[option]:
            raise arguments.error("option given twice", value=option, cure="give it once")
        found[option] = True
    return found
