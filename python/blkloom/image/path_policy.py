"""Path policy: which files a name inside an image may refer to.

Names in an image come from its creator, who is not trusted. A relative name is relative to the directory of the path by
which the image was opened, as in QEMU, even if that path is a symbolic link. A file is opened only if, with all links
resolved, it lies below an allowed directory. The default is the directory of the image itself, with all links resolved.
`json:` and other protocols are refused. A block device must be allowed by its own name. The policy protects against
names in images, and not against users who can change the allowed directories. Immutable; any thread. May fail:
BackingError, which says how to allow the file.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
from collections.abc import Iterable
from typing import Final

import msgspec

from blkloom.errors import BackingError

_PROTOCOL: Final = re.compile(r"[^/]*:")
"""A protocol, as QEMU distinguishes it from a path: a colon before the first slash."""

_RELATIVE: Final = {
    "backing file": "put it there, beside the name that the image was given by, where QEMU looks too",
    "data file": (
        "put it there, beside the name that the image was given by (QEMU looks in its working directory), or give it "
        "an absolute name (qemu-img amend -o data_file=/...)"
    ),
}
"""The remedy for a relative name of a file that does not exist."""

_OF_THE_KERNEL: Final = ("/proc/", "/sys/")


class Reached(msgspec.Struct, frozen=True):
    """A file that the policy allows. path: with all links resolved; it is checked and opened. named: the absolute name
    that led to it; relative names in that file begin at its directory.
    """

    path: str
    named: str


class PathPolicy:
    """One policy. home: the directory that is allowed by default. allowed: more directories, or single files and
    devices.
    """

    def __init__(self, home: str, allowed: Iterable[str] = ()) -> None:
        self._home: Final = os.path.realpath(home)
        self._allowed: Final = tuple(os.path.realpath(path) for path in allowed)

    @classmethod
    def of_image(cls, path: str, allowed: Iterable[str] = ()) -> PathPolicy:
        """Policy for names in the image at `path`, and in the images that these names refer to."""
        return cls(os.path.dirname(os.path.realpath(path)), allowed)

    def reach(self, name: bytes, *, named_by: str, what: str) -> Reached:
        """The file that `name` refers to, in the image opened by the absolute name `named_by`. what: "backing file" or
        "data file", for the error. Raises BackingError.
        """
        shown = name.decode("utf-8", "backslashreplace")
        if not name or b"\0" in name:
            raise self._refused(f"the name of its {what}, '{shown}', is no path", named_by, errno.EINVAL)
        text = os.fsdecode(name)
        if _PROTOCOL.match(text):
            raise self._refused(
                f"its {what} '{shown}' is named by a protocol, which is not followed",
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
                f"its {what} '{shown}' was looked for at '{path}': {error.strerror}",
                named_by,
                error.errno or errno.EIO,
                "put it there" if os.path.isabs(text) else _RELATIVE[what],
            ) from error
        # Checked before the allowed directories, because allowing it would not help.
        if not stat.S_ISBLK(status.st_mode) and not stat.S_ISREG(status.st_mode):
            raise self._refused(
                f"its {what} '{shown}' is neither a regular file nor a block device",
                named_by,
                errno.EINVAL,
                f"name the file that has the disk's data, not {real}",
            )
        if real.startswith(_OF_THE_KERNEL):
            raise self._refused(
                f"its {what} '{shown}' is {real}, a file of the kernel, not a disk",
                named_by,
                errno.EPERM,
                "name the file that has the disk's data",
            )
        listed = any(_lies_below(real, allowed) for allowed in self._allowed)
        if not listed and not _lies_below(real, self._home):
            # Allow only this device, because its directory contains all others.
            allow = real if stat.S_ISBLK(status.st_mode) else os.path.dirname(real)
            raise self._refused(
                f"its {what} '{shown}' is {real}, outside of what may be reached ({self._home})",
                named_by,
                errno.EPERM,
                f"if the image is to be trusted with it, allow_backing={allow} (--allow-backing {shlex.quote(allow)}) "
                f"allows it",
            )
        if stat.S_ISBLK(status.st_mode) and not listed:
            raise self._refused(
                f"its {what} '{shown}' is a block device",
                named_by,
                errno.EPERM,
                f"allow_backing={real} (--allow-backing {real}) allows it",
            )
        folder, last = os.path.split(path)
        # The directory is resolved, so that names do not grow with the number of layers.
        return Reached(real, os.path.join(os.path.realpath(folder), last))

    def _refused(self, what: str, path: str, number: int, cure: str = "") -> BackingError:
        return BackingError(what, path=path, errno=number, cure=cure)


def _lies_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
