"""Diagnostics of an attached image: error counters, fault injection, and their messages.

There is one `Diagnostics` for each loaded table. It provides the storage through which the images are read and written;
this storage counts errors and injects the faults that messages have set. `get_errors`, `get_event` and `get_img_name`
are messages of dm-qcow2, with the same first lines of their answers. `set_fault_injection` counts faults of a kind,
while dm-qcow2 draws random ones; `retry` is new. Counters, injection and reads may be used by any thread, all else by
the mapper's. May fail: UsageError, with the valid messages; OSError of the storage.

Source: dm-qcow2 (Tkhai 2020), drivers/md/dm-qcow2-cmd.c.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal, get_args

from typing_extensions import override

from blkloom.errors import UsageError
from blkloom.image.storage import FileStorage, Role

if TYPE_CHECKING:
    from blkloom._engine import File
    from blkloom.image.attachment import Asks
    from blkloom.image.chain import Chain
    from blkloom.image.errors import CorruptImage
    from blkloom.image.types import HostOffset

Kind = Literal[
    "metadata_read", "metadata_write", "sync", "allocation", "data_read", "data_write", "no_space", "corrupt"
]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
"""metadata_*: reads and writes of tables. allocation: failed allocations of clusters or tables. data_*: reads and
writes of data by Python (copy on write, compressed clusters, also damaged ones), or engine writes that found no space.
no_space: requests that found no space. corrupt: inconsistent metadata.
"""

Event = Literal["event_ENOSPC", "event_CORRUPT"]


class ErrorCounters:
    """Error counters since a table was loaded, and the latest error of each kind. Any thread."""

    def __init__(self) -> None:
        self.write_back_failed = False
        """Whether the last flush of metadata failed."""
        self.cut_failed = False
        """Whether the last attempt to truncate the file after its last cluster failed."""
        self._lock = threading.Lock()
        self._counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._latest: dict[Kind, str] = {}
        self._events: deque[Event] = deque()

    def note(self, kind: Kind, error: OSError, where: str = "") -> None:
        """Counts one error. where: the operation."""
        name = errno.errorcode.get(error.errno or 0, "error")
        with self._lock:
            self._counts[kind] += 1
            self._latest[kind] = " ".join((f"{name}: {where}" if where else str(error)).split())

    def event(self, event: Event) -> None:
        """Adds an event for users. An event that happens again before it is read is kept once."""
        with self._lock:
            if event not in self._events:
                self._events.append(event)

    def take_event(self) -> Event | None:
        """Removes and returns the oldest event; None if there is none."""
        with self._lock:
            return self._events.popleft() if self._events else None

    def report(self, *, wants_check: bool) -> str:
        """The counters, one per line: three flags as in dm-qcow2, then `<kind>=<count>` with the latest error, if there
        is one.
        """
        lines = [
            f"wants_check={int(wants_check)}",
            f"md_writeback_error={int(self.write_back_failed)}",
            f"truncate_error={int(self.cut_failed)}",
        ]
        with self._lock:
            lines += [f"{kind}={self._counts[kind]} {self._latest.get(kind, '')}".rstrip() for kind in KINDS]
        return "\n".join(lines) + "\n"


Injected = Literal["metadata_reads", "metadata_writes", "syncs", "allocations", "data_reads", "data_writes"]
INJECTED: Final[tuple[Injected, ...]] = get_args(Injected)


class FaultInjection:
    """Injected faults for tests: the next operations of a kind fail, for any image of a chain. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: dict[Injected, tuple[int, int]] = {}

    def arm(self, kind: Injected, number: int, count: int) -> None:
        """Makes the next `count` operations fail with the errno; replaces the former setting, 0 clears it."""
        with self._lock:
            self._armed[kind] = (number, count)

    def disarm(self) -> None:
        """Clears all injected faults."""
        with self._lock:
            self._armed.clear()

    def armed(self, kind: Injected) -> bool:
        """Whether the next operation fails."""
        with self._lock:
            return self._armed.get(kind, (0, 0))[1] > 0

    def meet(self, kind: Injected, path: str) -> None:
        """Called when an operation begins. Raises OSError if it is to fail."""
        with self._lock:
            number, left = self._armed.get(kind, (0, 0))
            if left <= 0:
                return
            self._armed[kind] = (number, left - 1)
        raise OSError(number, f"{os.strerror(number)} (injected)", path)


