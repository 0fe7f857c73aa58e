"""The immutable flag of a file: set while a device maps the blocks of the file, cleared even after a crash.

No process can open an immutable file for writing, not even as root: an open that would break the block map fails with
EPERM at once. But the flag outlives the process that set it. So a *record* (the file and its file system) is first
written, synced and locked. A record without a lock means that the process has ended and the flag must be cleared:
`release_abandoned` does so for all files, `release` for one file that is to be opened. The lock is a shared flock(2):
the next process of a device takes it before the former one ends. Source: ioctl_iflags(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from pathlib import Path
from typing import Final

import msgspec

from blkloom import json_text
from blkloom.open_files import generation

_log = logging.getLogger(__name__)

RECORDS: Final = Path("/var/lib/blkloom/immutable")
"""Directory of the records; it survives a reboot. Only root may set the flag."""

_GETFLAGS: Final = 0x80086601
_SETFLAGS: Final = 0x40086602
_IMMUTABLE: Final = 0x10
_REFUSED: Final = {errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL}


class _Record(msgspec.Struct):
    path: str
    device: int
    inode: int
    generation: int
    file_system: int = 0
    """f_fsid of statvfs(3)."""


_DECODER: Final = msgspec.json.Decoder(_Record)


class Immutable:
    """A file that is immutable until `release`. Made by `hold`."""

    def __init__(self, fd: int, record: Path, lock: int) -> None:
        self._fd = fd
        self._record = record
        self._lock = lock

    def release(self) -> None:
        """Clears the flag. A second call does nothing. Raises OSError; the record then stays."""
        if self._lock >= 0:
            _clear(self._fd, self._record)
            self.abandon()

    def abandon(self) -> None:
        """Keeps the flag, for another process that holds the record, or for `release_abandoned`."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def hold(fd: int, path: str, folder: Path = RECORDS) -> Immutable | None:
    """Makes the open file immutable, or continues for another process of the device. Returns None if that is not
    permitted, or if the owner of the file has made it immutable. If it fails (no space for a record, say), logs the
    error and returns None. fd: must stay open until `release`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = os.fstat(fd)
        record = _record_of(fd, folder)
        if _get(fd) & _IMMUTABLE and not record.exists():
            return None
        lock = _locked(record)
    except OSError as error:
        _say_why_not(path, error)
        return None
    try:
        # The real path: the path of the caller may be relative to another directory.
        where = os.path.realpath(f"/proc/self/fd/{fd}")
        made = json_text.encode(_Record(where, status.st_dev, status.st_ino, generation(fd), _file_system(fd)))
        if os.pread(lock, len(made) + 1, 0) != made:
            os.ftruncate(lock, 0)
            os.pwrite(lock, made, 0)
        os.fsync(lock)
        _sync_folder(folder)
        _set(fd, on=True)
    except BaseException as error:
        record.unlink(missing_ok=True)
        os.close(lock)
        if isinstance(error, OSError):
            _say_why_not(path, error)
            return None
        raise
    return Immutable(fd, record, lock)


def inherit(fd: int, folder: Path = RECORDS) -> None:
    """Clears the flag if a former process of the device has left it. For a device that continues without the flag.
    Raises OSError.
    """
    try:
        record = _record_of(fd, folder)
        record.stat()
    except (FileNotFoundError, PermissionError):  # no record, or not ours
        return
    _clear(fd, record)


def _say_why_not(path: str, error: OSError) -> None:
    if error.errno not in _REFUSED:
        _log.warning("%s cannot be made immutable: %s", path, error)


def _locked(record: Path) -> int:
    """Opens and locks the record, and makes it first if there is none. Waits while another process checks the record.

    Returns the descriptor.
    """
    while True:
        lock = os.open(record, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(lock, fcntl.LOCK_SH)
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)  # released, and removed, after we had opened it


def release_abandoned(folder: Path = RECORDS) -> list[str]:
    """Clears the flag of every file whose holder has ended. Returns one line for each file. If a flag cannot be
    cleared, logs the error and keeps the record.
    """
    done: list[str] = []
    try:
        records = sorted(folder.iterdir())
    except FileNotFoundError:
        return done
    for record in records:
        try:
            if (path := _release(record)) is not None:
                done.append(f"{path}: no longer immutable: the process that set this has ended")
        except (OSError, msgspec.MsgspecError) as error:
            _log.warning("%s: %s", record, error)
    return done


def release(path: str, folder: Path = RECORDS) -> bool:
    """Clears the flag of the file at `path` if its holder has ended. Raises OSError."""
    real = os.path.realpath(path)
    try:
        prefix = _prefix(os.stat(real))
        # A reboot may change device numbers.
        found = [record for record in folder.iterdir() if record.name.startswith(prefix) or _is_of(record, real)]
        freed = False
        for record in found:
            try:
                freed |= _release(record) is not None
            except OSError as error:
                if error.errno not in {errno.ENOENT, errno.ESTALE}:
                    raise
                # The record of another file, on a file system that had this device number before.
                _log.warning("%s: %s", record, error)
    except (FileNotFoundError, PermissionError):  # no records, or no permission to read them
        return False
    return freed


def _is_of(record: Path, path: str) -> bool:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return json_text.decode(record.read_bytes(), _DECODER).path == path
    return False


def _release(record: Path) -> str | None:
    """Clears the flag of one record. Returns the path of the file; None if the record is locked or the file is gone."""
    lock = os.open(record, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        found = _read(lock)
        freed = found is not None and _free(found)
        record.unlink(missing_ok=True)
        return found.path if found and freed else None
    finally:
        os.close(lock)


def _read(lock: int) -> _Record | None:
    """Reads a record; None if it was never completed (the flag was not set then)."""
    content = os.pread(lock, 1 << 16, 0)
    with contextlib.suppress(msgspec.MsgspecError):
        return json_text.decode(content, _DECODER)
    return None


def _free(record: _Record) -> bool:
    """Raises OSError when the file exists and its flag cannot be cleared."""
    try:
        fd = os.open(record.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        # Its file system may not be mounted now: keep the record.
        raise OSError(error.errno, "does not exist now; mount its file system and try again", record.path) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return False
        if status.st_ino != record.inode or generation(fd) != record.generation:
            if _file_system(fd) == record.file_system:
                return False
            raise OSError(errno.ESTALE, "is on another file system; mount the former and try again", record.path)
        _set(fd, on=False)
        os.fsync(fd)
        return True
    finally:
        os.close(fd)


def _file_system(fd: int) -> int:
    return os.fstatvfs(fd).f_fsid


def _prefix(status: os.stat_result) -> str:
    """Prefix of the names of records of this file; the generation of its inode follows."""
    return f"{os.major(status.st_dev)}-{os.minor(status.st_dev)}-{status.st_ino}-"


def _record_of(fd: int, folder: Path) -> Path:
    return folder / f"{_prefix(os.fstat(fd))}{generation(fd)}"


def _clear(fd: int, record: Path) -> None:
    """Clears the flag, syncs, then removes the record: a crash must never leave a flag without a record."""
    _set(fd, on=False)
    os.fsync(fd)
    record.unlink(missing_ok=True)


def _get(fd: int) -> int:
    buffer = bytearray(8)
    fcntl.ioctl(fd, _GETFLAGS, buffer)
    return int.from_bytes(buffer[:4], "little")


def _set(fd: int, *, on: bool) -> None:
    flags = _get(fd)
    wanted = flags | _IMMUTABLE if on else flags & ~_IMMUTABLE
    if wanted != flags:
        fcntl.ioctl(fd, _SETFLAGS, wanted.to_bytes(8, "little"))


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
