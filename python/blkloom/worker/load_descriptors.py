"""The descriptors of one load of a table in a worker: files, claims and memory.

Those of a former worker are in the descriptor store; the client that ordered the load opens other files. They are added
to the store when the load succeeds, and stay there while their table is loaded: a new supervisor can get all of them.
Called by the thread that loads a table.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Literal, Protocol

from blkloom import open_files
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.states import Label, file_label, file_path
from blkloom.errors import BackingError, ResourceError


class FileOpener(Protocol):
    """Opens a file through the client that ordered the load."""

    def __call__(self, path: str, *, writable: bool, direct: bool, exclusive: bool, opened: int | None = None) -> int:
        """Returns the descriptor, which the caller closes. opened: a descriptor to reopen; the path is then ignored.
        Raises OSError.
        """


class LoadDescriptors:
    """Descriptors of one load; see `targets.descriptors`. A client opens files in its own mount namespace and working
    directory. restored: a former worker had this load, so the store should have all descriptors; missing ones can be
    asked for only while a client waits for the device (else ESTALE). active: it is the active table's. same_as: another
    load of the device whose open files are used for the same paths; 0 for none.
    """

    here = False

    def __init__(
        self,
        store: DescriptorStore,
        device: int,
        load: int,
        opener: FileOpener,
        *,
        restored: bool = False,
        active: bool = False,
        unlocked: bool = False,
        whole: bool = False,
        same_as: int = 0,
    ) -> None:
        self._store = store
        self._device = device
        self._load = load
        self._opener: FileOpener | None = opener
        self.restored = restored
        self.was_active = restored and active
        self.unlocked = unlocked
        self.whole = whole
        self._same_as = same_as
        self._new: dict[Label, int] = {}
        self._memories = 0
        self._logs = 0

    def open(self, path: str, *, writable: bool, direct: bool, exclusive: bool = False) -> int:
        """See the protocol. Raises BackingError if the descriptor is lost and no client can open the file."""
        label = self._file(path, writable=writable, direct=direct)
        if not exclusive and (fd := self._find(label)) is not None:
            return os.dup(fd)
        same = self._file(path, writable=writable, direct=direct, load=self._same_as)
        if not exclusive and (fd := self._store.find(same)) is not None:
            self._keep(label, fd)
            return os.dup(fd)
        try:
            if self._opener is None:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
            _check_room(path)
            opened = self.standing(path)
            fd = self._opener(path, writable=writable, direct=direct, exclusive=exclusive, opened=opened)
        except OSError as error:
            if error.errno != errno.ESTALE or not self.restored:
                raise
            what = "its descriptor was lost with the process that had it"
            cure = "resume the device, which opens it anew" if self.was_active else "load the table again"
            raise BackingError(what, path=path, errno=errno.ESTALE, cure=cure) from error
        if not exclusive:
            self._keep(label, fd)
        return fd

    def standing(self, path: str) -> int | None:
        """See the protocol: the file that the load `same_as` has open."""
        if not self._same_as:
            return None
        return self._store.files(self._device, self._same_as).get(path)

    def again(self, path: str, at: str, *, writable: bool, direct: bool) -> int | None:
        """See the protocol. If the path leads to another file now, its descriptor and claim replace the former ones."""
        if self._opener is None:
            return None
        try:
            fd = self._opener(at, writable=writable, direct=direct, exclusive=False)
        except OSError as error:
            if error.errno == errno.ESTALE:
                return None
            raise
        label = self._file(path, writable=writable, direct=direct)
        kept = self._find(label)
        if kept is None or not os.path.samestat(os.fstat(kept), os.fstat(fd)):
            claim = self._label("claim", path)
            self._store.drop([claim, label])
            for former in (label, claim):
                if (old := self._new.pop(former, None)) is not None:
                    open_files.close(old)
            self._keep(label, fd)
        return fd

    def instead(self, path: str, *, writable: bool, direct: bool, fd: int) -> None:
        """Replaces the descriptor of an opened file by `fd`."""
        label = self._file(path, writable=writable, direct=direct)
        if (former := self._new.pop(label, None)) is not None:
            open_files.close(former)
        self._keep(label, fd)

    def sync_error(self, path: str, *, writable: bool, direct: bool) -> int:
        """See the protocol. Includes failed syncs of the same file in the load `same_as`."""
        label = self._file(path, writable=writable, direct=direct)
        if not (number := self._store.sync_error(label)):
            failed = [failed for failed in self._store.failed_syncs(self._device) if failed.label.load == self._same_as]
            number = next((failed.errno for failed in failed if file_path(failed.label) == path), 0)
            if number:
                self._store.note_failed_sync(label, number)
        return number

    def sync_failed(self, path: str, *, writable: bool, direct: bool, number: int) -> None:
        """See the protocol."""
        self._store.note_failed_sync(self._file(path, writable=writable, direct=direct), number)

    def claimed(self, path: str) -> int | None:
        """The descriptor that holds the claim of a former worker."""
        fd = self._find(self._label("claim", path))
        return None if fd is None else os.dup(fd)

    def claim(self, path: str, fd: int) -> None:
        """Keeps the claim."""
        label = self._label("claim", path)
        if self._find(label) is None:
            self._keep(label, fd)

    def memory(self, make: Callable[[], int], remake: Callable[[], int] | None = None) -> int:
        """The next memfd of the load; see the protocol. Zeros must not replace written data."""
        label = self._label("memory", str(self._memories))
        self._memories += 1
        if (fd := self._find(label)) is not None:
            return os.dup(fd)
        if self.restored and remake is None:
            raise ResourceError(
                "what was in its memory is lost with the processes that had it",
                cure="remove the device and create it again; it begins with zeros",
                errno=errno.ESTALE,
            )
        fd = remake() if self.restored and remake else make()
        self._keep(label, fd)
        return fd

    def changes(self) -> int:
        """See the protocol."""
        label = self._label("changes", str(self._logs))
        self._logs += 1
        if (fd := self._find(label)) is not None:
            return os.dup(fd)
        fd = os.memfd_create("blkloom-changes", os.MFD_CLOEXEC)
        self._keep(label, fd)
        return fd

    def go_on(self, opener: FileOpener) -> None:
        """Loads a former load again. opener: opens files until `succeed`."""
        self._opener = opener

    def succeed(self) -> list[Label]:
        """Ends a successful load: its descriptors now belong to the store, and no file can be asked for any more.
        Returns its labels, for the supervisor's store.
        """
        self._opener = None
        new, self._new = self._new, {}
        for label, fd in new.items():
            self._store.put(label, fd)
        return list(new)

    def fail(self) -> None:
        """Ends a failed load."""
        while self._new:
            open_files.close(self._new.popitem()[1])

    def _label(self, role: Literal["claim", "memory", "changes"], key: str) -> Label:
        return Label(device=self._device, load=self._load, role=role, key=key)

    def _file(self, path: str, *, writable: bool, direct: bool, load: int | None = None) -> Label:
        return file_label(self._device, self._load if load is None else load, path, writable=writable, direct=direct)

    def _find(self, label: Label) -> int | None:
        fd = self._new.get(label)
        return self._store.find(label) if fd is None else fd

    def _keep(self, label: Label, fd: int) -> None:
        self._new[label] = os.dup(fd)


def _check_room(path: str) -> None:
    """Raises OSError (EMFILE) if the remaining descriptors are reserved for the connection to the supervisor."""
    if open_files.are_scarce(open_files.WORKER_RESERVE):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
