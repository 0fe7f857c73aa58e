"""Checks that a path is trusted: only this user and root can change the directories on it.

A supervisor opens files for any process that reaches its socket, and a client opens files with its own rights for the
supervisor. So a run directory is not trusted by its path alone. Every directory on the path must belong to this user or
to root, and no other user may be able to rename its entries. The check uses open descriptors, starting at the root, so
that the checked directory is the one that is used. Source: sshd(8), StrictModes; path_resolution(7).
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from blkloom.errors import UsageError

_OPEN: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_LINKS: Final = 40
"""Most symbolic links, as in the kernel (MAXSYMLINKS)."""
_ELSEWHERE: Final = "choose another with --run-dir or BLKLOOM_RUN_DIR"


def open_private(path: Path, *, make: bool = False) -> int:
    """Opens the directory `path` (O_PATH). It must be private (0700, not a symbolic link) and on a trusted path. make:
    make missing directories.

    Raises UsageError if another user could change it, FileNotFoundError if it does not exist, OSError.
    """
    walk = _Walk(path, make)
    try:
        walk.run()
        _check_private(path, os.fstat(walk.here))
    except BaseException:
        os.close(walk.here)
        raise
    return walk.here


class _Walk:
    """Walks from the root to a directory, one name at a time. here: descriptor of the present directory."""

    def __init__(self, path: Path, make: bool) -> None:
        assert path.is_absolute(), "RunDir makes it so"
        self._path = path
        self._make = make
        self._names = list(reversed(path.parts[1:]))
        self._shown = "/"
        self._links = 0
        self.here = os.open("/", _OPEN | os.O_DIRECTORY)
        status = os.fstat(self.here)
        # In a user namespace, root's files may belong to the overflow user: the owner of "/" tells which user that is.
        self._trusted = {0, os.geteuid(), status.st_uid}
        self._check_parent(status)

    def run(self) -> None:
        """Walks to the end of the path. Raises UsageError, OSError."""
        while self._names:
            name = self._names.pop()
            self._shown = os.path.join(self._shown, name)
            found = self._open(name)
            status = os.fstat(found)
            if stat.S_ISLNK(status.st_mode):
                try:
                    self._follow(found, status)
                finally:
                    os.close(found)
                continue
            os.close(self.here)
            self.here = found
            if not stat.S_ISDIR(status.st_mode):
                raise UsageError(
                    f"{self._path} cannot be a run directory: {self._shown} is no directory",
                    cure=_ELSEWHERE,
                    errno=errno.ENOTDIR,
                )
            if self._names:
                self._check_parent(status)

    def _open(self, name: str) -> int:
        try:
            try:
                return os.open(name, _OPEN, dir_fd=self.here)
            except FileNotFoundError:
                if not self._make:
                    raise
            os.mkdir(name, 0o755 if self._names else 0o700, dir_fd=self.here)
            return os.open(name, _OPEN, dir_fd=self.here)
        except FileExistsError:  # another process made it at the same time
            return os.open(name, _OPEN, dir_fd=self.here)
        except FileNotFoundError as error:
            raise FileNotFoundError(error.errno, error.strerror, self._shown) from error
        except OSError as error:
            raise UsageError(
                f"the run directory {self._path} cannot be used: {self._shown}: {error.strerror}",
                cure=_ELSEWHERE,
                errno=error.errno,
            ) from error

    def _follow(self, link: int, status: os.stat_result) -> None:
        """Puts the target of the link in front of the remaining names."""
        if not self._names:
            raise UsageError(
                f"{self._shown} is a symbolic link, which may lead elsewhere tomorrow",
                cure="name the directory itself with --run-dir",
                errno=errno.ELOOP,
            )
        self._check_owner(status)
        self._links += 1
        if self._links > _MOST_LINKS:
            raise UsageError(
                f"{self._path}: more than {_MOST_LINKS} symbolic links", cure=_ELSEWHERE, errno=errno.ELOOP
            )
        target = Path(os.readlink("", dir_fd=link))
        if target.is_absolute():
            os.close(self.here)
            self.here = os.open("/", _OPEN | os.O_DIRECTORY)
            self._shown = "/"
        else:
            self._shown = os.path.dirname(self._shown)
        self._names += reversed(target.parts[1:] if target.is_absolute() else target.parts)

    def _check_owner(self, status: os.stat_result) -> None:
        if status.st_uid not in self._trusted:
            raise UsageError(
                f"{self._shown} belongs to user {status.st_uid}, who could put another directory in the place of "
                f"{self._path}",
                cure=_ELSEWHERE,
                errno=errno.EPERM,
            )

    def _check_parent(self, status: os.stat_result) -> None:
        """Whether the sticky bit protects the entry: in /tmp, for example, only the owner of a file can rename it."""
        self._check_owner(status)
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            raise UsageError(
                f"{self._shown} can be written to by others, who could put another directory in the place of "
                f"{self._path}",
                cure=f"chmod go-w {self._shown}, or {_ELSEWHERE}",
                errno=errno.EPERM,
            )


def _check_private(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise UsageError(
            f"{path} belongs to user {status.st_uid}, not to you (user {os.geteuid()})",
            cure=_ELSEWHERE,
            errno=errno.EPERM,
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        cure = _ELSEWHERE if _has_other_things(path) else f"chmod 700 {path}"
        raise UsageError(f"{path} is open to others", cure=cure, errno=errno.EPERM)


def _has_other_things(path: Path) -> bool:
    """Whether the directory is used for other things, like `/etc`: its permissions must not be changed."""
    try:
        return bool(names := os.listdir(path)) and "lock" not in names
    except OSError:
        return False
