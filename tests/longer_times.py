"""Decorator for tests of short timeouts: if the machine was too slow, they run again with longer timeouts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import pytest


class TooSlow(Exception):
    """Something had not happened when the time was over in which the test needed it: it has shown nothing."""


def with_longer_times(*times: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Has a test done with each of these as its `seconds`, until one does not raise TooSlow. Where all do, it fails."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def tried(*arguments: object, **named: object) -> None:
            for seconds in times:
                try:
                    return test(*arguments, seconds=seconds, **named)
                except TooSlow as error:
                    why = error
            pytest.fail(f"{why}, within {times[-1]} s")

        signature = inspect.signature(test)
        fixtures = [parameter for parameter in signature.parameters.values() if parameter.name != "seconds"]
        tried.__signature__ = signature.replace(parameters=fixtures)  # type: ignore[attr-defined]
        return tried

    return decorate


@contextmanager
def in_time() -> Iterator[None]:
    """Whatever in here times out makes the test TooSlow: what never ends does so with the longest time, too."""
    try:
        yield
    except TimeoutError as error:
        raise TooSlow("a request was not answered") from error


def needs(happened: bool, what: str) -> None:
    """Raises TooSlow, with what has not happened, where that is so."""
    if not happened:
        raise TooSlow(what)
