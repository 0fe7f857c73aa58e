"""The exceptions of blkloom: each says what is wrong, where, with which value, and what to do about it.

Each class has an `errno` (what a client of a device sees) and an `exit_code` (what the command
line ends with; sysexits.h where one fits). They derive from `OSError` where a caller would expect
one, so `except OSError` keeps working.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

from blkloom.printing import printable


class Place(NamedTuple):
    """Where in a text: source ("--table", a file name), line and column, both from 1."""

    source: str = "table"
    line: int = 1
    column: int = 1

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}"


class BlkloomError(Exception):
    """Base class: `what` happened, the offending `value`, and the `cure`."""

    errno: int | None = _errno.EIO
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, cure: str = "", errno: int | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.cure = cure
        if errno is not None:
            self.errno = errno

    def __str__(self) -> str:
        return printable(f"{self.what}; {self.cure}" if self.cure else self.what)


class TableError(BlkloomError, ValueError):
    """An invalid table: `place`, the offending `value` and the cure are fields."""

    errno = _errno.EINVAL
    exit_code = 65  # EX_DATAERR

    def __init__(self, what: str, *, place: Place | None = None, value: str = "", cure: str = "") -> None:
        super().__init__(what, cure=cure)
        self.place = place or Place()
        self.value = value

    def __str__(self) -> str:
        shown = f": '{self.value}'" if self.value else ""
        cure = f" ({self.cure})" if self.cure else ""
        return printable(f"{self.place}: {self.what}{shown}{cure}")


class UnknownTarget(TableError):
    """A table uses a target that is not registered."""


class PathError(BlkloomError, OSError):
    """Something about a file at `path`."""

    def __init__(self, what: str, *, path: str, errno: int, cure: str = "") -> None:
        BlkloomError.__init__(self, what, cure=cure, errno=errno)
        self.path = path
        self.filename = path

    def __str__(self) -> str:
        return f"{printable(self.path)}: {BlkloomError.__str__(self)}"


class BackingError(PathError):
    """A file that cannot be used: missing, unreadable, too small, in use."""

    exit_code = 66  # EX_NOINPUT


class BusyError(BackingError):
    """A file that another device or program uses. holders: process ids, where they are known."""

    exit_code = 75  # EX_TEMPFAIL

    def __init__(self, what: str, *, path: str, errno: int, cure: str = "", holders: Sequence[int] = ()) -> None:
        super().__init__(what, path=path, errno=errno, cure=cure)
        self.holders = tuple(holders)


class UsageError(BlkloomError, ValueError):
    """Invalid arguments of a call or a command."""

    errno = _errno.EINVAL
    exit_code = 64  # EX_USAGE


class ListenError(BlkloomError, OSError):
    """A socket that cannot be listened on."""

    exit_code = 69  # EX_UNAVAILABLE


class MountError(PathError):
    """A file system that cannot be mounted or unmounted at `path`."""

    exit_code = 69  # EX_UNAVAILABLE


class AttachError(PathError):
    """A node at `path` that cannot be made, changed or removed."""

    exit_code = 69  # EX_UNAVAILABLE


class ResourceError(BlkloomError, OSError):
    """Not enough of something (memory, descriptors, connections)."""

    errno = _errno.ENOMEM
    exit_code = 71  # EX_OSERR


class LostData(BlkloomError, OSError):
    """What was written may be lost: a file could not be synced."""

    exit_code = 74  # EX_IOERR


class DrainError(BlkloomError, TimeoutError):
    """Requests in flight did not end in time; the device is as it was. path: the file that does not
    answer, "" where it is none.
    """

    errno = _errno.ETIMEDOUT
    exit_code = 75  # EX_TEMPFAIL

    def __init__(self, what: str, *, path: str = "", cure: str = "", errno: int | None = None) -> None:
        super().__init__(what, cure=cure, errno=errno)
        self.path = path


class CannotAttach(UsageError):
    """No way to attach works on this machine, or the one that was asked for does not."""

    errno = _errno.EOPNOTSUPP


class NoSuchDevice(UsageError):
    """No device has that name, uuid or number."""

    errno = _errno.ENXIO


class DeviceExists(UsageError):
    """The name, uuid or number is taken."""

    errno = _errno.EBUSY


class DeviceBusy(UsageError):
    """Clients or other devices use the device."""

    errno = _errno.EBUSY
    exit_code = 75  # EX_TEMPFAIL


class DeviceFailed(ResourceError):
    """The device has no worker any more; the error says why, and what may be done."""

    errno = _errno.EIO


class WorkerGone(ResourceError):
    """The worker ended before it answered."""

    errno = _errno.ECONNRESET


class WorkerStuck(ResourceError):
    """The worker does not answer."""

    errno = _errno.ETIMEDOUT


class NoSupervisor(ResourceError):
    """No supervisor is running, and none could be started."""

    errno = _errno.ECONNREFUSED


class ForkedError(BlkloomError, OSError):
    """An object was used in a fork of the process that made it: the fork does not have the threads it needs."""

    errno = _errno.ESHUTDOWN
    exit_code = 70  # EX_SOFTWARE

    @classmethod
    def use_of(cls, what: str) -> ForkedError:
        """The error that says so of `what`."""
        return cls(
            f"{what} belongs to the process that made it; this is a fork of that one, without its threads",
            cure="make a new one here, or start the process with multiprocessing's spawn method",
        )


class FaultError(OSError):
    """What a target's fault handler raises to fail a request with a particular errno."""


class RetryLater(FaultError):
    """What a target's fault handler raises when it cannot do it now: the request waits, and the handler is asked again
    after some seconds, when `LiveSegment.retry` says so, and after a suspend. errno: what the request fails with if
    the device ends first. begins: called when nothing waited before, so that users may be told once. seconds: ask
    again after so many at the latest.
    """

    def __init__(
        self, errno: int, what: str, *, begins: Callable[[], None] = lambda: None, seconds: float | None = None
    ) -> None:
        super().__init__(errno, what)
        self.begins = begins
        self.seconds = seconds


def describe_io_error(operation: str, offset: int, number: int, file: str) -> str:
    """A request that storage has failed, for a log and for people. offset: bytes of the device. number: the errno.
    file: its path; "" where a target failed the request.
    """
    where = "" if operation == "flush" else f" at byte {offset}"
    name = _errno.errorcode.get(number, str(number))
    return f"{operation}{where} failed: {os.strerror(number)} ({name}), {f'file {file}' if file else 'by its target'}"