def errno_named(word: str) -> int | None:
    """The errno for a name (`ENOSPC`), or for a number that has a name; None for other text."""
    if word.isascii() and word.isdigit():
        return int(word) if len(word) < 5 and int(word) in errno.errorcode else None
    return next((number for number, name in errno.errorcode.items() if name == word), None)


_READS: Final[dict[Role, tuple[Kind, Injected]]] = {
    "metadata": ("metadata_read", "metadata_reads"),
    "data": ("data_read", "data_reads"),
}
_WRITES: Final[dict[Role, tuple[Kind, Injected]]] = {
    "metadata": ("metadata_write", "metadata_writes"),
    "data": ("data_write", "data_writes"),
}


class MonitoredStorage(FileStorage):
    """Storage of `file` in one role: it counts errors and raises them again. injection: None for no injected faults."""

    def __init__(
        self, file: File, path: str, role: Role, errors: ErrorCounters, injection: FaultInjection | None
    ) -> None:
        super().__init__(file.fileno(), path, file)
        self._opened = file
        self._reads = _READS[role]
        self._writes = _WRITES[role]
        self._errors = errors
        self._injection = injection

    @override
    def read(self, offset: HostOffset, length: int) -> bytes:
        try:
            if self._injection:
                self._injection.meet(self._reads[1], self.path)
            return super().read(offset, length)
        except OSError as error:
            self._errors.note(self._reads[0], error, f"{length} bytes at {offset:#x} of {self.path}")
            raise

    @override
    def write(self, offset: HostOffset, data: bytes) -> None:
        try:  # as `_doing`, for the operations that copy on write does often
            if self._injection:
                self._injection.meet(self._writes[1], self.path)
            super().write(offset, data)
        except OSError as error:
            self._errors.note(self._writes[0], error, f"{len(data)} bytes at {offset:#x} of {self.path}")
            raise

    @override
    def zero(self, offset: HostOffset, length: int) -> None:
        with self._doing(*self._writes, offset, length):
            super().zero(offset, length)

    @override
    def punch(self, offset: HostOffset, length: int) -> bool:
        try:
            return super().punch(offset, length)
        except OSError as error:
            self._errors.note(self._writes[0], error, f"a hole of {length} bytes at {offset:#x} of {self.path}")
            raise

    @override
    def sync(self) -> None:
        try:
            try:
                if self._injection:
                    self._injection.meet("syncs", self.path)
            except OSError as error:
                self._opened.fail_syncs(error.errno or errno.EIO)
                raise
            super().sync()
        except OSError as error:
            self._errors.note("sync", error, self.path)
            raise

    @override
    def truncate(self, size: int) -> None:
        before = self.size()
        if size < before:
            self._errors.cut_failed = True
            super().truncate(size)
            self._errors.cut_failed = False
        else:
            with self._doing("allocation", "allocations", before, size - before):
                super().truncate(size)

    @override
    def reserve(self, offset: HostOffset, length: int) -> None:
        with self._doing("allocation", "allocations", offset, length):
            super().reserve(offset, length)

    @contextmanager
    def _doing(self, kind: Kind, injected: Injected, offset: int, length: int) -> Iterator[None]:
        try:
            if self._injection:
                self._injection.meet(injected, self.path)
            yield
        except OSError as error:
            self._errors.note(kind, error, f"{length} bytes at {offset:#x} of {self.path}")
            raise


_SYNTAX: Final = (
    "get_errors",
    "get_event",
    "get_img_name <number>",
    "retry",
    "set_fault_injection <what> <errno> <count>",
    "set_fault_injection off",
)
_MOST: Final = 1 << 30


