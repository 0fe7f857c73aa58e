"""The journal of a copy: a small file that says how much of the target is durable, for a later run that continues.

What it says has been flushed before. It is replaced as a whole, by a rename, so that it is always complete. A run may
continue only if both ends are the same as before: `check_continues` compares them. May fail: OSError, JournalError.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final, Self

import msgspec

from blkloom.errors import PathError
from blkloom.json_text import decode, encode

SUFFIX: Final = ".blkloom-copy"
"""Appended to the path of a target that is a file."""
_NEW: Final = ".blkloom-new"
_LONGEST: Final = 1 << 20


class JournalError(PathError):
    """A journal that cannot be used: unreadable, or of another copy."""

    exit_code = 65  # EX_DATAERR


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """State of a copy. size: bytes to copy. source, target: identities (`ends.End.identity`). target_size: bytes that
    the target has at the end. copied: all bytes before this offset are durable in the target. fresh: the target was
    made by this copy.
    """

    blkloom_copy: int = 1
    size: int
    source: dict[str, Any]
    target: dict[str, Any]
    target_size: int = 0
    copied: int = 0
    fresh: bool = False

    @classmethod
    def read(cls, path: str) -> Self | None:
        """The journal at `path`; None if there is none. Raises JournalError."""
        try:
            with open(path, "rb") as file:
                text = file.read(_LONGEST)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JournalError(
                f"the state of the copy cannot be read: {error.strerror}", path=path, errno=error.errno or errno.EIO
            ) from error
        try:
            found = decode(text, msgspec.json.Decoder(cls))
        except msgspec.DecodeError as error:
            raise _no_journal(path) from error
        if found.blkloom_copy != 1 or not 0 <= found.copied <= found.size:
            raise _no_journal(path)
        return found

    def write(self, path: str) -> None:
        """Replaces the file at `path`, durably. Raises JournalError."""
        temporary = path + _NEW
        try:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            with open(temporary, "xb") as file:  # a link that another user has put there is not followed
                file.write(encode(self) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path)
        except OSError as error:
            with suppress(OSError):
                os.unlink(temporary)
            raise JournalError(
                f"the state of the copy cannot be written: {error.strerror}",
                path=path,
                errno=error.errno or errno.EIO,
                cure="say another place: --state PATH",
            ) from error

    def check_continues(self, other: Journal, path: str) -> None:
        """Checks that this journal, read from `path`, is of the same copy as `other`. Raises JournalError that says
        what has changed.
        """
        for what, mine, its in (
            ("SRC", self.source, other.source),
            ("DST", self.target, other.target),
            ("the size", self.size, other.size),
        ):
            if mine != its:
                raise JournalError(
                    f"the copy cannot go on, {what} is not what it was{_difference(mine, its)}",
                    path=path,
                    errno=errno.ESTALE,
                    cure="begin again: --force",
                )

    def check_made(self, inode: dict[str, Any], path: str) -> None:
        """Checks that a file is the one that this copy has made. inode: `ends.inode_of`. Raises JournalError."""
        if not inode.items() <= self.target.items():
            raise JournalError(
                "the copy cannot begin again, DST is not the file that it has made",
                path=path,
                errno=errno.ESTALE,
                cure="replace the file: --force",
            )


def check_replaceable(path: str, ends: Iterable[str]) -> None:
    """Checks that a journal at `path` would not replace another file. ends: paths of the copy. Raises JournalError."""
    if os.path.realpath(path) in {os.path.realpath(end) for end in ends if end}:
        raise _no_journal(path)
    try:
        status = os.stat(path)
    except OSError:  # nothing is there, or writing it will fail
        return
    if not stat.S_ISREG(status.st_mode):
        raise _no_journal(path)
    if status.st_size:
        Journal.read(path)


def forget(path: str) -> None:
    """Removes a journal, and no other file. Raises OSError."""
    try:
        found = os.path.isfile(path) and Journal.read(path) is not None
    except JournalError:  # --resume will refuse it, too
        return
    if found:
        remove(path)


def remove(path: str) -> None:
    """Removes the journal, and what a write of it that was killed has left. Raises OSError."""
    for name in (path, path + _NEW):
        with suppress(FileNotFoundError):
            os.unlink(name)


def sync_folder(path: str) -> None:
    """Makes the name of a file durable. Raises OSError."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _difference(mine: object, its: object) -> str:
    if not isinstance(mine, dict) or not isinstance(its, dict):
        return f": it was {mine} and is {its}"
    names = [name for name in mine if mine.get(name) != its.get(name)]
    return "".join(f": its {name} was {mine.get(name)} and is {its.get(name)}" for name in names[:1])


def _no_journal(path: str) -> JournalError:
    what = "this is not the state of a copy"
    return JournalError(what, path=path, errno=errno.EINVAL, cure="name another file: --state PATH")
