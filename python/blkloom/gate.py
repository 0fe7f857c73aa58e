"""The gate: which files a name found inside an image may lead to.

A name in an image is written by whoever wrote the image. It is opened only when, all links resolved, it lies below a
directory that was allowed: by default that of the image itself. `json:` and other protocols are never followed; a
block device only when somebody allowed it by name. The gate guards against what images say, not against those who can
change the allowed directories meanwhile. Immutable; any thread. May fail: BackingError that says how to allow it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from typing import Final

from blkloom.errors import BackingError

_PROTOCOL: Final = re.compile(r"[^/]*:")
"""As QEMU tells a protocol from a path: a colon before the first slash."""


class Gate:
    """home: the directory that is allowed by default. allowed: more directories, or single files and devices."""

    def __init__(self, home: str, allowed: Iterable[str] = ()) -> None:
        self._home: Final = os.path.realpath(home)
        self._allowed: Final = tuple(os.path.realpath(path) for path in allowed)

    @classmethod
    def of_image(cls, path: str, allowed: Iterable[str] = ()) -> Gate:
        """For names in the image at `path` and in the images those lead to."""
        return cls(os.path.dirname(os.path.realpath(path)), allowed)

    def reach(self, name: bytes, *, named_by: str, what: str) -> str:
        """The path, links resolved, of the file that the image at `named_by` calls `name`; relative names begin at that
        image's directory. what: "backing file", for the error. Raises BackingError.
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
                f"its {what} {path!r}: {error.strerror}", named_by, error.errno or errno.EIO, "put it there"
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
        return real

    def _refused(self, what: str, path: str, number: int, cure: str = "") -> BackingError:
        return BackingError(what, path=path, errno=number, cure=cure)


def _lies_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
