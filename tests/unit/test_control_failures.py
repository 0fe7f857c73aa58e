"""An error raised in the supervisor or a worker is the same error in the requesting process."""

from __future__ import annotations

import errno
import inspect
import os
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkloom import device_names as names
from blkloom import errors
from blkloom.control.failures import to_exception, to_failure
from blkloom.control.messages import Failure
from blkloom.errors import BlkloomError, DrainError, PathError, Place, TableError, UsageError

CLASSES = sorted(
    {
        kind
        for module in (errors, names)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, BlkloomError)
    },
    key=lambda kind: kind.__name__,
)
WORDS = st.text(st.characters(codec="utf-8"))
NUMBERS = st.sampled_from(sorted(errno.errorcode))
PLACES = st.builds(
    Place,
    source=st.text(st.characters(codec="utf-8"), min_size=1),
    line=st.integers(1, 1 << 40),
    column=st.integers(1, 1 << 40),
)


@st.composite
def blkloom_errors(draw: st.DrawFn) -> BlkloomError:
    """An error of any class, with all that it may have."""
    kind: Any = draw(st.sampled_from(CLASSES))
    what, cure = draw(WORDS), draw(WORDS)
    if issubclass(kind, TableError):
        made: BlkloomError = kind(what, place=draw(st.none() | PLACES), value=draw(WORDS), cure=cure)
    elif issubclass(kind, PathError):
        made = kind(what, path=draw(WORDS), errno=draw(NUMBERS), cure=cure)
    elif issubclass(kind, DrainError):
        made = kind(what, path=draw(WORDS), cure=cure, errno=draw(st.none() | NUMBERS))
    else:
        made = kind(what, cure=cure, errno=draw(st.none() | NUMBERS))
    return made


def over_the_wire(error: BaseException) -> Exception:
    line = msgspec.json.encode(to_failure(3, error))
    failure = msgspec.json.decode(line, type=Failure)
    assert failure.id == 3
    return to_exception(failure)


@given(blkloom_errors())
def test_every_error_comes_back_as_it_was(error: BlkloomError) -> None:
    back = over_the_wire(error)
    assert type(back) is type(error)
    assert vars(back) | {"errno": error.errno} == vars(error) | {"errno": error.errno}
    assert str(back) == str(error)
    assert (back.errno, back.exit_code) == (error.errno, error.exit_code)  # type: ignore[attr-defined]


def test_every_class_of_errors_is_tried() -> None:
    some = {"TableError", "BusyError", "DrainError", "MountError", "DeviceBusy", "NoSuchDevice", "ReservedNameError"}
    assert some <= {kind.__name__ for kind in CLASSES}


@given(NUMBERS, st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_a_system_error_keeps_its_class_number_and_file(number: int, path: str) -> None:
    error = OSError(number, os.strerror(number), path) if path else OSError(number, os.strerror(number))
    back = over_the_wire(error)
    if isinstance(error, TimeoutError):
        assert isinstance(back, TimeoutError)
        assert back.errno == number
        return
    assert type(back) is type(error)
    assert isinstance(back, OSError)
    assert (back.errno, back.strerror, back.filename) == (number, os.strerror(number), path or None)


def test_a_timeout_without_a_number_gets_one() -> None:
    back = over_the_wire(TimeoutError("no answer within 3 s"))
    assert isinstance(back, TimeoutError)
    assert (back.errno, back.strerror) == (errno.ETIMEDOUT, "no answer within 3 s")


def test_a_plugins_own_error_comes_back_as_the_class_it_is_derived_from() -> None:
    class PoolFull(UsageError):
        """The error of a target of a user."""

    class TableError(PoolFull):
        """Called as one of blkloom's, and no such thing."""

    for kind in (PoolFull, TableError):
        back = over_the_wire(kind("the pool is full", cure="add to it", errno=errno.ENOSPC))
        assert type(back) is UsageError
        assert vars(back) == {"what": "the pool is full", "cure": "add to it", "errno": errno.ENOSPC}


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a bug"), AssertionError()])
def test_a_bug_is_told_with_its_class(error: Exception) -> None:
    back = over_the_wire(error)
    assert type(back) is BlkloomError
    assert str(back) == (f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def test_a_class_of_a_newer_version_is_an_error_all_the_same() -> None:
    back = to_exception(Failure(id=1, type="QuotaError", what="too much", cure="less", errno=errno.EDQUOT))
    assert type(back) is BlkloomError
    assert (str(back), back.errno) == ("too much; less", errno.EDQUOT)


@pytest.mark.parametrize("name", ["Place", "SystemExit", "os", "__builtins__", ""])
def test_a_name_that_is_no_error_class_makes_nothing_else(name: str) -> None:
    assert type(to_exception(Failure(id=1, type=name, what="x"))) is BlkloomError
