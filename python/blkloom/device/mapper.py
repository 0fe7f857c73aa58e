"""The mapper thread of a device: takes faults from the engine in batches and calls the handlers of the targets.

Each device has one such thread, and a mutex for the targets' code, so the Python code of a target never runs on two
threads at the same time. Another thread that closes a target takes the same mutex (`retire`). After the first load of a
target with asynchronous handlers, the thread runs an asyncio loop for them (`async_handlers`). No exception of a target
ends the thread: an `OSError` fails the request with its errno, any other exception with EIO. A request whose handler
raises `RetryLater` waits in the engine, and is handled again every `RETRY_SECONDS`.

The thread also reports I/O errors that the engine has counted (to the log at most once in `TELL_SECONDS`, and to
`told`), and forwards the engine's log (`engine_log`). When no fault waits, and from time to time under load, it lets
targets do a step of background work. It ends when the device has closed, and then closes the tables that are still
loaded.
"""

from __future__ import annotations

import errno
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from blkloom import _engine
from blkloom.device import engine_log
from blkloom.device.answering import CHANGES, call_handler, give_answer
from blkloom.device.compose import LoadedTable, Owner
from blkloom.errors import FaultError, RetryLater, describe_io_error
from blkloom.printing import described
from blkloom.targets.coroutines import has_coroutines
from blkloom.targets.loaded import LoadedTarget
from blkloom.units import Bytes

if TYPE_CHECKING:
    from blkloom.device.async_handlers import AsyncHandlers
    from blkloom.device.device import Device

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
RETRY_SECONDS: Final = 5.0
"""Seconds between two attempts to handle a deferred fault."""
TELL_SECONDS: Final = 1.0
"""Minimum seconds between two reports of I/O errors."""
_WORK_SECONDS: Final = 0.05
"""Maximum seconds by which a stream of faults delays a step of background work."""

_MOST_TOGETHER: Final = 256
"""Maximum number of writes that are prepared before the first of them is answered."""
CANCEL_SECONDS: Final = 5.0
"""Maximum seconds for the end of a cancelled coroutine, but no longer than the time limit of a fault."""


