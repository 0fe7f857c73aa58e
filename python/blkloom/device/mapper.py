"""The mapper thread: takes a device's faults in batches and lets the targets answer them.

One thread a device, so a target's Python runs on one thread at a time; whoever closes a target
from elsewhere takes the same turn (`retire`). Nothing a target does ends the thread: an `OSError`
gives the request its errno, anything else EIO. What a target wants to be asked later (`LaterError`)
waits in the engine, and every `RETRY_SECONDS` it is asked again. It tells of I/O errors, too, which the engine has
counted: in the log, at most once in `TELL_SECONDS`, and to `told`. While no fault waits, and now and then while
faults keep coming, targets do a step of the work that no request waits for. The thread ends when the device has
closed, and then closes what is still loaded.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

from blkloom import _engine
from blkloom.device.compose import LoadedTable, Owner
from blkloom.errors import FaultError, LaterError, describe_io_error
from blkloom.target.base import RETRY, Target
from blkloom.units import Bytes

if TYPE_CHECKING:
    from blkloom.device.device import Device

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
RETRY_SECONDS: Final = 5.0
"""How often what a target has wait is asked for again."""
TELL_SECONDS: Final = 1.0
"""Between two reports of I/O errors, at least."""
_WORK_SECONDS: Final = 0.05
"""How long faults that keep coming put off a step of a target's own work."""

_MOST_TOGETHER: Final = 256
"""Writes that are prepared before the first of them is answered, at most."""
_CHANGES: Final = frozenset({"write", "discard", "write_zeroes"})
_ALLOCATION: Final = "base:allocation"
_MOST_RUNS: Final = 16384
"""As many as the engine takes for one request."""


