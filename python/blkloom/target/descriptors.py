"""Where a load's descriptors come from: files, claims on them, and memory.

A device of one's own process opens files itself (`OwnDescriptors`). A worker of a supervisor asks
whoever ordered the load, is given what a former worker of the device had, and has all of it stored;
targets and devices notice nothing of that. Called by the thread that loads; what may fail raises
OSError as the system call would.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Protocol


class Descriptors(Protocol):
    """One load's. Descriptors it returns belong to the caller; those it is told of stay the caller's. here: paths
    are this process's own; otherwise relative ones begin elsewhere. restored: a former process of the device had
    the table loaded, so what it used must not be refused if there is another way. lent: the device was suspended
    then, and what targets lend while it is must stay lent. whole: as that process's target said.
    """

    here: bool
    restored: bool
    lent: bool
    whole: bool

    def open(self, path: str, *, writable: bool, direct: bool, exclusive: bool = False) -> int:
        """The file or block device at `path`, opened as `open_file` does. direct: O_DIRECT is on the
        descriptor only where the file system can do it. Raises OSError, or ValueError for no path.
        """

    def standing(self, path: str) -> int | None:
        """The descriptor of the file that `path` means because the device has it open, wherever the path leads now. It
        stays this object's. None: `open` looks where the path leads.
        """

    def again(self, path: str, at: str, *, writable: bool, direct: bool) -> int | None:
        """What `path` leads to now, opened anew at `at`, which is that path or stands for it; from now on `open` gives
        that. None where nobody can be asked. Raises OSError.
        """

    def instead(self, path: str, *, writable: bool, direct: bool, fd: int) -> None:
        """What `open` gave will not be used, but `fd`, which is the same file opened the same way."""

    def sync_error(self, path: str, *, writable: bool, direct: bool) -> int:
        """The errno of a sync that failed in a former process through what `open` gives; 0: none did."""

    def sync_failed(self, path: str, *, writable: bool, direct: bool, number: int) -> None:
        """A sync of what `open` gave, or of what is used in place of it, failed with that errno."""

    def claimed(self, path: str) -> int | None:
        """The descriptor whose open file description has the device's claim on `path` already."""

    def claim(self, path: str, fd: int) -> None:
        """The claim on `path` stands, and `fd` holds it."""

    def memory(self, make: Callable[[], int]) -> int:
        """The memfd that a former process of the device had, with its bytes; else what `make` makes."""


class OwnDescriptors:
    """Opens with this process's rights and remembers nothing."""

    here = True
    restored = False
    lent = False
    whole = False

    def open(self, path: str, *, writable: bool, direct: bool, exclusive: bool = False) -> int:
        """As `open_file`."""
        return open_file(path, writable=writable, direct=direct, exclusive=exclusive)

    def standing(self, path: str) -> int | None:
        """None: paths are looked up."""
        return None

    def again(self, path: str, at: str, *, writable: bool, direct: bool) -> int | None:
        """As `open_file`."""
        return open_file(at, writable=writable, direct=direct)

    def instead(self, path: str, *, writable: bool, direct: bool, fd: int) -> None:
        """Nobody needs to know."""
        return

    def sync_error(self, path: str, *, writable: bool, direct: bool) -> int:
        """0: there was no process before this one."""
        return 0

    def sync_failed(self, path: str, *, writable: bool, direct: bool, number: int) -> None:
        """Nobody needs to know."""
        return

    def claimed(self, path: str) -> int | None:
        """None: there was no process before this one."""
        return None

    def claim(self, path: str, fd: int) -> None:
        """Nobody needs to know."""
        return

    def memory(self, make: Callable[[], int]) -> int:
        """A new one."""
        return make()


def descriptor_path(fd: int) -> str:
    """A path that leads to what this process's descriptor is, whatever has become of its name: opening it makes an open
    file description of its own, with flags of its own (proc_pid_fd(5)).
    """
    return f"/proc/self/fd/{fd}"


def open_file(path: str, *, writable: bool, direct: bool = False, exclusive: bool = False) -> int:
    """A descriptor for blkloom's I/O. direct: O_DIRECT, or buffered where the file system refuses it
    (EINVAL). exclusive: O_EXCL, a claim on a block device. Raises OSError, ValueError (a null byte).
    """
    # O_NONBLOCK: opening a FIFO must not wait for its other end.
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    if exclusive:
        flags |= os.O_EXCL
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT)
        except BlockingIOError:
            flags |= os.O_DIRECT
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    try:
        return os.open(path, flags)
    except BlockingIOError:  # a lease on the file is being broken: worth waiting for
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise
        return os.open(path, flags & ~os.O_NONBLOCK)
