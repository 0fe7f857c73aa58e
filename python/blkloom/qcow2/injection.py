"""Faults on purpose, for tests: the next operations of a kind fail, of whatever image of a chain.

Only a table with the option `fault_injection` has one. Its storage (`watched.py`) asks, and the target, for requests of
clients: while these are to fail, the engine asks for each. Any thread.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import Final, Literal, get_args

Injected = Literal["metadata_reads", "metadata_writes", "syncs", "allocations", "data_reads", "data_writes"]
INJECTED: Final[tuple[Injected, ...]] = get_args(Injected)


class Injection:
    """Nothing fails at first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: dict[Injected, tuple[int, int]] = {}

    def arm(self, kind: Injected, number: int, count: int) -> None:
        """The next `count` operations fail with the errno; 0 for none, in place of what was said before."""
        with self._lock:
            self._armed[kind] = (number, count)

    def disarm(self) -> None:
        """Nothing fails any more."""
        with self._lock:
            self._armed.clear()

    def armed(self, kind: Injected) -> bool:
        """Whether the next operation fails."""
        with self._lock:
            return self._armed.get(kind, (0, 0))[1] > 0

    def meet(self, kind: Injected, path: str) -> None:
        """An operation begins. Raises OSError if it is to fail."""
        with self._lock:
            number, left = self._armed.get(kind, (0, 0))
            if left <= 0:
                return
            self._armed[kind] = (number, left - 1)
        raise OSError(number, f"{os.strerror(number)} (injected)", path)


def errno_named(word: str) -> int | None:
    """`ENOSPC`, or a number that has a name; None for anything else."""
    if word.isascii() and word.isdigit():
        return int(word) if len(word) < 5 and int(word) in errno.errorcode else None
    return next((number for number, name in errno.errorcode.items() if name == word), None)
