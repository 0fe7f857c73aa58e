"""Claims on files in use: byte-range locks on files, O_EXCL on block devices.

Files are locked as QEMU locks images, with open-file-description locks, so blkloom and QEMU refuse
each other's images exactly where QEMU would refuse another QEMU: one byte a permission in use
(from 100) and one a permission not granted to others (from 200), all of them shared locks; a
conflict is found by a query for locks on the opposite byte. Several processes may read a file, or one may
write it, but not both. A block device is opened for writing with O_EXCL, which also prevents mounts. The
kernel has no such claim for reading, so readers of block devices have none.

Source: QEMU block/file-posix.c (RAW_LOCK_PERM_BASE, raw_check_lock_bytes); fcntl(2), open(2).
A claim belongs to one open file description. `release` ends it, even if duplicates of the descriptor exist.
`abandon` closes the descriptor but keeps the claim for another process that has a duplicate, such as the next process
of the device. One thread at a time.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
from enum import IntEnum
from typing import Final

from blkloom.errors import BackingError, BusyError
from blkloom.targets.descriptors import Descriptors, OwnDescriptors

_log = logging.getLogger(__name__)

_FLOCK: Final = struct.Struct("hhqqi4x")
_IN_USE: Final = 100
_NOT_SHARED: Final = 200
_LONGEST_COMMAND: Final = 4096
_SHOWN_COMMAND: Final = 60
"""Bytes of a command line that are read, characters that are shown."""
_NO_LOCKS: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class _Permission(IntEnum):
    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


class Claim:
    """Claim on an open file or block device. writable: excludes readers too, not only writers."""

    def __init__(self, fd: int, path: str, *, writable: bool, descriptors: Descriptors | None = None) -> None:
        """Owns a duplicate of `fd`, or what `descriptors` has from a former process. Raises BusyError
        that names the holder's pid where it can be found; a file system that has no locks gets a
        warning instead.
        """
        self.path = path
        self._writable = False
        self._descriptors = descriptors or OwnDescriptors()
        status = os.fstat(fd)
        self._number = status.st_rdev if stat.S_ISBLK(status.st_mode) else None
        former = self._descriptors.claimed(path)
        self._fd = former if former is not None else os.dup(fd) if self._number is None else -1
        try:
            self._lock(writable)
        except BaseException:
            self.release()
            raise

    def extend(self, descriptors: Descriptors | None = None) -> None:
        """Changes a read claim to a write claim. Raises BusyError, and then it remains a read claim."""
        if not self._writable:
            self._descriptors = descriptors or self._descriptors
            self._lock(writable=True)

    def release(self) -> None:
        """Ends the claim. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                if self._number is None:
                    _set(fd, fcntl.F_UNLCK, 0, 0)
            except OSError as error:
                _log.debug("%s: unlocking: %s", self.path, error)  # where locks do not exist
            finally:
                self._close(fd)

    def abandon(self) -> None:
        """Closes the descriptor without ending the claim."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._close(fd)

    def _close(self, fd: int) -> None:
        """Closes `fd`. An error of the storage is logged; the descriptor is closed even then."""
        try:
            os.close(fd)
        except OSError as error:
            _log.error("%s: closing: %s", self.path, error)

    @property
    def writable(self) -> bool:
        """Whether this is a write claim, which excludes readers too."""
        return self._writable

    @property
    def descriptor(self) -> int:
        """The descriptor that holds the claim; -1 if the claim needs none."""
        return self._fd

    def _lock(self, writable: bool) -> None:
        if self._number is not None:
            if writable and self._fd < 0:
                self._fd = _exclusive(self._descriptors, self.path, self._number)
            self._writable = writable
            return
        self._writable = writable
        use = [_Permission.CONSISTENT_READ] + [_Permission.WRITE, _Permission.RESIZE] * writable
        refuse = [_Permission.WRITE, _Permission.RESIZE]
        try:
            for permission in use:
                _set(self._fd, fcntl.F_RDLCK, _IN_USE + permission, 1)
            for permission in refuse:
                _set(self._fd, fcntl.F_RDLCK, _NOT_SHARED + permission, 1)
            held = any(_is_held(self._fd, _NOT_SHARED + permission) for permission in use) or any(
                _is_held(self._fd, _IN_USE + permission) for permission in refuse
            )
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _log.warning("%s: cannot be locked (%s); nothing keeps others from it", self.path, error.strerror)
                return
            held = True
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise BackingError(
                    f"locking: {error.strerror}", path=self.path, errno=error.errno or errno.EIO
                ) from error
        if held:
            if writable:  # keep what a reader had
                self._writable = False
                for permission in (_Permission.WRITE, _Permission.RESIZE):
                    _set(self._fd, fcntl.F_UNLCK, _IN_USE + permission, 1)
            raise _busy(self.path, self._fd)


def _set(fd: int, kind: int, start: int, length: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def _is_held(fd: int, byte: int) -> bool:
    """Whether another open file description has a lock on `byte`."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _exclusive(descriptors: Descriptors, path: str, number: int) -> int:
    """A descriptor that holds the block device `number`."""
    try:
        claim = descriptors.open(path, writable=False, direct=False, exclusive=True)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise BackingError(f"claiming: {error.strerror}", path=path, errno=error.errno or errno.EIO) from error
        raise BusyError(
            "block device already in use (mounted, or part of another device)",
            path=path,
            errno=errno.EBUSY,
            cure="unmount or detach it, or pass shared=True (--shared) if you know it is safe",
        ) from error
    if os.fstat(claim).st_rdev != number:
        os.close(claim)
        raise BackingError("the path changed while it was opened", path=path, errno=errno.ESTALE, cure="try again")
    return claim


def _busy(path: str, fd: int) -> BusyError:
    found = _holders(fd)
    # This process holds the locks it has just tried to take; it is to blame only if no other is.
    pids = sorted(found - {os.getpid()} or found)
    by = f" by {' and '.join(map(_named, pids))}" if pids else ""
    return BusyError(
        f"already in use{by}",
        path=path,
        errno=errno.EBUSY,
        cure="close it there, or pass shared=True (--shared) if you know it is safe",
        holders=pids,
    )


def _named(pid: int) -> str:
    """A process with its command: of an interpreter what that runs."""
    if pid == os.getpid():
        return f"process {pid} (this one)"
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = [os.fsdecode(word) for word in file.read(_LONGEST_COMMAND).split(b"\0") if word]
    except OSError:  # it has ended
        words = []
    if words and os.path.basename(words[0]).startswith("python"):
        words = words[2:] if words[1:2] == ["-m"] else words[1:]
    if not words:
        return f"process {pid}"
    command = " ".join([os.path.basename(words[0]), *words[1:]])
    return f"process {pid} ({command if len(command) <= _SHOWN_COMMAND else command[:_SHOWN_COMMAND] + '...'})"


def _holders(fd: int) -> set[int]:
    """Processes seen in /proc to hold locks on the file, as far as we may look."""
    found = set()
    status = os.fstat(fd)
    name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino} "
    for pid in filter(str.isdigit, _listing("/proc")):
        for entry in _listing(f"/proc/{pid}/fdinfo"):
            try:
                with open(f"/proc/{pid}/fdinfo/{entry}", encoding="ascii", errors="replace") as lines:
                    held = any(line.startswith("lock:") and name in line for line in lines)
            except OSError:  # closed, ended, or not ours to read
                continue
            if held:
                found.add(int(pid))
    return found


def _listing(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
