"""Seeds of random choices: given, from the environment, or new ones."""

from __future__ import annotations

import os
import random
from typing import Final

from blkloom.errors import UsageError

VARIABLE: Final = "BLKLOOM_SEED"
"""Environment variable with the seed of all disks and tests that are given none."""
_BITS: Final = 32


def parse_seed(text: str, source: str) -> int:
    """A seed as a number. source: of the text, for errors. Raises UsageError."""
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 64:
        raise UsageError(f"{source}: '{text}' is no seed", cure="give a whole number below 2^64")
    return int(text)


def choose_seed(given: int | None = None) -> int:
    """The given seed, or that of the environment variable BLKLOOM_SEED, or another one each time. Raises UsageError."""
    if given is not None:
        return parse_seed(str(given), "seed")
    if text := os.environ.get(VARIABLE):
        return parse_seed(text, VARIABLE)
    return random.SystemRandom().getrandbits(_BITS)
