"""The descriptors a worker would leave behind: by label, with one copy in the supervisor's store.

`Stock` keeps them for as long as their table is loaded, so that a supervisor that comes back can be
given them all. `LoadDescriptors` is one load's way to files, claims and memory: what a former worker
had is found in the stock, the rest is asked for; it becomes part of the stock when the load succeeds.
The stock belongs to the event loop's thread and the threads that load, of which there is one a device;
each touches its own device's labels only.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Literal, Protocol

from blkloom import open_files
from blkloom.control.states import FailedSync, Label
from blkloom.errors import BackingError, ResourceError


class Ask(Protocol):
    """Has a file opened by whoever ordered the load."""

    def __call__(self, path: str, *, writable: bool, direct: bool, exclusive: bool, opened: int | None = None) -> int:
        """The descriptor, the caller's to close. opened: what is to be opened once more, instead of what the path leads
        to. Raises OSError.
        """


class Stock:
    """Descriptors by label; owns them."""

    def __init__(self) -> None:
        self._kept: dict[Label, int] = {}
        self._failed: dict[Label, int] = {}

    def put(self, label: Label, fd: int) -> None:
        """Owns `fd` from now on; one that is there already makes way."""
        former = self._kept.get(label)
        self._kept[label] = fd
        if former is not None:
            open_files.close(former)

    def find(self, label: Label) -> int | None:
        """The descriptor; it stays the stock's."""
        return self._kept.get(label)

    def take(self, label: Label) -> int | None:
        """The descriptor, from now on the caller's."""
        return self._kept.pop(label, None)

    def fail(self, label: Label, number: int) -> None:
        """A sync through that descriptor failed with an errno."""
        self._failed[label] = number

    def sync_error(self, label: Label) -> int:
        """That errno; 0: none failed."""
        return self._failed.get(label, 0)

    def failed_syncs(self, device: int) -> list[FailedSync]:
        """Those of a device."""
        failed = list(self._failed.items())
        return [FailedSync(label=label, errno=number) for label, number in failed if label.device == device]

    def discard(self, labels: Iterable[Label]) -> None:
        """Closes them, and forgets their failures."""
        for label in labels:
            self._failed.pop(label, None)
            if (fd := self.take(label)) is not None:
                open_files.close(fd)

    def files(self, device: int, load: int) -> dict[str, int]:
        """A descriptor, which stays the stock's, of each file that a load has open, by its path; no directories."""
        return {
            label.key[2:]: fd
            for label, fd in self
            if (label.device, label.load, label.role) == (device, load, "file") and not label.key.endswith("/")
        }

    def labels(self, device: int) -> list[Label]:
        """Those of a device (its minor number)."""
        return [label for label in list(self._kept) if label.device == device]

    def outlived(self, device: int, loads: Collection[int]) -> list[Label]:
        """Labels of the device whose load is none of `loads`."""
        labels = dict.fromkeys([*self.labels(device), *(failed.label for failed in self.failed_syncs(device))])
        return [label for label in labels if label.load not in loads]

    def __iter__(self) -> Iterator[tuple[Label, int]]:
        return iter(list(self._kept.items()))


