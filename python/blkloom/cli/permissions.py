"""Parses permission bits on the command line."""

from __future__ import annotations

import click


def permission_bits(text: str) -> int:
    """An octal number, as of chmod(1). Raises click.BadParameter."""
    try:
        bits = int(text, 8)
    except ValueError:
        bits = -1
    if not 0 <= bits <= 0o777:
        raise click.BadParameter(f"'{text}' is not an octal number from 0 to 777")
    return bits
