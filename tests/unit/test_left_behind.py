"""Checks for descriptors that a test has left: what they notice, and what they do not take for a leak."""

from __future__ import annotations

import gc
import os

import pytest

import left_behind
from left_behind import no_descriptor_left


class Circle:
    """An object that only a garbage collection frees, with a descriptor."""

    def __init__(self) -> None:
        self.itself = self
        self.descriptor = os.open(os.devnull, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


def test_a_descriptor_that_stays_open_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_behind, "LONGEST_END", 0)
    with pytest.raises(AssertionError) as caught, no_descriptor_left():
        open_one = os.open(os.devnull, os.O_RDONLY)
    os.close(open_one)
    assert f"Descriptor(number={open_one}, target='/dev/null')" in str(caught.value)


def test_garbage_of_earlier_tests_may_be_collected_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_behind, "LONGEST_END", 0)
    earlier = [Circle()]
    with no_descriptor_left():
        earlier.clear()
        gc.collect()


def test_garbage_of_the_test_itself_is_collected_if_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_behind, "LONGEST_END", 0)
    with no_descriptor_left(collect=True):
        Circle()