class LoadDescriptors:
    """Descriptors of one load, as the protocol has it: whoever is asked has paths of his own. restored: a former
    worker had it loaded, so all should be there; what is not can be asked for only if somebody waits for
    the device (else the answer is ESTALE). same_as: another load of the device, whose files are meant by the paths it
    has them under; 0 for none.
    """

    here = False

    def __init__(
        self,
        stock: Stock,
        device: int,
        load: int,
        ask: Ask,
        *,
        restored: bool = False,
        lent: bool = False,
        whole: bool = False,
        same_as: int = 0,
    ) -> None:
        self._stock = stock
        self._device = device
        self._load = load
        self._ask: Ask | None = ask
        self.restored = restored
        self.lent = lent
        self.whole = whole
        self._same_as = same_as
        self._new: dict[Label, int] = {}
        self._memories = 0

    def open(self, path: str, *, writable: bool, direct: bool, exclusive: bool = False) -> int:
        """As the protocol says. Raises BackingError when it is lost and nobody can be asked."""
        label = self._file(path, writable=writable, direct=direct)
        if not exclusive and (fd := self._find(label)) is not None:
            return os.dup(fd)
        same = self._file(path, writable=writable, direct=direct, load=self._same_as)
        if not exclusive and (fd := self._stock.find(same)) is not None:
            self._keep(label, fd)
            return os.dup(fd)
        try:
            if self._ask is None:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
            _check_room(path)
            opened = self.standing(path)
            fd = self._ask(path, writable=writable, direct=direct, exclusive=exclusive, opened=opened)
        except OSError as error:
            if error.errno != errno.ESTALE or not self.restored:
                raise
            what = "its descriptor was lost with the process that had it"
            raise BackingError(what, path=path, errno=errno.ESTALE, cure="load the table again") from error
        if not exclusive:
            self._keep(label, fd)
        return fd

    def standing(self, path: str) -> int | None:
        """As the protocol says: what the load `same_as` has open."""
        if not self._same_as:
            return None
        return self._stock.files(self._device, self._same_as).get(path)

    def again(self, path: str, at: str, *, writable: bool, direct: bool) -> int | None:
        """As the protocol says. What is another file now takes the place of what there was, of a claim too."""
        if self._ask is None:
            return None
        try:
            fd = self._ask(at, writable=writable, direct=direct, exclusive=False)
        except OSError as error:
            if error.errno == errno.ESTALE:
                return None
            raise
        label = self._file(path, writable=writable, direct=direct)
        kept = self._find(label)
        if kept is None or not os.path.samestat(os.fstat(kept), os.fstat(fd)):
            claim = self._label("claim", path)
            self._stock.discard([claim, label])
            for former in (label, claim):
                if (old := self._new.pop(former, None)) is not None:
                    open_files.close(old)
            self._keep(label, fd)
        return fd

    def instead(self, path: str, *, writable: bool, direct: bool, fd: int) -> None:
        """Keeps `fd` in the place of what was opened."""
        label = self._file(path, writable=writable, direct=direct)
        if (former := self._new.pop(label, None)) is not None:
            open_files.close(former)
        self._keep(label, fd)

    def sync_error(self, path: str, *, writable: bool, direct: bool) -> int:
        """As the protocol says. What failed in the load `same_as` has, in whatever way that has the file open."""
        label = self._file(path, writable=writable, direct=direct)
        if not (number := self._stock.sync_error(label)):
            failed = [failed for failed in self._stock.failed_syncs(self._device) if failed.label.load == self._same_as]
            number = next((failed.errno for failed in failed if failed.label.key[2:] == path), 0)
            if number:
                self._stock.fail(label, number)
        return number

    def sync_failed(self, path: str, *, writable: bool, direct: bool, number: int) -> None:
        """As the protocol says."""
        self._stock.fail(self._file(path, writable=writable, direct=direct), number)

    def claimed(self, path: str) -> int | None:
        """What holds the claim of a former worker."""
        fd = self._find(self._label("claim", path))
        return None if fd is None else os.dup(fd)

    def claim(self, path: str, fd: int) -> None:
        """Keeps the claim."""
        label = self._label("claim", path)
        if self._find(label) is None:
            self._keep(label, fd)

    def memory(self, make: Callable[[], int]) -> int:
        """The next piece of the load's memory. Raises ResourceError where it should be there and is not:
        zeros must not pass for what was written.
        """
        label = self._label("memory", str(self._memories))
        self._memories += 1
        if (fd := self._find(label)) is not None:
            return os.dup(fd)
        if self.restored:
            raise ResourceError(
                "what was in its memory is lost with the processes that had it",
                cure="load the table again to begin with zeros",
                errno=errno.ESTALE,
            )
        fd = make()
        self._keep(label, fd)
        return fd

    def go_on(self, ask: Ask) -> None:
        """Loaded before, and needed again: who can be asked now, until `succeed`."""
        self._ask = ask

    def succeed(self) -> list[Label]:
        """The load stands: what it got belongs to the stock, and nobody can be asked any more. Its labels,
        to be stored elsewhere too.
        """
        self._ask = None
        new, self._new = self._new, {}
        for label, fd in new.items():
            self._stock.put(label, fd)
        return list(new)

    def fail(self) -> None:
        """The load does not stand."""
        while self._new:
            open_files.close(self._new.popitem()[1])

    def _label(self, role: Literal["file", "claim", "memory"], key: str, *, load: int | None = None) -> Label:
        return Label(device=self._device, load=self._load if load is None else load, role=role, key=key)

    def _file(self, path: str, *, writable: bool, direct: bool, load: int | None = None) -> Label:
        return self._label("file", f"{'w' if writable else 'r'}{'d' if direct else '-'}{path}", load=load)

    def _find(self, label: Label) -> int | None:
        fd = self._new.get(label)
        return self._stock.find(label) if fd is None else fd

    def _keep(self, label: Label, fd: int) -> None:
        self._new[label] = os.dup(fd)


def _check_room(path: str) -> None:
    """Raises OSError (EMFILE) where one more file would take what the supervisor's side of this worker needs."""
    if open_files.are_scarce(open_files.WORKER_RESERVE):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