class Mapper:
    """Answers the faults of `device` from the tables it has been given. Only the running thread
    refers to the device, so that a closed one is freed at once.
    """

    def __init__(self, device: Device, told: Callable[[], None]) -> None:
        """told: called when the log has been told of I/O errors."""
        self._told = told
        self._tell_at = 0.0
        self._name = device.name
        self._turn = threading.Lock()
        self._tables: list[LoadedTable] = []
        self._owners: dict[int, Owner] = {}
        self._working: set[int] = set()
        """Owners whose targets have work that no request waits for."""
        self._worked_at = 0.0
        self._retry_at: float | None = None
        self._reported: set[tuple[type[Target], str, type[BaseException], int]] = set()
        self._thread = threading.Thread(
            target=self._run, args=(device,), name=f"blkloom-map {device.name}".rstrip(), daemon=False
        )

    def start(self) -> None:
        """Starts the thread. Raises RuntimeError when none can be had."""
        self._thread.start()

    def add(self, loaded: LoadedTable) -> None:
        """Faults of this table's owners may come."""
        with self._turn:
            self._tables.append(loaded)
            self._owners.update(loaded.owners)

    def retire(self, loaded: LoadedTable) -> None:
        """No map names this table's owners any more: closes it once the current batch is answered.
        Its faults that still wait are looked up again in the new map.
        """
        with self._turn:
            if loaded in self._tables:
                self._tables.remove(loaded)
                for number in loaded.owners:
                    del self._owners[number]
                loaded.close()

    def ask(self, question: Callable[[], _T]) -> _T:
        """Asks a target something between two batches of faults; from a handler at once."""
        if self.is_current_thread():
            return question()
        with self._turn:
            return question()

    def try_tell(self, owner: Owner, tell: Callable[[], None]) -> None:
        """Tells a target something. What it raises is logged. In `ask`."""
        try:
            tell()
        except Exception:
            _log.exception("device %r: target %s", self._name, owner.target.name)

    def has_work(self, owner: int) -> None:
        """The owner's target is to be asked to `work`. Any thread; the caller wakes this one."""
        self._working.add(owner)

    def ended(self, timeout: float) -> bool:
        """Waits for the thread after the device was closed; whether it has ended (and closed all)."""
        if self._thread.ident is None:
            self._close_tables()
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def is_current_thread(self) -> bool:
        """Whether the caller is a fault handler."""
        return threading.current_thread() is self._thread

    def _run(self, device: Device) -> None:
        try:
            while self._answer_next(device):
                pass
            if device.has_new_io_errors:
                self._tell(device)
        finally:
            self._close_tables()

    def _answer_next(self, device: Device) -> bool:
        """Waits for a batch and answers it; False once the device has closed."""
        faults: list[_engine.Fault] | None = []
        try:
            waits = (0.0 if self._working else None, self._until_retry(device), self._until_told(device))
            faults = device.next_faults(min((seconds for seconds in waits if seconds is not None), default=None))
            if faults:
                with self._turn:
                    self._answer_all(device, faults)
            late = time.monotonic() > self._worked_at + _WORK_SECONDS
            if self._working and faults is not None and (late or not faults):
                self._work(device)
        except MemoryError:  # faults it cost us before we saw them have failed with EIO
            for fault in faults or ():
                fault.fail(errno.ENOMEM)  # only the first answer counts
            _log.error("device %r: out of memory while answering faults", self._name)
        return faults is not None

    def _until_retry(self, device: Device) -> float | None:
        """Has what waits asked for again when it is time; seconds until it is, None while nothing waits."""
        if not device.held:
            self._retry_at = None
            return None
        now = time.monotonic()
        if self._retry_at is not None and self._retry_at <= now:
            device.retry_held()
            self._retry_at = None
        if self._retry_at is None:
            self._retry_at = now + RETRY_SECONDS
        return self._retry_at - now

    def _until_told(self, device: _engine.Device) -> float | None:
        """Tells of I/O errors if it is time; seconds until it is, None while there are none."""
        if not device.has_new_io_errors:
            return None
        if (wait := self._tell_at - time.monotonic()) > 0:
            return wait
        self._tell(device)
        return None

    def _tell(self, device: _engine.Device) -> None:
        self._tell_at = time.monotonic() + TELL_SECONDS
        errors, others = device.new_io_errors()
        for operation, offset, number, file, times in errors:
            what = describe_io_error(operation, offset, number, file)
            more = f" ({times} times, that was the last)" if times > 1 else ""
            _log.error("device %r: %s%s", self._name, what, more)
        if others:
            _log.error("device %r: %d more I/O errors, of other operations or files", self._name, others)
        self._told()

    def _work(self, device: Device) -> None:
        """A step of each target's own work."""
        for number in list(self._working):
            with self._turn:
                owner = self._owners.get(number)
                try:
                    more = owner is not None and owner.target.work()
                except BaseException:  # as for a handler: it may not end the thread
                    _log.exception("device %r: a target's own work failed", self._name)
                    more = False
                device.note_failed_syncs()
                if not more:
                    self._working.discard(number)
        self._worked_at = time.monotonic()

    def _close_tables(self) -> None:
        with self._turn:
            self._owners.clear()
            while self._tables:
                self._tables.pop().close()

    def _answer_all(self, device: Device, faults: list[_engine.Fault]) -> None:
        """Flushes last: they then cover the batch's other requests too, and share a call a target."""
        if any(fault.sync_failed for fault in faults):
            device.note_failed_syncs()
            for fault in faults:
                if fault.sync_failed:
                    fault.fail(errno.EIO)  # its own errno counts
            faults = [fault for fault in faults if not fault.sync_failed]
        if len(faults) > 1:
            self._announce(faults)
            faults = self._prepare_writes(device, faults)
        flushes: defaultdict[int, list[_engine.Fault]] = defaultdict(list)
        for fault in faults:
            if fault.operation == "flush":
                flushes[fault.owner].append(fault)
            else:
                self._answer(device, [fault])
        for waiting in flushes.values():
            self._answer(device, waiting)

    def _announce(self, faults: list[_engine.Fault]) -> None:
        """Tells a target of the reads that came for it together."""
        reads: defaultdict[int, list[_engine.Fault]] = defaultdict(list)
        for fault in faults:
            if fault.operation == "read":
                reads[fault.owner].append(fault)
        for number, waiting in reads.items():
            owner = self._owners.get(number)
            if owner is None or len(waiting) < 2 or type(owner.target).expect is Target.expect:
                continue
            try:
                owner.target.expect([(Bytes(fault.offset - owner.start), Bytes(fault.length)) for fault in waiting])
            except BaseException as error:  # it will come again, as the answer to one of them
                self._errno_of(error, owner, waiting[0])

    def _prepare_writes(self, device: Device, faults: list[_engine.Fault]) -> list[_engine.Fault]:
        """Has targets prepare the writes that came for them together. Answers what is ready then; returns the rest."""
        writes: defaultdict[int, list[_engine.Fault]] = defaultdict(list)
        for fault in faults:
            if fault.operation == "write":
                writes[fault.owner].append(fault)
        answered: set[_engine.Fault] = set()
        for number, waiting in writes.items():
            owner = self._owners.get(number)
            if owner is None or owner.read_only or type(owner.target).prepare_writes is Target.prepare_writes:
                continue
            waiting = [fault for fault in waiting if not (fault.full or fault.expired)]
            for low in range(0, len(waiting), _MOST_TOGETHER):
                together = waiting[low : low + _MOST_TOGETHER]
                if len(together) > 1:
                    answered.update(self._prepare_together(device, owner, together))
        return [fault for fault in faults if fault not in answered] if answered else faults

    def _prepare_together(self, device: Device, owner: Owner, writes: list[_engine.Fault]) -> list[_engine.Fault]:
        """Returns those of the writes that have been answered."""
        try:
            ready = owner.target.prepare_writes(
                [(Bytes(fault.offset - owner.start), Bytes(fault.length)) for fault in writes]
            )
        except BaseException as error:  # each will come by itself
            self._errno_of(error, owner, writes[0])
            device.note_failed_syncs()
            return []
        answered = [writes[number] for number in ready]
        for fault in answered:
            fault.retry()
        return answered

    def _answer(self, device: Device, faults: list[_engine.Fault]) -> None:
        """Answers one fault, or flushes of one target with one call."""
        first = faults[0]
        owner = self._owners.get(first.owner)
        if owner is None:  # its table was replaced while it waited
            for fault in faults:
                fault.retry()
            return
        if first.operation in _CHANGES and first.expired:
            # Whoever asked has been told that it failed, and may have written there since.
            first.fail(errno.ETIMEDOUT)
            return
        try:
            if first.operation == "flush":
                owner.target.flush()
                for fault in faults:
                    fault.done()
            else:
                _ask(owner, first)
        except LaterError as error:
            device.note_failed_syncs()
            first_of_all = not (first.again or device.held)
            for fault in faults:
                fault.hold(error.errno or errno.EIO)
            if first_of_all:
                self._say_that_it_waits(error, owner, first)
        except BaseException as error:  # not even SystemExit from a target may end the thread
            number = self._errno_of(error, owner, first)
            device.note_failed_syncs()
            for fault in faults:
                fault.fail(number)

    def _say_that_it_waits(self, waits: LaterError, owner: Owner, fault: _engine.Fault) -> None:
        try:
            waits.begins()
        except BaseException as error:
            self._errno_of(error, owner, fault)

    def _errno_of(self, error: BaseException, owner: Owner, fault: _engine.Fault) -> int:
        """What the request fails with; what the user must know of it goes to the log, once."""
        if isinstance(error, FaultError):
            return error.errno or errno.EIO
        if isinstance(error, MemoryError):
            return errno.ENOMEM
        line = error.__traceback__
        while line and line.tb_next:
            line = line.tb_next
        site = (type(owner.target), fault.operation, type(error), line.tb_lineno if line else 0)
        if site not in self._reported:
            self._reported.add(site)
            expected = isinstance(error, OSError)
            _log.log(
                logging.WARNING if expected else logging.ERROR,
                "device %r: target %s failed a %s of %d bytes at %d: %r (said once)",
                self._name,
                owner.target.name,
                fault.operation,
                fault.length,
                fault.offset,
                error,
                exc_info=None if expected else error,
            )
        return (error.errno if isinstance(error, OSError) else None) or errno.EIO


