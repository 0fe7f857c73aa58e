"""The files a device holds open, shared by its tables.

A file is opened once for each mode (direct or buffered, writable or not) and claimed once, even if several segments
and tables of the device use it. So a table can be replaced by another one on the same files without releasing the
claims. Files are identified by file system and inode, not by path.
Used under the device's control lock, by one thread at a time.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from contextlib import suppress
from typing import Final

import msgspec

from blkloom import open_files
from blkloom._engine import File
from blkloom.errors import BackingError, ResourceError
from blkloom.filemap.lease import Leases
from blkloom.open_files import descriptor_path
from blkloom.printing import printable
from blkloom.targets.claim import Claim
from blkloom.targets.descriptors import Descriptors

_log = logging.getLogger(__name__)

Identity = tuple[int, int]
"""Identity of a file: (file system, inode), or (-1, device number) of a block device."""

_CURES: Final = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.ENXIO: "attach the device first",
    errno.ETXTBSY: "the file is being executed",
}


class _Held(msgspec.Struct):
    claim: Claim | None
    users: int = 0
    unlocked: tuple[str, bool] | None = None
    files: dict[tuple[bool, bool], File] = msgspec.field(default_factory=dict)


class SharedFiles:
    """Open files of a device by identity, with use counts."""

    def __init__(self, leases: Leases | None = None) -> None:
        self.leases = leases or Leases()
        """The leases of block maps. Opening a file breaks its lease first."""
        self._held: dict[Identity, _Held] = {}
        self._claims_stay = False

    @property
    def identities(self) -> frozenset[Identity]:
        """The files that are open."""
        return frozenset(self._held)

    def take(
        self, path: str, *, writable: bool, direct: bool, shared: bool, descriptors: Descriptors, unlocked: bool = False
    ) -> tuple[Identity, File]:
        """Opens the file at `path` and counts one use. shared: do not claim it. unlocked: claim it later, in
        `claim_again`. Raises BackingError, ResourceError.
        """
        standing = descriptors.standing(path)
        if standing is None:
            self.leases.make_way(path, here=descriptors.here)
        else:
            self.leases.make_way(descriptor_path(standing), here=True)
        fd, direct = self._open(descriptors, path, writable=writable, direct=direct)
        try:
            identity = _identity(fd, path)
            held = self._held.get(identity)
            if held is None and unlocked and not shared:
                held = _Held(None, unlocked=(path, writable))
            elif held is None:
                held = _Held(None if shared else Claim(fd, path, writable=writable, descriptors=descriptors))
            elif held.unlocked:
                held.unlocked = (held.unlocked[0], writable or held.unlocked[1])
            elif held.claim is None:
                held.claim = None if shared else Claim(fd, path, writable=writable, descriptors=descriptors)
            elif writable and not shared:
                held.claim.extend(descriptors)
            try:
                file = self._file(held, fd, path, writable=writable, direct=direct, descriptors=descriptors)
                if held.claim and held.claim.descriptor >= 0:
                    descriptors.claim(path, held.claim.descriptor)
            except BaseException as error:
                if held.users == 0:
                    self._end(held)
                if isinstance(error, OSError):
                    raise _refused(path, error, writable=writable) from error
                raise
        finally:
            open_files.close(fd)
        held.files[writable, direct] = file
        held.users += 1
        self._held[identity] = held
        return identity, file

    @staticmethod
    def _file(held: _Held, fd: int, path: str, *, writable: bool, direct: bool, descriptors: Descriptors) -> File:
        """The File that the device already has, because a second open file description would prevent a lease; or a new
        File if a sync of the former failed. Raises OSError.
        """
        known = held.files.get((writable, direct))
        error = descriptors.sync_error(path, writable=writable, direct=direct)
        if known and bool(known.sync_error) == bool(error):
            descriptors.instead(path, writable=writable, direct=direct, fd=known.fileno())
            return known
        file = File(fd, writable=writable, direct=direct, label=printable(path))
        if error:
            file.fail_syncs(error)
            file.set_failure_reported()
        elif known:  # pages that were not written are still in the page cache, and reads would return them
            from blkloom.filemap import page_cache  # imports ctypes

            page_cache.drop(file)
        return file

    def release(self, identity: Identity) -> None:
        """Removes one use. After the last one, closes the file and ends its claim."""
        held = self._held[identity]
        held.users -= 1
        if held.users == 0:
            del self._held[identity]
            for file in held.files.values():
                if file.sync_error:
                    from blkloom.filemap import page_cache

                    with suppress(OSError):  # its file system may have gone
                        page_cache.forget(file)
            held.files.clear()
            self._end(held)

    def _open(self, descriptors: Descriptors, path: str, *, writable: bool, direct: bool) -> tuple[int, bool]:
        """Opens the file; returns the descriptor, and whether it is direct: not if the file system refuses O_DIRECT."""
        try:
            try:
                fd = descriptors.open(path, writable=writable, direct=direct)
            except OSError as error:
                if error.errno != errno.EPERM or not writable or not self.leases.release_abandoned(path):
                    raise
                _log.warning("%s: was left immutable by a process that has gone, and is not any more", path)
                fd = descriptors.open(path, writable=writable, direct=direct)
        except BackingError:
            raise
        except OSError as error:
            raise _refused(path, error, writable=writable) from error
        except ValueError as error:  # a null byte
            raise BackingError(
                "could not be opened: not a path", path=path, errno=errno.EINVAL, cure="leave out the null byte"
            ) from error
        is_direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        if direct and not is_direct:
            _log.warning("%s: its file system does not do direct I/O (O_DIRECT: EINVAL); using buffered I/O", path)
        return fd, is_direct

    def users_of(self, file: File) -> int:
        """The number of uses of the same file, in all modes."""
        return sum(held.users for identity, held in self._held.items() if self.is_same(identity, file))

    def ways_to(self, file: File) -> int:
        """The number of modes in which the same file is open."""
        return sum(len(held.files) for identity, held in self._held.items() if self.is_same(identity, file))

    def is_same(self, identity: Identity, file: File) -> bool:
        """Whether `file` has this identity."""
        return any(one is file for one in self._held[identity].files.values())

    def let_stay(self) -> None:
        """Keeps claims and leases after the last use, because another process of the device continues them."""
        self._claims_stay = self.leases.stay = True

    def lend(self, identity: Identity) -> None:
        """Unlocks the file until `claim_again`, so that other programs can use it. It stays open."""
        held = self._held[identity]
        if held.claim:
            held.unlocked = (held.claim.path, held.claim.writable)
            held.claim.release()
            held.claim = None

    def claim_again(self, identity: Identity, descriptors: Descriptors) -> None:
        """Locks the file again after `lend`. Raises BusyError while another process uses it."""
        held = self._held[identity]
        if held.unlocked and held.claim is None:
            path, writable = held.unlocked
            file = next(iter(held.files.values()))
            held.claim = Claim(file.fileno(), path, writable=writable, descriptors=descriptors)
        held.unlocked = None

    def is_replaced(
        self, identity: Identity, path: str, at: str, *, writable: bool, direct: bool, descriptors: Descriptors
    ) -> bool:
        """Whether `path` leads to another file now. at: see `Descriptors.again`. Raises BackingError, ResourceError."""
        try:
            fd = descriptors.again(path, at, writable=writable, direct=direct)
        except BackingError:
            raise
        except OSError as error:
            raise _refused(path, error, writable=writable) from error
        if fd is None:
            return False
        try:
            return _identity(fd, path) != identity
        finally:
            os.close(fd)

    def _end(self, held: _Held) -> None:
        if held.claim and self._claims_stay:
            held.claim.abandon()
        elif held.claim:
            held.claim.release()

    def in_flight(self) -> dict[str, int]:
        """The number of requests in flight to the storage of each file, by path; files without requests are omitted."""
        found: dict[str, int] = {}
        for held in list(self._held.values()):
            for file in list(held.files.values()):
                if count := file.in_flight:
                    found[file.label] = found.get(file.label, 0) + count
        return found

    def __len__(self) -> int:
        return len(self._held)


def _identity(fd: int, path: str) -> Identity:
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        identity = (-1, status.st_rdev)
    elif stat.S_ISREG(status.st_mode):
        identity = (status.st_dev, status.st_ino)
    else:
        raise BackingError(
            "must be a regular file or a block device",
            path=path,
            errno=errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL,
            cure="check the path",
        )
    os.set_blocking(fd, True)
    return identity


def _refused(path: str, error: OSError, *, writable: bool) -> BackingError | ResourceError:
    number = error.errno or errno.EIO
    if number in (errno.EMFILE, errno.ENFILE):
        return ResourceError(f"{path}: needs more open files than there may be", cure=open_files.advice(), errno=number)
    if number == errno.EISDIR:
        return BackingError("must be a regular file or a block device", path=path, errno=number, cure="check the path")
    cure = _CURES.get(number, "")
    if number == errno.ENOENT and not os.path.isabs(path):
        cure += "; it begins at the working directory of the command"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        cure = "allow writing, or open it read-only (read_only=True, --read-only)" if writable else "allow reading"
    return BackingError(f"could not be opened: {os.strerror(number)}", path=path, errno=number, cure=cure)
