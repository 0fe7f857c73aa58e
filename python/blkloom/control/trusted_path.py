"""Directories that only this user and root can have put where they are.

A supervisor opens and hands on files for whoever reaches its socket, and a client opens files with its rights
for the supervisor that answers. So neither believes a run directory by its path alone: every directory on the
way to it must belong to this user or to root, and nobody else may be able to rename what is in it. Checked on
open descriptors from the root on, so that what was checked is what is used. Source: sshd(8), StrictModes;
path_resolution(7).
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
"""As many as the kernel follows (MAXSYMLINKS)."""
_ELSEWHERE: Final = "choose another with --run-dir or BLKLOOM_RUN_DIR"


def open_private(path: Path, *, make: bool = False) -> int:
    """A descriptor (O_PATH) of the directory `path`, which is this user's alone (0700, and no symbolic link) and
    lies where only this user and root can have put it. make: where something is missing, make it.

    Raises UsageError where others could have a hand in it, FileNotFoundError where it is not there, OSError.
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
    """From the root to a directory, one name at a time. here: the descriptor of where it has come to."""

    def __init__(self, path: Path, make: bool) -> None:
        assert path.is_absolute(), "RunDir makes it so"
        self._path = path
        self._make = make
        self._names = list(reversed(path.parts[1:]))
        self._shown = "/"
        self._links = 0
        self.here = os.open("/", _OPEN | os.O_DIRECTORY)
        status = os.fstat(self.here)
        # In a user namespace root's files seem to be nobody's; those of "/" tell which user that is.
        self._trusted = {0, os.geteuid(), status.st_uid}
        self._check_parent(status)

    def run(self) -> None:
        """To the end. Raises UsageError, OSError."""
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
        except FileExistsError:  # two make it at once
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
        """Puts what the link says in front of what is left."""
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
        """In a directory with the sticky bit, such as /tmp, nobody can rename what is another's."""
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
        raise UsageError(f"{path} is open to others", cure=f"chmod 700 {path}", errno=errno.EPERM)
