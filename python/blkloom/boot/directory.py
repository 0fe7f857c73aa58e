"""The directory of device files: reads it with checks of who can change it, and writes files atomically.

A device file decides which files root opens, so only root, or the user whose devices these are, may be able to change
it: the directory, every directory above it, and the file. Runs in a command; may wait for storage.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from blkloom.device_names import LONGEST_NAME, mangle, unmangle
from blkloom.errors import BackingError, UsageError

SUFFIX: Final = ".table"
LONGEST: Final = 16 << 20
"""Largest size of a device file in bytes."""
_SYSTEM: Final = Path("/etc/blkloom/devices.d")


def default_directory(environment: Mapping[str, str]) -> Path:
    """/etc/blkloom/devices.d for root, `$XDG_CONFIG_HOME/blkloom/devices.d` (default: `~/.config`) for others. Raises
    UsageError.
    """
    if os.geteuid() == 0:
        return _SYSTEM
    configuration = Path(environment.get("XDG_CONFIG_HOME", ""))
    if not configuration.is_absolute():
        home = Path(environment.get("HOME", ""))
        if not home.is_absolute():
            raise UsageError("neither XDG_CONFIG_HOME nor HOME is set", cure="name a directory with --directory DIR")
        configuration = home / ".config"
    return configuration / "blkloom" / "devices.d"


class Directory:
    """An open directory of device files. A context manager."""

    def __init__(self, path: Path, *, make: bool = False) -> None:
        """make: make missing directories. Raises UsageError where other users can change it, FileNotFoundError,
        OSError.
        """
        self.path = path.absolute()
        if make:
            self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            real = Path(os.path.realpath(f"/proc/self/fd/{self._fd}"))
            _check(os.fstat(self._fd), str(self.path))
            for parent in real.parents:
                _check(parent.stat(), str(parent), sticky=True)
        except BaseException:
            os.close(self._fd)
            raise

    def names(self) -> list[str]:
        """The names of the devices that have a file. Other files are ignored."""
        found = [entry for entry in os.listdir(self._fd) if entry.endswith(SUFFIX) and not entry.startswith(".")]
        return sorted(unmangle(entry.removesuffix(SUFFIX)) for entry in found)

    def file(self, name: str) -> Path:
        """The path of the file of a device."""
        return self.path / _file_name(name)

    def read(self, name: str) -> str:
        """The text of a file. Raises BackingError."""
        path = str(self.file(name))
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(self._existing(name), flags, dir_fd=self._fd), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise BackingError("is no regular file", path=path, errno=errno.EINVAL, cure="remove it")
                _check(status, path)
                data = file.read(LONGEST + 1)
        except UsageError as error:
            raise BackingError(error.what, path=path, errno=errno.EPERM, cure=error.cure) from error
        except BackingError:
            raise
        except OSError as error:
            link = error.errno == errno.ELOOP
            what = "is a symbolic link" if link else f"cannot be read: {error.strerror}"
            cure = "put the file itself there" if link else ""
            raise BackingError(what, path=path, errno=error.errno or errno.EIO, cure=cure) from error
        if len(data) > LONGEST:
            raise BackingError(f"has more than {LONGEST} bytes", path=path, errno=errno.EFBIG, cure="it is no table")
        if b"\0" in data:
            raise BackingError("has NUL bytes, as no text has", path=path, errno=errno.EINVAL, cure="it is no table")
        return os.fsdecode(data)

    def write(self, name: str, text: str) -> None:
        """Replaces the file of a device: after a crash there is the former one or the new one. Raises OSError."""
        last = _file_name(name)
        aside = f".{last[: 255 - len('..new')]}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(aside, flags, 0o644, dir_fd=self._fd), "wb") as file:
                file.write(os.fsencode(text))
                file.flush()
                os.fsync(file.fileno())
            os.rename(aside, last, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            self._remove(aside)
            raise
        os.fsync(self._fd)

    def _existing(self, name: str) -> str:
        """The file of a device may have its name as it is, too: `my disk.table`."""
        names = (_file_name(name), f"{name}{SUFFIX}")
        return next((one for one in names if "/" not in one and one in os.listdir(self._fd)), names[0])

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def close(self) -> None:
        """Closes it."""
        os.close(self._fd)

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _file_name(name: str) -> str:
    mangled = mangle(name)
    assert len(mangled) <= LONGEST_NAME, "a device's name is checked when it is made"
    return f"{mangled}{SUFFIX}"


def _check(status: os.stat_result, shown: str, *, sticky: bool = False) -> None:
    """Raises UsageError if another user can change it. sticky: the sticky bit protects what is in it."""
    if status.st_uid not in {0, os.geteuid()}:
        raise UsageError(
            f"{shown} belongs to user {status.st_uid}, who could change what is opened for you",
            cure=f"chown it to user {os.geteuid()}",
            errno=errno.EPERM,
        )
    if status.st_mode & 0o022 and not (sticky and status.st_mode & stat.S_ISVTX):
        raise UsageError(
            f"{shown} can be written to by others, who could change what is opened for you",
            cure=f"chmod go-w {shown}",
            errno=errno.EPERM,
        )