class Diagnostics:
    """Diagnostics of one loaded table. target: its name in errors. retry: tries waiting requests again.
    fault_injection: whether messages may inject faults.
    """

    def __init__(self, target: str, *, retry: Callable[[], None], fault_injection: bool) -> None:
        self._target = target
        self.errors: Final = ErrorCounters()
        self._retry = retry
        self._injection = FaultInjection() if fault_injection else None
        self._chain: Chain | None = None
        self._wanted_check = False

    def storage(self, file: File, path: str, role: Role) -> MonitoredStorage:
        """As `open_chain.StorageOf`."""
        return MonitoredStorage(file, path, role, self.errors, self._injection)

    def attend(self, chain: Chain | None) -> None:
        """Sets the current images; None when they are released."""
        self._wanted_check = self.wants_check
        self._chain = chain
        for layer in chain.layers if chain else ():
            layer.on_report(self.found_corrupt)

    def found_corrupt(self, error: CorruptImage) -> None:
        """Counts inconsistent metadata."""
        self.errors.note("corrupt", error)

    def meeting_allocations(self, path: str) -> Callable[[HostOffset, int], None] | None:
        """Callback for allocations, so that they can be made to fail."""
        injection, errors = self._injection, self.errors
        if injection is None:
            return None

        def meet(offset: HostOffset, length: int) -> None:
            try:
                injection.meet("allocations", path)
            except OSError as error:
                errors.note("allocation", error, f"{length} bytes at {offset:#x} of {path}")
                raise

        return meet

    @property
    def asks(self) -> Asks:
        """Requests that the engine must pass to Python, so that they can be made to fail."""
        if self._injection is None:
            return "what is not known"
        reads, writes = self._injection.armed("data_reads"), self._injection.armed("data_writes")
        return "everything" if reads else "writes" if writes else "what is not known"

    def meet_request(self, kind: Literal["data_read", "data_write"], path: str, offset: int, length: int) -> None:
        """Called for a client's request to the image at `path`. Raises OSError if it is to fail."""
        if self._injection is None:
            return
        try:
            self._injection.meet("data_reads" if kind == "data_read" else "data_writes", path)
        except OSError as error:
            self.errors.note(kind, error, f"{length} bytes at {offset} of the disk in {path}")
            raise

    @property
    def wants_check(self) -> bool:
        """Whether one of the images needs a check, or did when they were released."""
        if self._chain is None:
            return self._wanted_check
        return any(layer.wants_check for layer in self._chain.layers)

    def answer(self, words: list[str]) -> str | None:
        """Handles a message. Raises UsageError."""
        match words:
            case ["get_errors"]:
                return self.errors.report(wants_check=self.wants_check)
            case ["get_event"]:
                event = self.errors.take_event()
                return f"{event}\n" if event else ""
            case ["get_img_name", number] if number.isascii() and number.isdigit() and len(number) < 10:
                paths = [layer.path for layer in reversed(self._chain.layers)] if self._chain else []
                return f"{paths[int(number)]}\n" if int(number) < len(paths) else ""
            case ["retry"]:
                self._retry()
                return None
            case ["set_fault_injection", *rest]:
                self._inject(rest)
                return None
        raise UsageError(
            f"Invalid argument: target {self._target} understands no message '{' '.join(words)}'",
            cure=f"it understands: {', '.join(_SYNTAX)}",
        )

    def _inject(self, words: list[str]) -> None:
        if self._injection is None:
            raise UsageError(
                "Invalid argument: no fault is injected into a device that was not made for it",
                cure="say fault_injection in its table",
            )
        if words == ["off"]:
            self._injection.disarm()
            return
        if len(words) != 3:
            raise _unknown("what, an errno and a count are needed", " ".join(words))
        what, error, count = words
        kind = next((kind for kind in INJECTED if kind == what), None)
        number = errno_named(error)
        if kind is None:
            raise _unknown("no such operations", what)
        if number is None:
            raise _unknown("no errno", error)
        if not (count.isascii() and count.isdigit() and len(count) < 11 and int(count) <= _MOST):
            raise _unknown(f"a count must be a number up to {_MOST}", count)
        self._injection.arm(kind, number, int(count))


def _unknown(what: str, value: str) -> UsageError:
    return UsageError(
        f"Invalid argument: set_fault_injection: {what}: '{value}'",
        cure=f"set_fault_injection <what> <errno> <count>, what is one of {', '.join(INJECTED)}; or off",
    )
