"""An error raised far away is the same error here."""

from __future__ import annotations

import errno
import inspect

import msgspec
import pytest

from blkloom import errors
from blkloom.control.failures import to_exception, to_failure
from blkloom.control.messages import Failure
from blkloom.dm import names
from blkloom.errors import BackingError, BlkloomError, BusyError, DrainError, NoSuchDevice, Place, TableError

CLASSES = sorted(
    {
        kind
        for module in (errors, names)
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, BlkloomError)
    },
    key=lambda kind: kind.__name__,
)


def sample(kind: type[BlkloomError]) -> BlkloomError:
    """One of the class, with every field it has set."""
    if issubclass(kind, TableError):
        return kind("is wrong", place=Place("my.table", 3, 14), value="lineal", cure="write linear")
    if issubclass(kind, BackingError):
        return kind("cannot be used", path="/x/disk.img", errno=errno.EROFS, cure="open it read-only")
    if issubclass(kind, DrainError):
        return kind("had not ended", path="/x/disk.img", cure="wait")
    return kind("is wrong", cure="put it right", errno=errno.EXDEV)


def far_and_back(error: BaseException) -> Exception:
    said = msgspec.json.encode(to_failure(7, error))
    failure = msgspec.json.decode(said, type=Failure)
    assert failure.id == 7
    return to_exception(failure)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_comes_back_as_itself(kind: type[BlkloomError]) -> None:
    error = sample(kind)
    back = far_and_back(error)
    assert type(back) is kind
    assert isinstance(back, BlkloomError)
    assert str(back) == str(error)
    assert (back.what, back.cure, back.errno, back.exit_code) == (error.what, error.cure, error.errno, error.exit_code)
    assert {name: value for name, value in vars(back).items() if name != "errno"} == {
        name: value for name, value in vars(error).items() if name != "errno"
    }


def test_errors_of_the_system_keep_number_text_and_file() -> None:
    back = far_and_back(FileNotFoundError(errno.ENOENT, "No such file or directory", "/x/disk.img"))
    assert type(back) is FileNotFoundError
    assert (back.errno, back.filename) == (errno.ENOENT, "/x/disk.img")
    assert type(far_and_back(PermissionError(errno.EACCES, "Permission denied"))) is PermissionError


def test_an_error_that_took_too_long_stays_one() -> None:
    back = far_and_back(TimeoutError("no answer within 3 s"))
    assert type(back) is TimeoutError
    assert back.errno == errno.ETIMEDOUT
    assert "no answer within 3 s" in str(back)


def test_a_subclass_nobody_else_knows_comes_as_what_it_is_a_kind_of() -> None:
    class OfOneTarget(BusyError):
        pass

    back = far_and_back(OfOneTarget("is locked", path="/x", errno=errno.EAGAIN))
    assert type(back) is BusyError
    assert str(back) == "/x: is locked"


def test_a_class_of_a_newer_version_is_an_error_all_the_same() -> None:
    back = to_exception(Failure(id=1, type="FromTheFuture", what="is odd", cure="upgrade", errno=errno.EDOM))
    assert type(back) is BlkloomError
    assert (back.what, back.cure, back.errno) == ("is odd", "upgrade", errno.EDOM)


@pytest.mark.parametrize("name", ["Place", "SystemExit", "os", "__builtins__", ""])
def test_a_name_that_is_no_error_class_makes_nothing_else(name: str) -> None:
    assert type(to_exception(Failure(id=1, type=name, what="x"))) is BlkloomError


def test_a_bug_is_told_with_its_class() -> None:
    assert str(far_and_back(KeyError("minor"))) == "KeyError: 'minor'"


def test_a_device_not_found_has_dmsetups_number() -> None:
    assert far_and_back(NoSuchDevice("Device x not found")).errno == errno.ENXIO  # type: ignore[attr-defined]
