"""Checks that what a test does leaves no descriptor and no thread in the process of the tests.

Objects of earlier tests may be collected at any moment, and close descriptors then. Therefore the checks look for new
descriptors, and do not compare how many are open.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

_T = TypeVar("_T")
LONGEST_END = 30.0
"""Seconds in which threads that are ending end, and close what they have open."""


class Descriptor(NamedTuple):
    """An open descriptor of this process."""

    number: int
    target: str
    """Path, or kind and inode number of a socket or pipe."""


def open_descriptors() -> set[Descriptor]:
    """All of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own, or closed by another thread since
            continue
        found.add(Descriptor(int(name), target.removesuffix(" (deleted)")))
    return found


def running_threads() -> set[int]:
    """Ids of all threads of this process, also those that Python does not know."""
    return {int(name) for name in os.listdir("/proc/self/task")}


@contextmanager
def no_descriptor_left(*, beyond: int = 0, collect: bool = False) -> Iterator[None]:
    """No descriptor more is open after the block. beyond: how many may be. collect: objects that refer to each other
    may have descriptors until they are collected.
    """
    gc.collect()  # a leak is not noticed if it gets the number of a descriptor of the same file
    before = open_descriptors()
    yield
    left = _new(open_descriptors, before, most=beyond, collect=collect)
    assert len(left) <= beyond, f"left open: {sorted(left)}"


@contextmanager
def no_thread_left() -> Iterator[None]:
    """No thread more runs after the block."""
    before = running_threads()
    yield
    left = _new(running_threads, before, most=0, collect=True)
    assert not left, f"threads that still run: {sorted(left)}"


def _new(found: Callable[[], set[_T]], before: set[_T], *, most: int, collect: bool) -> set[_T]:
    """What was not there before, as soon as it is at most that many."""
    deadline = time.monotonic() + LONGEST_END
    while True:
        if collect:
            gc.collect()
        new = found() - before
        if len(new) <= most or time.monotonic() > deadline:
            return new
