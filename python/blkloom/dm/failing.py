"""The error messages of dmsetup (its lines on standard error), as exceptions.

A failed verb ends with status 1, and its last line is `Command failed.`. An invalid command line ends with `Couldn't
process command line.`. For errors that are a failed ioctl in dmsetup, `IoctlFailed` has dmsetup's line, and blkloom's
own text (problem, place, value, remedy) follows it. No I/O.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from blkloom.errors import BlkloomError
from blkloom.printing import described


class VerbFailed(Exception):
    """A failed verb. lines: the messages of dmsetup. what: a line that blkloom adds, or ""."""

    last: ClassVar[str] = "Command failed."

    def __init__(self, *lines: str, what: str = "") -> None:
        super().__init__(*lines)
        self.lines = lines
        self.what = what

    def text(self) -> str:
        """The complete text for standard error."""
        told = [f"blkloom: {line}" for line in self.what.splitlines()]
        return "\n".join([*self.lines, *([self.last] if self.last else []), *told])


class NotACommandLine(VerbFailed):
    """Unknown or conflicting options."""

    last: ClassVar[str] = "Couldn't process command line."


class NoReport(VerbFailed):
    """Fields or a selection that do not exist."""

    last: ClassVar[str] = ""


class WrongCount(VerbFailed):
    """Too few or too many arguments. usage: the correct usage."""

    last: ClassVar[str] = ""

    def __init__(self, usage: str) -> None:
        super().__init__("Incorrect number of arguments.", usage)


class Told(VerbFailed):
    """An error without a dmsetup message."""

    last: ClassVar[str] = ""

    def __init__(self, error: BlkloomError | OSError) -> None:
        super().__init__(what=described(error))


class IoctlFailed(VerbFailed):
    """The message of a failed ioctl in dmsetup. task: dmsetup's name of the ioctl; name, uuid, numbers: the selector of
    the device.
    """

    def __init__(self, task: str, errno: int, *, name: str = "", uuid: str = "", numbers: str = "", what: str) -> None:
        self.errno = errno
        super().__init__(
            f"device-mapper: {task} ioctl on {name} {uuid}{numbers} failed: {os.strerror(errno)}", what=what
        )


@contextmanager
def as_ioctl(task: str, *, name: str = "", uuid: str = "", numbers: str = "") -> Iterator[None]:
    """Converts errors in the block to `IoctlFailed`."""
    try:
        yield
    except (BlkloomError, OSError) as error:
        if not error.errno:
            raise
        raise IoctlFailed(task, error.errno, name=name, uuid=uuid, numbers=numbers, what=described(error)) from error
