"""The immutable flag as a promise for a while: set by who maps a file's blocks, cleared whatever becomes of him.

Nobody opens an immutable file for writing, not even root, so what would break a block map fails with EPERM
at once. A flag outlives its setter, though: so before it is set, a *record* (which file, on what file system)
is made durable and locked, and a record that nobody has locked any more means that the flag is to be cleared:
`release_abandoned` does that for all, `release` for a file that somebody wants to open.
A record's lock is flock(2)'s, shared: a device's next process has it before the last one has gone, and it ends
with them. Source: ioctl_iflags(2).
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

_log = logging.getLogger(__name__)

RECORDS: Final = Path("/var/lib/blkloom/immutable")
"""Where records are: a place that a reboot leaves alone. Only root may set the flag."""

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


class Immutable:
    """A file that is immutable until `release`. Made by `hold`."""

    def __init__(self, fd: int, record: Path, lock: int) -> None:
        self._fd = fd
        self._record = record
        self._lock = lock

    def release(self) -> None:
        """Others may write to it. Does no harm twice. Raises OSError; then the record stays."""
        if self._lock >= 0:
            _clear(self._fd, self._record)
            self.abandon()

    def abandon(self) -> None:
        """Leaves the file as it is, to another who holds it, or to `release_abandoned`."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def hold(fd: int, path: str, folder: Path = RECORDS) -> Immutable | None:
    """Makes the open file immutable, or goes on with what another process of the device's has begun. None where
    that is not permitted, or where it was immutable before: then it is its owner's affair. None and a line in
    the log where it goes wrong (no room for a record). fd: must stay open until `release`.
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
        # Where it is, not how it was called: whoever opened it may stand in another directory.
        where = os.path.realpath(f"/proc/self/fd/{fd}")
        made = msgspec.json.encode(_Record(where, status.st_dev, status.st_ino, _generation(fd), _file_system(fd)))
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
    """The open file's device goes on without the flag: clears it if a former process of the device has left it.
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
        _log.warning("%s: is not made immutable: %s", path, error)


def _locked(record: Path) -> int:
    """A descriptor with a lock on the record, made if need be. Waits for whoever looks whether it is abandoned."""
    while True:
        lock = os.open(record, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(lock, fcntl.LOCK_SH)
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)  # released, and removed, after we had opened it


def release_abandoned(folder: Path = RECORDS) -> list[str]:
    """Clears the flag of every file whose holder has gone. A line for each; what could not be done is in the
    log and its record stays.
    """
    done: list[str] = []
    try:
        records = sorted(folder.iterdir())
    except FileNotFoundError:
        return done
    for record in records:
        try:
            if (path := _release(record)) is not None:
                done.append(f"{path}: no longer immutable; who held it has gone")
        except (OSError, msgspec.MsgspecError) as error:
            _log.warning("%s: %s", record, error)
    return done


def release(path: str, folder: Path = RECORDS) -> bool:
    """Clears the flag of the file at `path` if its holder has gone. Raises OSError."""
    real = os.path.realpath(path)
    try:
        prefix = _prefix(os.stat(real))
        # Device numbers may be others after a reboot.
        found = [record for record in folder.iterdir() if record.name.startswith(prefix) or _is_of(record, real)]
        freed = [record for record in found if _release(record) is not None]
    except (FileNotFoundError, PermissionError):  # no records, or not for us to see
        return False
    return bool(freed)


def _is_of(record: Path, path: str) -> bool:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(record.read_bytes(), type=_Record).path == path
    return False


def _release(record: Path) -> str | None:
    """The path of the file that was freed; None while somebody holds it, or if it has gone."""
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
    """None for one that was never finished: its flag was not set."""
    content = os.pread(lock, 1 << 16, 0)
    with contextlib.suppress(msgspec.MsgspecError):
        return msgspec.json.decode(content, type=_Record)
    return None


def _free(record: _Record) -> bool:
    """Raises OSError when the file is there and cannot be freed."""
    try:
        fd = os.open(record.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        # Its file system may not be mounted now: the record must outlast that.
        raise OSError(error.errno, "is not there now; mount its file system and try again", record.path) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return False
        if status.st_ino != record.inode or _generation(fd) != record.generation:
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
    """How the names of records of such a file begin; its generation follows."""
    return f"{os.major(status.st_dev)}-{os.minor(status.st_dev)}-{status.st_ino}-"


def _record_of(fd: int, folder: Path) -> Path:
    return folder / f"{_prefix(os.fstat(fd))}{_generation(fd)}"


def _clear(fd: int, record: Path) -> None:
    """The record goes when the flag is durably off, or a crash would leave a flag that nobody knows of."""
    _set(fd, on=False)
    os.fsync(fd)
    record.unlink(missing_ok=True)


def _generation(fd: int) -> int:
    """Tells the file from another that has its inode number later; 0 where the file system has none."""
    buffer = bytearray(8)
    try:
        fcntl.ioctl(fd, 0x80087601, buffer)  # FS_IOC_GETVERSION
    except OSError:
        return 0
    return int.from_bytes(buffer[:4], "little")


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
