"""Memory that files on tmpfs can have at once.

A virtual machine may give free memory back to its host within a tenth of a second, and a page that has to be fetched
from there again costs up to forty times what writing to it does: filling a file would measure that. So a reserve is
written beside the file that is to grow, and let go of just ahead of it, from when it begins to.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_HUGE_PAGE: Final = 2 << 20
_AHEAD: Final = 128 << 20
"""Bytes let go of ahead: enough for whoever fills gigabytes a second, and soon enough used for the host not to have
them before.
"""
_METADATA: Final = 32 << 20
"""Bytes that a file takes beyond what is in it."""
_TURN_SECONDS: Final = 0.003


@contextmanager
def reserved(growing: Path, size: int) -> Iterator[None]:
    """Memory for `growing` to take up to `size` bytes more than it has, kept beside it. Raises OSError."""
    path = growing.with_name("reserve")
    with path.open("xb", buffering=0) as file:
        whole = size + _METADATA
        for _ in range(0, whole, _HUGE_PAGE):  # written, not only allocated: else it may still be the host's
            file.write(bytes(_HUGE_PAGE))
        over = threading.Event()
        thread = threading.Thread(target=_let_go, args=(file.fileno(), growing, whole, over))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            path.unlink()


def _let_go(reserve: int, growing: Path, left: int, over: threading.Event) -> None:
    before = growing.stat().st_blocks
    while not over.wait(_TURN_SECONDS):
        grown = (growing.stat().st_blocks - before) * 512
        if not grown:
            continue
        rest = max(left - grown - _AHEAD, 0) // _HUGE_PAGE * _HUGE_PAGE
        if rest < os.fstat(reserve).st_size:
            os.ftruncate(reserve, rest)