class Mapper:
    """Answers the faults of `device` from its loaded tables. Only the running thread refers to the device, so that a
    closed device is freed at once.
    """

    def __init__(self, device: Device, told: Callable[[], None]) -> None:
        """told: callback after I/O errors were logged."""
        self._told = told
        self._tell_at = 0.0
        self._called = device.called
        self._turn = threading.RLock()
        self._tables: list[LoadedTable] = []
        self._owners: dict[int, Owner] = {}
        self._working: set[int] = set()
        """Owners whose targets have background work."""
        self._worked_at = 0.0
        self._retry_at: float | None = None
        self._handlers: AsyncHandlers | None = None
        """Set after the first load of a target with coroutines."""
        self._asynchronous: set[int] = set()
        """Owners whose targets have coroutines."""
        self._handing_over = False
        self._device: Device | None = None
        """Set while the thread runs."""
        self._reported: set[tuple[type[LoadedTarget], str, type[BaseException], int]] = set()
        self._thread = threading.Thread(
            target=self._run, args=(device,), name=f"blkloom-map {device.name}".rstrip(), daemon=False
        )

    def start(self) -> None:
        """Starts the thread. Raises RuntimeError if the system has no more threads."""
        self._thread.start()

    def add(self, loaded: LoadedTable, device: Device, fault_timeout: float) -> None:
        """Registers this table's owners, whose faults may arrive now. Raises OSError if there can be no asyncio
        loop.
        """
        kinds = {kind for kind in {type(owner.target) for owner in loaded.owners.values()} if has_coroutines(kind)}
        coroutines = [number for number, owner in loaded.owners.items() if type(owner.target) in kinds]
        if coroutines and self._handlers is None:
            self._make_loop(device, fault_timeout)
        with self._turn:
            self._tables.append(loaded)
            self._owners.update(loaded.owners)
            self._asynchronous.update(coroutines)
            for number in coroutines if self._handlers else ():
                self._handlers.add(number, loaded)  # type: ignore[union-attr]

    def _make_loop(self, device: Device, fault_timeout: float) -> None:
        from blkloom.device.async_handlers import AsyncHandlers  # a slow import, which few devices need

        grace = min(fault_timeout, CANCEL_SECONDS)
        handlers = AsyncHandlers(self._turn, device.fault_event(), grace=grace, failed=self._failed)
        handlers.set_handing_over(self._handing_over)
        self._handlers = handlers
        device.wake_mapper()

    def retire(self, loaded: LoadedTable) -> None:
        """Unregisters a table whose owners are in no map any more, and closes it after the current batch. Its waiting
        faults are looked up again in the new map.
        """
        with self._turn:
            if loaded not in self._tables:
                return
            self._tables.remove(loaded)
            for number in loaded.owners:
                del self._owners[number]
            handlers = None if self._asynchronous.isdisjoint(loaded.owners) else self._handlers
            self._asynchronous.difference_update(loaded.owners)
            for number in loaded.owners if handlers else ():
                handlers.forget(number)  # type: ignore[union-attr]
            if handlers is None:
                loaded.close()
        if handlers is not None:
            handlers.loop.call(loaded.close)  # its connections belong to the loop

    def ask(self, question: Callable[[], _T]) -> _T:
        """Calls a target's code between two batches of faults; from a handler, at once."""
        with self._turn:
            return question()

    def ask_to_end(self, question: Callable[[], Any], seconds: float) -> Any:
        """As `ask`; runs a coroutine to its result, for at most the given seconds. Not from a handler."""
        answer = self.ask(question)
        if isinstance(answer, Coroutine):
            if self._handlers is None:
                answer.close()
                raise TypeError("a coroutine was returned that was not defined with 'async def'")
            return self._handlers.loop.run_to_end(answer, seconds)
        return answer

    def wait_until_quiet(self, timeout: float | None) -> bool:
        """Waits until all coroutines of handlers have ended, also those whose request was answered; returns whether
        they have.
        """
        return self._handlers is None or self._handlers.wait_until_quiet(timeout)

    def set_handing_over(self, handing_over: bool) -> None:
        """Turns the interruption of clients' reads on or off; interrupted reads are handed over with the clients. Does
        not wait.
        """
        self._handing_over = handing_over
        if self._handlers is not None:
            self._handlers.set_handing_over(handing_over)

    def try_tell(self, owner: Owner, tell: Callable[[], None]) -> None:
        """Calls a hook of a target, in `ask`. Its exceptions are logged."""
        try:
            tell()
        except Exception:
            _log.exception("%s: target %s", self._called, owner.target.name)

    def has_work(self, owner: int) -> None:
        """Marks the owner's target as having background work. Any thread; the caller wakes the mapper's thread."""
        self._working.add(owner)

    def ended(self, timeout: float) -> bool:
        """Waits for the thread after the device was closed; returns whether it has ended (and closed all tables)."""
        if self._thread.ident is None:
            self._close_all()
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def is_current_thread(self) -> bool:
        """Whether the caller runs on the mapper's thread, in a fault handler."""
        return threading.current_thread() is self._thread

    def _run(self, device: Device) -> None:
        self._device = device
        try:
            alive = True
            while alive and self._handlers is None:
                alive = self._answer_next(device, waits=True)
            if alive and self._handlers is not None:
                with self._turn:
                    self._handlers.loop.run(partial(self._step, device))
            if device.has_new_io_errors:
                self._tell(device)
        finally:
            self._close_all()
            self._device = None

    def _step(self, device: Device) -> float | None:
        """Answers the waiting faults. Returns the seconds until the next call, None once the device has closed."""
        if not self._answer_next(device, waits=False):
            return None
        if self._handlers is not None and self._handlers.look_at_gates(device.gate_changes):
            device.retry_deferred()
        return math.inf if (seconds := self._until_due(device)) is None else seconds

    def _until_due(self, device: Device) -> float | None:
        """Seconds until there is something to do without a new fault."""
        waits = (0.0 if self._working else None, self._until_retry(device), self._until_told(device))
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def _answer_next(self, device: Device, *, waits: bool) -> bool:
        """Takes a batch, waiting for it if so ordered, and answers it. False once the device has closed."""
        faults: list[_engine.Fault] | None = []
        try:
            faults = device.next_faults(self._until_due(device) if waits else 0.0)
            engine_log.forward()
            if faults:
                with self._turn:
                    self._answer_all(device, faults)
            late = time.monotonic() > self._worked_at + _WORK_SECONDS
            if self._working and faults is not None and (late or not faults):
                self._work(device)
        except MemoryError:  # faults lost by this error before we saw them have failed with EIO
            for fault in faults or ():
                fault.fail(errno.ENOMEM)  # only the first answer counts
            _log.error("%s: out of memory while answering faults", self._called)
        return faults is not None

    def _until_retry(self, device: Device) -> float | None:
        """Retries deferred faults when it is time. Returns the seconds until then, None if there are none."""
        if not device.deferred:
            self._retry_at = None
            return None
        now = time.monotonic()
        if self._retry_at is not None and self._retry_at <= now:
            device.retry_deferred()
            self._retry_at = None
        if self._retry_at is None:
            self._retry_at = now + RETRY_SECONDS
        return self._retry_at - now

    def _until_told(self, device: _engine.Device) -> float | None:
        """Logs I/O errors when it is time. Returns the seconds until then, None if there are none."""
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
            _log.error("%s: %s%s", self._called, what, more)
        if others:
            _log.error("%s: %d more I/O errors, of other operations or files", self._called, others)
        self._told()

    def _work(self, device: Device) -> None:
        """Lets each target with background work do one step."""
        for number in list(self._working):
            with self._turn:
                owner = self._owners.get(number)
                try:
                    more = owner is not None and owner.target.work()
                except BaseException:  # as for a handler: it must not end the thread
                    _log.exception("%s: a target's own work failed", self._called)
                    more = False
                device.note_failed_syncs()
                if not more:
                    self._working.discard(number)
        self._worked_at = time.monotonic()

    def _close_all(self) -> None:
        with self._turn:
            if self._handlers is not None:
                self._handlers.end()
            self._owners.clear()
            while self._tables:
                self._tables.pop().close()
            if self._handlers is not None:
                self._handlers.loop.close()

    def _answer_all(self, device: Device, faults: list[_engine.Fault]) -> None:
        """Answers a batch. Flushes come last: they then cover the other requests of the batch, and one call of a target
        answers several.
        """
        if any(fault.sync_failed for fault in faults):
            device.note_failed_syncs()
            for fault in faults:
                if fault.sync_failed:
                    fault.fail(errno.EIO)  # its own errno has precedence
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
        """Tells a target about the reads that arrived for it together."""
        reads: defaultdict[int, list[_engine.Fault]] = defaultdict(list)
        for fault in faults:
            if fault.operation == "read":
                reads[fault.owner].append(fault)
        for number, waiting in reads.items():
            owner = self._owners.get(number)
            if owner is None or len(waiting) < 2 or not owner.target.prefetches:
                continue
            try:
                owner.target.prefetch([(Bytes(fault.offset - owner.start), Bytes(fault.length)) for fault in waiting])
            except BaseException as error:  # the fault is retried as the answer to one of the reads
                self._errno_of(error, owner, waiting[0])

    def _prepare_writes(self, device: Device, faults: list[_engine.Fault]) -> list[_engine.Fault]:
        """Lets targets prepare the writes that arrived for them together. Answers writes that are ready then; returns
        the others.
        """
        writes: defaultdict[int, list[_engine.Fault]] = defaultdict(list)
        for fault in faults:
            if fault.operation == "write":
                writes[fault.owner].append(fault)
        answered: set[_engine.Fault] = set()
        for number, waiting in writes.items():
            owner = self._owners.get(number)
            if owner is None or owner.read_only or not owner.target.prepares_writes:
                continue
            waiting = [fault for fault in waiting if not (fault.no_space or fault.expired)]
            if number in self._asynchronous and self._handlers is not None:
                waiting = [fault for fault in waiting if self._handlers.is_free(number, fault)]
            for low in range(0, len(waiting), _MOST_TOGETHER):
                together = waiting[low : low + _MOST_TOGETHER]
                if len(together) > 1:
                    answered.update(self._prepare_together(device, owner, together))
        return [fault for fault in faults if fault not in answered] if answered else faults

    def _prepare_together(self, device: Device, owner: Owner, writes: list[_engine.Fault]) -> list[_engine.Fault]:
        """Prepares writes together; returns those that have been answered."""
        try:
            ready = owner.target.prepare_writes(
                [(Bytes(fault.offset - owner.start), Bytes(fault.length)) for fault in writes]
            )
        except BaseException as error:  # each fault is handled separately
            self._errno_of(error, owner, writes[0])
            device.note_failed_syncs()
            return []
        answered = [writes[number] for number in ready]
        for fault in answered:
            fault.retry()
        return answered

    def _answer(self, device: Device, faults: list[_engine.Fault]) -> None:
        """Answers one fault, or several flushes of one target with one call."""
        first = faults[0]
        owner = self._owners.get(first.owner)
        if owner is None:  # its table was replaced while it waited
            for fault in faults:
                fault.retry()
            return
        if first.owner in self._asynchronous and self._handlers is not None:
            self._handlers.submit(first.owner, owner, faults)
            return
        if first.operation in CHANGES and first.expired:
            # The request has failed already, and its client may have written there since.
            first.fail(errno.ETIMEDOUT)
            return
        try:
            answer = call_handler(owner, first)
            for fault in faults:
                give_answer(owner, fault, answer)
        except BaseException as error:  # not even SystemExit of a target may end the thread
            self._failed(owner, faults, error)

    def _failed(self, owner: Owner, faults: list[_engine.Fault], error: BaseException) -> None:
        """Answers faults whose handler has raised `error`."""
        first, device = faults[0], self._device
        if isinstance(error, RetryLater):
            if device is not None:
                device.note_failed_syncs()
            first_of_all = not (first.again or (device and device.deferred))
            for fault in faults:
                fault.defer(error.errno or errno.EIO, error.seconds)
            if first_of_all:
                self._say_that_it_waits(error, owner, first)
        else:
            number = self._errno_of(error, owner, first)
            if device is not None:
                device.note_failed_syncs()
            for fault in faults:
                fault.fail(number)

    def _say_that_it_waits(self, waits: RetryLater, owner: Owner, fault: _engine.Fault) -> None:
        try:
            waits.begins()
        except BaseException as error:
            self._errno_of(error, owner, fault)

    def _errno_of(self, error: BaseException, owner: Owner, fault: _engine.Fault) -> int:
        """The errno for the request. An error that users must know goes to the log, once."""
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
                "%s: target %s failed a %s of %d bytes at %d: %s (said once)",
                self._called,
                owner.target.name,
                fault.operation,
                fault.length,
                fault.offset,
                described(error),
                exc_info=None if expected else error,
            )
        return (error.errno if isinstance(error, OSError) else None) or errno.EIO
