"""How dmsetup says that something failed: its lines on standard error, as exceptions.

A verb ends with status 1 and its last line is `Command failed.`; a command line that is none ends with
`Couldn't process command line.`. Where an ioctl would have failed, `IoctlFailed` has dmsetup's line, and
blkloom's own words (what, where, which value, the cure) follow it. No I/O here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from blkloom.errors import BlkloomError


class VerbFailed(Exception):
    """lines: what dmsetup says. what: what blkloom adds, or ""."""

    last: ClassVar[str] = "Command failed."

    def __init__(self, *lines: str, what: str = "") -> None:
        super().__init__(*lines)
        self.lines = lines
        self.what = what

    def text(self) -> str:
        """All of it, for standard error."""
        told = [f"blkloom: {line}" for line in self.what.splitlines()]
        return "\n".join([*self.lines, *([self.last] if self.last else []), *told])


class NotACommandLine(VerbFailed):
    """Options that are unknown or do not go together."""

    last: ClassVar[str] = "Couldn't process command line."


class NoReport(VerbFailed):
    """Fields or a selection that do not exist."""

    last: ClassVar[str] = ""


class WrongCount(VerbFailed):
    """Too few or too many arguments. usage: how it should be written."""

    last: ClassVar[str] = ""

    def __init__(self, usage: str) -> None:
        super().__init__("Incorrect number of arguments.", usage)


class Told(VerbFailed):
    """An error that dmsetup has no words for."""

    last: ClassVar[str] = ""

    def __init__(self, error: BlkloomError | OSError) -> None:
        super().__init__(what=str(error))


class IoctlFailed(VerbFailed):
    """What an ioctl of dmsetup would have said. task: dmsetup's word for it; name, uuid, numbers: as the
    device was named.
    """

    def __init__(self, task: str, errno: int, *, name: str = "", uuid: str = "", numbers: str = "", what: str) -> None:
        self.errno = errno
        super().__init__(
            f"device-mapper: {task} ioctl on {name} {uuid}{numbers} failed: {os.strerror(errno)}", what=what
        )


@contextmanager
def as_ioctl(task: str, *, name: str = "", uuid: str = "", numbers: str = "") -> Iterator[None]:
    """Errors in the block, blkloom's and the system's, become `IoctlFailed`."""
    try:
        yield
    except (BlkloomError, OSError) as error:
        if not error.errno:
            raise
        raise IoctlFailed(task, error.errno, name=name, uuid=uuid, numbers=numbers, what=str(error)) from error
