"""Conversion of exceptions to messages and back: an error of another process is raised here as the same class, with
the same place, value and cure.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from blkloom import device_names as names
from blkloom import errors
from blkloom.control.messages import Failure
from blkloom.errors import BlkloomError, BusyError, DrainError, PathError, Place, TableError
from blkloom.printing import described

_CLASSES: Final[dict[str, type[BlkloomError]]] = {
    name: kind
    for module in (errors, names)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, BlkloomError)
}


def to_failure(request: int, error: BaseException) -> Failure:
    """The message for `error`."""
    if isinstance(error, BlkloomError):
        known = next(kind.__name__ for kind in type(error).__mro__ if _CLASSES.get(kind.__name__) is kind)
        failure = Failure(id=request, type=known, what=error.what, cure=error.cure, errno=error.errno)
        if isinstance(error, TableError):
            failure.source, failure.line, failure.column = error.place.source, error.place.line, error.place.column
            failure.value = error.value
        if isinstance(error, DrainError | PathError):
            failure.path = error.path
        if isinstance(error, BusyError):
            failure.holders = list(error.holders)
        return failure
    if isinstance(error, TimeoutError):
        return Failure(id=request, type="TimeoutError", what=error.strerror or str(error), errno=errno.ETIMEDOUT)
    if isinstance(error, OSError):
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        return Failure(id=request, type="OSError", what=error.strerror or str(error), errno=error.errno, path=path)
    return Failure(id=request, what=described(error))


def to_exception(failure: Failure) -> Exception:
    """The exception for a message. A class that this version does not know becomes a BlkloomError."""
    if failure.type == "TimeoutError":
        return TimeoutError(failure.errno or errno.ETIMEDOUT, failure.what)
    if failure.type == "OSError":
        number = failure.errno or errno.EIO
        return OSError(number, failure.what, failure.path) if failure.path else OSError(number, failure.what)
    kind = _CLASSES.get(failure.type, BlkloomError)
    if issubclass(kind, TableError):
        place = Place(failure.source or "table", failure.line or 1, failure.column or 1)
        return kind(failure.what, place=place, value=failure.value, cure=failure.cure)
    if issubclass(kind, BusyError):
        number = failure.errno or errno.EBUSY
        return kind(failure.what, path=failure.path, errno=number, cure=failure.cure, holders=failure.holders)
    if issubclass(kind, PathError):
        return kind(failure.what, path=failure.path, errno=failure.errno or errno.EIO, cure=failure.cure)
    if issubclass(kind, DrainError):
        return kind(failure.what, path=failure.path, cure=failure.cure, errno=failure.errno)
    return kind(failure.what, cure=failure.cure, errno=failure.errno)