def _ask(owner: Owner, fault: _engine.Fault) -> None:
    """Has the target's handler answer. Raises what the handler raises."""
    target, offset, length = owner.target, Bytes(fault.offset - owner.start), Bytes(fault.length)
    if owner.read_only and fault.operation in _CHANGES:  # a promise of the device's, kept for every target
        raise FaultError(errno.EROFS, "the device is read-only")
    answer: object
    match fault.operation:
        case "read":
            data = target.read(offset, length)
            if data is not RETRY:
                size = memoryview(data).nbytes
                if size != length:
                    raise ValueError(f"read handler of target {target.name} returned {size} bytes, not {length}")
                fault.done(data)
                return
            answer = data
        case "write" if fault.full:
            answer = target.full(offset, length, fault.full)
        case "write":
            answer = target.write_lazily(offset, length, fault.payload, fua=fault.fua)
        case "discard":
            answer = target.discard(offset, length)
        case "write_zeroes":
            answer = target.write_zeroes(offset, length, may_unmap=fault.may_unmap, fast=fault.fast)
        case "extents":
            if fault.context == _ALLOCATION:
                told, handler = target.extents(offset, length), "extents"
            else:
                told, handler = target.block_status(fault.context, offset, length), "block_status"
            runs = list(islice(told, 1 if fault.one else _MOST_RUNS))
            if not runs:
                raise ValueError(f"{handler} handler of target {target.name} says nothing")
            fault.extents(runs)
            return
        case other:
            raise FaultError(errno.EOPNOTSUPP, f"no handler for {other}")
    if answer is RETRY:
        fault.retry()
    else:
        fault.done()
