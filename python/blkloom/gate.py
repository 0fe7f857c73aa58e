"""The gate: which files a name found inside an image may lead to.

A name in an image is written by whoever wrote the image. A relative one begins at the directory of the name that the
image itself was reached by, as in QEMU, also where that is a symbolic link. It is opened only when, all links resolved,
it lies below a directory that was allowed: by default that of the image itself, all links resolved. `json:` and other
protocols are never followed; a block device only when it was allowed by name. The gate guards against what images say,
not against those who can change the allowed directories meanwhile. Immutable; any thread. May fail: BackingError that
says how to allow it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from typing import Final

import msgspec

from blkloom.errors import BackingError

_PROTOCOL: Final = re.compile(r"[^/]*:")
"""As QEMU tells a protocol from a path: a colon before the first slash."""

_RELATIVE: Final = {
    "backing file": "put it there, beside the name that the image was given by, where QEMU looks too",
    "data file": (
        "put it there, beside the name that the image was given by (QEMU looks in its working directory), or give it "
        "an absolute name (qemu-img amend -o data_file=/...)"
    ),
}
"""What to do about a relative name that leads nowhere."""


class Reached(msgspec.Struct, frozen=True):
    """path: of the file, all links resolved: what is judged and opened. named: the absolute name that led there;
    relative names in that file begin at its directory.
    """

    path: str
    named: str


class Gate:
    """home: the directory that is allowed by default. allowed: more directories, or single files and devices."""

    def __init__(self, home: str, allowed: Iterable[str] = ()) -> None:
        self._home: Final = os.path.realpath(home)
        self._allowed: Final = tuple(os.path.realpath(path) for path in allowed)

    @classmethod
    def of_image(cls, path: str, allowed: Iterable[str] = ()) -> Gate:
        """For names in the image at `path` and in the images those lead to."""
        return cls(os.path.dirname(os.path.realpath(path)), allowed)

    def reach(self, name: bytes, *, named_by: str, what: str) -> Reached:
        """The file that the image reached by the absolute name `named_by` calls `name`. what: "backing file" or "data
        file", for the error. Raises BackingError.
        """
        shown = name.decode("utf-8", "backslashreplace")
        if not name or b"\0" in name:
            raise self._refused(f"the name of its {what}, {shown!r}, is no path", named_by, errno.EINVAL)
        text = os.fsdecode(name)
        if _PROTOCOL.match(text):
            raise self._refused(
                f"its {what} {shown!r} is named by a protocol, which is not followed",
                named_by,
                errno.EPERM,
                f"give it a plain path (qemu-img rebase -u; ./{shown} if it has a colon in its name)",
            )
        path = os.path.join(os.path.dirname(named_by), text)
        try:
            real = os.path.realpath(path, strict=True)
            status = os.stat(real)
        except OSError as error:
            raise self._refused(
                f"its {what} {shown!r} was looked for at {path!r}: {error.strerror}",
                named_by,
                error.errno or errno.EIO,
                "put it there" if os.path.isabs(text) else _RELATIVE[what],
            ) from error
        listed = any(_lies_below(real, allowed) for allowed in self._allowed)
        if not listed and not _lies_below(real, self._home):
            # Of devices that one: next to it are all others.
            allow = real if stat.S_ISBLK(status.st_mode) else os.path.dirname(real)
            raise self._refused(
                f"its {what} {shown!r} is {real}, outside of what may be reached ({self._home})",
                named_by,
                errno.EPERM,
                f"if the image is to be trusted with it, allow_backing={allow} (--allow-backing {allow}) allows it",
            )
        if stat.S_ISBLK(status.st_mode) and not listed:
            raise self._refused(
                f"its {what} {shown!r} is a block device",
                named_by,
                errno.EPERM,
                f"allow_backing={real} (--allow-backing {real}) allows it",
            )
        if not stat.S_ISBLK(status.st_mode) and not stat.S_ISREG(status.st_mode):
            raise self._refused(
                f"its {what} {shown!r} is neither a regular file nor a block device", named_by, errno.EINVAL
            )
        folder, last = os.path.split(path)
        return Reached(real, os.path.join(os.path.realpath(folder), last))  # names do not grow from layer to layer

    def _refused(self, what: str, path: str, number: int, cure: str = "") -> BackingError:
        return BackingError(what, path=path, errno=number, cure=cure)


def _lies_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
