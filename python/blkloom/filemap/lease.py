"""Write leases on the files of a device: another process that opens a file waits until the device has released it.

The kernel grants a write lease only if the file has one open file description (duplicates count as the same one). A
process that then opens or truncates the file waits in the kernel until the lease is released, at most
/proc/sys/fs/lease-break-time seconds. The kernel sends a signal to the *break handler*, a thread: it makes the users of
the file stop, and releases the lease. Only this thread gets the signal; it blocks the signal and waits for it, so no
signal handler of the program runs. A lease outlives its process if another process has the descriptor; that process
can take the lease again. Locking: `_lock` is never held while a callback runs. Source: fcntl(2) "Leases".
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import struct
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import msgspec

from blkloom.filemap import immutable
from blkloom.filemap.immutable import Immutable
from blkloom.filemap.not_mappable import NotMappable

_log = logging.getLogger(__name__)

Identity = tuple[int, int]
"""(st_dev, st_ino)."""
Stopped = Callable[[], AbstractContextManager[None]]
"""A context in which the device does no I/O."""
GivenUp = Callable[[str], bool]
"""Callback: stop using the file's blocks. It gets the reason, runs while the device is stopped, and may be called
twice. Returns whether the blocks were written to. Runs on the thread of the break handler, or on the one that calls
`make_way`.
"""

_SETSIG: Final = 10
_SETOWN_EX: Final = 15
_OWNER_TID: Final = 0
_OWNER: Final = struct.Struct("=ii")
_BROKEN: Final = signal.SIGRTMIN + 5
_SIGNALS: Final = {_BROKEN, signal.SIGIO}
"""SIGIO: what the kernel sends when no more real-time signals can be queued."""


class _Lease(msgspec.Struct, eq=False):
    fd: int
    path: str
    stopped: Stopped
    immutable: Immutable | None
    users: list[GivenUp] = msgspec.field(default_factory=list)
    changed: bool = False
    broken: bool = False
    """No user can be added any more."""
    ended: bool = False

    def allow_writing(self) -> None:
        """Clears the immutable flag, so that the file can be opened for writing again."""
        try:
            if self.immutable:
                self.immutable.release()
        except OSError as error:
            _log.error("%s: it stays immutable: %s; `blkloom reap` tries again", self.path, error)

    def abandon(self) -> None:
        """Closes the descriptor, but keeps lease and flag for the next process of the device, which has a duplicate."""
        if self.immutable:
            self.immutable.abandon()
        os.close(self.fd)

    def end(self) -> None:
        """Releases the lease. Sets the modification time if blocks were written: the file system has not seen that."""
        self.allow_writing()
        with contextlib.suppress(OSError):  # still immutable, or of another user; the time only helps backups
            if self.changed:
                os.utime(self.fd)
        with contextlib.suppress(OSError):  # the kernel has ended it after lease-break-time
            fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(self.fd)


class Leases:
    """The leases of one device. records: directory of the records of immutable files."""

    def __init__(self, records: Path = immutable.RECORDS) -> None:
        self.stay = False
        """Leases outlive their last user here: another process of the device continues them."""
        self._records = records
        self._lock = threading.Lock()
        self._held: dict[Identity, _Lease] = {}
        self._break_handler: threading.Thread | None = None

    def take(
        self, fd: int, path: str, stopped: Stopped, given_up: GivenUp, *, keep_writers_out: bool
    ) -> Callable[[bool], None]:
        """Takes the lease, or adds a user to it. stopped: the context that stops the device's I/O. given_up: the user's
        callback. keep_writers_out: set the immutable flag too, where that is permitted.

        Returns the function that ends the use; its argument says whether the blocks were written to. Raises
        NotMappable when another process has the file open or is opening it, or if there are no leases.
        """
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        with self._lock:
            lease = self._held.get(identity)
            if lease is None:
                lease = self._new(fd, path, stopped, keep_writers_out=keep_writers_out)
                self._held[identity] = lease
            elif lease.broken or not _intact(lease.fd):
                raise _asked_for()
            lease.users.append(given_up)
        return lambda changed: self._leave(identity, lease, given_up, changed=changed)

    def renew(self, fd: int, given_up: GivenUp) -> bool:
        """Whether the lease of this user is intact, and no process is opening the file. Sends the signal to this
        process again, after another process of the device was to continue the lease and has not.
        """
        status = os.fstat(fd)
        with self._lock:
            lease = self._held.get((status.st_dev, status.st_ino))
            if lease is None or given_up not in lease.users:  # it may have been lost, and taken by another user
                return False
            _tell(lease.fd, self._awake())
            return not lease.broken and _intact(lease.fd)

    def inherit(self, fd: int, path: str) -> None:
        """Ends the lease and the flag that a former process of the device has left on the open file. For a device that
        continues without a block map. Errors are logged.
        """
        with contextlib.suppress(OSError):  # there was none
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        try:
            immutable.inherit(fd, self._records)
        except OSError as error:
            _log.error("%s: it stays immutable: %s; `blkloom reap` tries again", path, error)

    def make_way(self, path: str, *, here: bool) -> None:
        """Gives up the lease on the file at `path` before a table is loaded that opens it. here: whether this process
        opens it. The path of another process may not be visible here; then all leases are given up.
        """
        try:
            status = os.stat(path) if here or os.path.isabs(path) else None
        except (OSError, ValueError):
            if here:
                return  # then it cannot be opened either
            status = None
        with self._lock:
            wanted = [lease for identity, lease in self._held.items() if status is None or _is(status, identity)]
        for lease in wanted:
            self._give_up(lease, "its table is being replaced")

    def release_abandoned(self, path: str) -> bool:
        """Clears the flag if the process that set it has ended. Returns whether it was set. Raises OSError."""
        return immutable.release(path, self._records)

    def _new(self, fd: int, path: str, stopped: Stopped, *, keep_writers_out: bool) -> _Lease:
        handler = self._awake()
        own = os.dup(fd)
        try:
            _tell(own, handler)
            try:
                fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            except OSError as error:
                raise _refused(error) from error
            if not _intact(own):
                raise _asked_for()
            flag = immutable.hold(own, path, self._records) if keep_writers_out else None
            return _Lease(own, path, stopped, flag)
        except BaseException:
            _Lease(own, path, stopped, None).end()  # the lease of a former process of the device
            self._dismiss()
            raise

    def _leave(self, identity: Identity, lease: _Lease, user: GivenUp, *, changed: bool) -> None:
        with self._lock:
            lease.changed |= changed
            lease.users.remove(user)
            if lease.users or lease.ended:
                return
            lease.ended = True
            del self._held[identity]
            self._dismiss()
        if self.stay:
            lease.abandon()
        else:
            lease.end()

    def _give_up(self, lease: _Lease, why: str) -> None:
        """Stops all users, then releases the lease. Two threads may do this at the same time: a thread that loads a
        table delays the break handler, so it must not wait for it.

        All users stop together: two parts of a file may share a page of the page cache.
        """
        with self._lock:
            lease.broken = True
            users = list(lease.users)
        try:
            with lease.stopped():
                for user in users:
                    lease.changed |= user(why)
                lease.allow_writing()
        except Exception:  # keep the lease: it delays other processes until lease-break-time
            _log.exception("%s: its block map could not be given up", lease.path)
            return
        with self._lock:
            ended, lease.ended = lease.ended, True
            self._held = {identity: held for identity, held in self._held.items() if held is not lease}
            self._dismiss()
        if not ended:
            lease.end()

    # the break handler

    def _awake(self) -> int:
        """Starts the break handler if it does not run. Returns its kernel thread id."""
        if self._break_handler is None:
            ready = threading.Event()
            self._break_handler = threading.Thread(
                target=self._handle_breaks, args=(ready,), name="blkloom-leases", daemon=True
            )
            self._break_handler.start()
            ready.wait()
        assert self._break_handler.native_id is not None
        return self._break_handler.native_id

    def _dismiss(self) -> None:
        """Ends the break handler if there are no leases. The caller holds `_lock`."""
        if not self._held and self._break_handler and self._break_handler.ident:
            signal.pthread_kill(self._break_handler.ident, _BROKEN)  # it still runs: it ends only under this lock

    def _handle_breaks(self, ready: threading.Event) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        ready.set()
        while True:
            signal.sigwaitinfo(_SIGNALS)
            self._give_up_broken()
            with self._lock:
                if not self._held:
                    self._break_handler = None
                    return

    def _give_up_broken(self) -> None:
        with self._lock:
            broken = [lease for lease in self._held.values() if not _intact(lease.fd)]
        for lease in broken:
            self._give_up(lease, "another process opened or truncated the file")


def _is(status: os.stat_result, identity: Identity) -> bool:
    return (status.st_dev, status.st_ino) == identity


def _intact(fd: int) -> bool:
    """Whether the lease is not being broken. During a break, F_GETLEASE returns the type that it is to get."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK


def _tell(fd: int, thread: int) -> None:
    """Makes the kernel signal that thread when the lease is broken."""
    fcntl.fcntl(fd, _SETSIG, _BROKEN)
    fcntl.fcntl(fd, _SETOWN_EX, _OWNER.pack(_OWNER_TID, thread))


def _asked_for() -> NotMappable:
    return NotMappable("another process is opening it")


def _refused(error: OSError) -> NotMappable:
    match error.errno:
        case errno.EAGAIN:
            return NotMappable("it is open elsewhere, so it cannot be kept from changing", "see who: fuser -v FILE")
        case errno.EACCES:
            return NotMappable(
                "only its owner, or root, may keep others from it (F_SETLEASE)", "chown it, or run as root"
            )
    return NotMappable(f"its file system grants no leases ({error.strerror})")
