"""Sources of the descriptors of a load: files, claims on them, and memory.

A device of a program opens its files in that program (`OwnDescriptors`). A worker of a supervisor asks the client that
ordered the load to open them, reuses the descriptors of a former worker of the device, and sends copies to the
supervisor's store. Targets and devices work the same in both cases. Called by the thread that loads; failures raise the
OSError of the system call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from blkloom.open_files import open_file


class Descriptors(Protocol):
    """Source of the descriptors of one load. The caller owns returned descriptors, and keeps those that it passes in.
    here: relative paths begin at this process's working directory, not at another's. restored: a former process of
    the device had the table loaded, so the load should not fail if there is a fallback. was_active: it was the active
    table. unlocked: the device was suspended in that process, and its targets had unlocked their files, which must stay
    unlocked. whole: `LoadedTarget.whole` in that process.
    """

    here: bool
    restored: bool
    was_active: bool
    unlocked: bool
    whole: bool

    def open(self, path: str, *, writable: bool, direct: bool, exclusive: bool = False) -> int:
        """The file or block device at `path`, opened as `open_file` does. direct: O_DIRECT is on the
        descriptor only where the file system can do it. Raises OSError, or ValueError for no path.
        """

    def standing(self, path: str) -> int | None:
        """The descriptor of the file that the device already has open as `path`, even if the path leads to another file
        now. This object keeps it. None: `open` looks the path up.
        """

    def again(self, path: str, at: str, *, writable: bool, direct: bool) -> int | None:
        """Opens again the file that `path` leads to now, by the name `at` (`path` itself, or its absolute form). Later
        calls of `open` return this file. None if no client can open it. Raises OSError.
        """

    def instead(self, path: str, *, writable: bool, direct: bool, fd: int) -> None:
        """Records that `fd` is used in place of the descriptor from `open`: the same file, opened the same way."""

    def sync_error(self, path: str, *, writable: bool, direct: bool) -> int:
        """The errno of a sync of the descriptor from `open` that failed in a former process; 0: none failed."""

    def sync_failed(self, path: str, *, writable: bool, direct: bool, number: int) -> None:
        """Records that a sync of the descriptor from `open`, or of the one used in its place, failed with `number`."""

    def claimed(self, path: str) -> int | None:
        """The descriptor that already holds the device's claim on `path`; None: there is none."""

    def claim(self, path: str, fd: int) -> None:
        """Records that `fd` holds the claim on `path`."""

    def memory(self, make: Callable[[], int], remake: Callable[[], int] | None = None) -> int:
        """The memfd that a former process of the device had, with its contents; otherwise the result of `make`. remake:
        called instead if a former process had one that is lost; None: the load fails then, with ResourceError.
        """

    def changes(self) -> int | None:
        """A memfd for changes that are not in a file yet, with those of a former process of the device; it is empty if
        that is lost. The caller closes it. None: no process will follow that could use it.
        """


class OwnDescriptors:
    """Opens with this process's rights and remembers nothing."""

    here = True
    restored = False
    was_active = False
    unlocked = False
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
        """Does nothing: no other process needs this."""
        return

    def sync_error(self, path: str, *, writable: bool, direct: bool) -> int:
        """0: there was no process before this one."""
        return 0

    def sync_failed(self, path: str, *, writable: bool, direct: bool, number: int) -> None:
        """Does nothing: no other process needs this."""
        return

    def claimed(self, path: str) -> int | None:
        """None: there was no process before this one."""
        return None

    def claim(self, path: str, fd: int) -> None:
        """Does nothing: no other process needs this."""
        return

    def memory(self, make: Callable[[], int], remake: Callable[[], int] | None = None) -> int:
        """Makes a new memfd."""
        return make()

    def changes(self) -> None:
        """None: users of the device notice the end of this process."""
