"""Write leases on a device's files: nobody else gets at a file before we have let go of its blocks.

A lease is granted to the only open file description of a file (duplicates are the same one). Whoever then
opens or truncates the file waits in the kernel until the lease is given up, for /proc/sys/fs/lease-break-time
seconds at most, and the *keeper* thread hears of it: it has those who rely on the file stop, and lets go.
The signal goes to that thread alone, which has it blocked and waits for it; no other thread and no handler
of the program's is concerned. A lease outlives its process if another has the descriptor: who takes it again
continues it. Locking: `_lock` is never held while somebody is told. Source: fcntl(2) "Leases".
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
from blkloom.filemap.unsound import Unsound

_log = logging.getLogger(__name__)

Identity = tuple[int, int]
"""(st_dev, st_ino)."""
Stopped = Callable[[], AbstractContextManager[None]]
"""While it is entered the device does no I/O."""
GivenUp = Callable[[str], bool]
"""Told why, perhaps twice, while the device is stopped; when it returns nobody relies on the file's blocks any more.
Whether they were written to. On the keeper's thread, or on that of the one who makes way.
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
    """Nobody may join its users any more."""
    ended: bool = False

    def allow_writing(self) -> None:
        """Through the file system; until then it refuses everybody."""
        try:
            if self.immutable:
                self.immutable.release()
        except OSError as error:
            _log.error("%s: it stays immutable: %s; `blkloom reap` tries again", self.path, error)

    def abandon(self) -> None:
        """Leaves the file held, for another process of the device's that has the descriptor too."""
        if self.immutable:
            self.immutable.abandon()
        os.close(self.fd)

    def end(self) -> None:
        """Lets everybody have the file. Its time says that it has changed, as the file system could not know."""
        self.allow_writing()
        with contextlib.suppress(OSError):  # still immutable, or not ours: a courtesy to backups
            if self.changed:
                os.utime(self.fd)
        with contextlib.suppress(OSError):  # taken away after the break time
            fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(self.fd)


class Leases:
    """Those of one device. records: where immutable files are noted."""

    def __init__(self, records: Path = immutable.RECORDS) -> None:
        self.stay = False
        """Files stay held when their users leave: another process of the device has them."""
        self._records = records
        self._lock = threading.Lock()
        self._held: dict[Identity, _Lease] = {}
        self._keeper: threading.Thread | None = None

    def take(
        self, fd: int, path: str, stopped: Stopped, given_up: GivenUp, *, keep_writers_out: bool
    ) -> Callable[[bool], None]:
        """Has the file for `given_up`'s owner, until the function that is returned is told whether he has written to
        its blocks. stopped: the device's.
        keep_writers_out: by the immutable flag too, where that is permitted. Raises Unsound when others have
        the file open or ask for it, or there are no leases.
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
        """Whether the file is still held for `given_up`'s owner, and nobody asks for it. If another process of the
        device's was to go on with it and did not, this one hears of it again.
        """
        status = os.fstat(fd)
        with self._lock:
            lease = self._held.get((status.st_dev, status.st_ino))
            if lease is None or given_up not in lease.users:  # the owner may have lost it, and another taken it since
                return False
            _tell(lease.fd, self._awake())
            return not lease.broken and _intact(lease.fd)

    def inherit(self, fd: int, path: str) -> None:
        """The open file's device goes on without a block map: ends what a former process of the device has left
        standing, lease and flag. What fails is logged.
        """
        with contextlib.suppress(OSError):  # there was none
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        try:
            immutable.inherit(fd, self._records)
        except OSError as error:
            _log.error("%s: it stays immutable: %s; `blkloom reap` tries again", path, error)

    def make_way(self, path: str, *, here: bool) -> None:
        """Gives the file at `path` up before this process, or one that it waits for, opens it. here: it is this
        one. What the other's path names is not always to be seen here; then every file is given up.
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
        """Whether the file was immutable for somebody who has gone; it is not any more. Raises OSError."""
        return immutable.release(path, self._records)

    def _new(self, fd: int, path: str, stopped: Stopped, *, keep_writers_out: bool) -> _Lease:
        keeper = self._awake()
        own = os.dup(fd)
        try:
            _tell(own, keeper)
            try:
                fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            except OSError as error:
                raise _refused(error) from error
            if not _intact(own):
                raise _asked_for()
            flag = immutable.hold(own, path, self._records) if keep_writers_out else None
            return _Lease(own, path, stopped, flag)
        except BaseException:
            _Lease(own, path, stopped, None).end()  # a former process of the device may have left one
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
        """Two threads may do this at once: one that loads holds up the keeper, and must not wait for it.

        All users change over together: two pieces of a file may share a page of its cache.
        """
        with self._lock:
            lease.broken = True
            users = list(lease.users)
        try:
            with lease.stopped():
                for user in users:
                    lease.changed |= user(why)
                lease.allow_writing()
        except Exception:  # the lease stays: it keeps others away for as long as the kernel lets it
            _log.exception("%s: its block map could not be given up", lease.path)
            return
        with self._lock:
            ended, lease.ended = lease.ended, True
            self._held = {identity: held for identity, held in self._held.items() if held is not lease}
            self._dismiss()
        if not ended:
            lease.end()

    # the keeper

    def _awake(self) -> int:
        """The keeper's thread id, as the kernel knows it."""
        if self._keeper is None:
            ready = threading.Event()
            self._keeper = threading.Thread(target=self._keep, args=(ready,), name="blkloom-leases", daemon=True)
            self._keeper.start()
            ready.wait()
        assert self._keeper.native_id is not None
        return self._keeper.native_id

    def _dismiss(self) -> None:
        """Has the keeper end if it has nothing to keep. Under the lock."""
        if not self._held and self._keeper and self._keeper.ident:
            signal.pthread_kill(self._keeper.ident, _BROKEN)  # it is there: it ends under this lock only

    def _keep(self, ready: threading.Event) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        ready.set()
        while True:
            signal.sigwaitinfo(_SIGNALS)
            self._give_up_broken()
            with self._lock:
                if not self._held:
                    self._keeper = None
                    return

    def _give_up_broken(self) -> None:
        with self._lock:
            broken = [lease for lease in self._held.values() if not _intact(lease.fd)]
        for lease in broken:
            self._give_up(lease, "somebody else opened or truncated the file")


def _is(status: os.stat_result, identity: Identity) -> bool:
    return (status.st_dev, status.st_ino) == identity


def _intact(fd: int) -> bool:
    """While a lease is being broken F_GETLEASE says what it is to become."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK


def _tell(fd: int, keeper: int) -> None:
    """Has that thread told when the lease is broken."""
    fcntl.fcntl(fd, _SETSIG, _BROKEN)
    fcntl.fcntl(fd, _SETOWN_EX, _OWNER.pack(_OWNER_TID, keeper))


def _asked_for() -> Unsound:
    return Unsound("somebody else asks for it")


def _refused(error: OSError) -> Unsound:
    match error.errno:
        case errno.EAGAIN:
            return Unsound("it is open elsewhere, so it cannot be kept from changing", "see who: fuser -v FILE")
        case errno.EACCES:
            return Unsound("only its owner, or root, may keep others from it (F_SETLEASE)", "chown it, or run as root")
    return Unsound(f"its file system grants no leases ({error.strerror})")
