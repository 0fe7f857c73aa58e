"""Exceptions as messages, and back: an error raised far away is raised here as the same class, with
the same place, value and cure.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from blkloom import errors
from blkloom.control.messages import Failure
from blkloom.dm import names
from blkloom.errors import BackingError, BlkloomError, DrainError, Place, TableError

_CLASSES: Final[dict[str, type[BlkloomError]]] = {
    name: kind
    for module in (errors, names)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, BlkloomError)
}


def to_failure(request: int, error: BaseException) -> Failure:
    """What a client is told of `error`."""
    if isinstance(error, BlkloomError):
        known = next(kind.__name__ for kind in type(error).__mro__ if _CLASSES.get(kind.__name__) is kind)
        failure = Failure(id=request, type=known, what=error.what, cure=error.cure, errno=error.errno)
        if isinstance(error, TableError):
            failure.source, failure.line, failure.column = error.place.source, error.place.line, error.place.column
            failure.value = error.value
        if isinstance(error, BackingError | DrainError):
            failure.path = error.path
        return failure
    if isinstance(error, TimeoutError):
        return Failure(id=request, type="TimeoutError", what=error.strerror or str(error), errno=errno.ETIMEDOUT)
    if isinstance(error, OSError):
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        return Failure(id=request, type="OSError", what=error.strerror or str(error), errno=error.errno, path=path)
    return Failure(id=request, what=f"{type(error).__name__}: {error}")


def to_exception(failure: Failure) -> Exception:
    """What to raise for it. A class this version does not know becomes a BlkloomError."""
    if failure.type == "TimeoutError":
        return TimeoutError(failure.errno or errno.ETIMEDOUT, failure.what)
    if failure.type == "OSError":
        number = failure.errno or errno.EIO
        return OSError(number, failure.what, failure.path) if failure.path else OSError(number, failure.what)
    kind = _CLASSES.get(failure.type, BlkloomError)
    if issubclass(kind, TableError):
        place = Place(failure.source or "table", failure.line or 1, failure.column or 1)
        return kind(failure.what, place=place, value=failure.value, cure=failure.cure)
    if issubclass(kind, BackingError):
        return kind(failure.what, path=failure.path, errno=failure.errno or errno.EIO, cure=failure.cure)
    if issubclass(kind, DrainError):
        return kind(failure.what, path=failure.path, cure=failure.cure, errno=failure.errno)
    return kind(failure.what, cure=failure.cure, errno=failure.errno)
