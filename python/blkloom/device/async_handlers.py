"""Asynchronous fault handlers: starts, limits and cancels coroutines of targets, on the mapper's thread.

Imported when a target with such a handler is loaded, because the import of asyncio is slow.

A request (`_Handling`) has four states: it waits for the locks of its clusters (`cluster_locks`); it waits until fewer
handlers run than the limit; it runs; it has ended. Its time limit includes both waits. A suspend, or a hand-over of a
client, *interrupts* requests that change nothing: their handlers are cancelled, and the requests wait in the engine (or
go to the next worker) and are handled again later. Other requests are waited for. At the end of the device, running
handlers are cancelled (ETIMEDOUT), and requests without a running handler fail with ESHUTDOWN. A handler that is
cancelled has `grace` seconds to end; after that it is never resumed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Final

from blkloom.device.answering import call_handler, give_answer
from blkloom.device.cluster_locks import MOST_CLUSTERS, ClusterLock, ClusterLocks
from blkloom.device.handler_loop import HandlerLoop, Revocable

if TYPE_CHECKING:
    from blkloom import _engine
    from blkloom.device.compose import LoadedTable, Owner
    from blkloom.targets.loaded import LoadedTarget

_log = logging.getLogger(__name__)

_QUERIES: Final = frozenset({"read", "extents"})
"""Operations that change nothing for a client, so they can be handled again."""
_NONE: Final = range(0)
"""No cluster."""


class _Handling(ClusterLock):
    """A fault, or several flushes, of one target with coroutines, from the arrival to the answer."""

    __slots__ = (
        "bound",
        "cancelled",
        "faults",
        "interrupted",
        "number",
        "over",
        "owner",
        "revocable",
        "task",
        "weight",
    )

    def __init__(self, number: int, owner: Owner, faults: list[_engine.Fault], bound: _Bound) -> None:
        super().__init__()
        self.number = number
        self.owner = owner
        self.faults = faults
        self.bound = bound
        self.weight = faults[0].length if faults[0].operation in ("read", "write") else 0
        """Bytes of its payload or of its answer."""
        self.task: asyncio.Task[None] | None = None
        self.revocable: Revocable | None = None
        self.interrupted = False
        self.cancelled = False
        self.over = False

    @property
    def is_query(self) -> bool:
        return self.faults[0].operation in _QUERIES

    @property
    def time_left(self) -> float:
        """Seconds until the time limit of the request."""
        return max(fault.time_left for fault in self.faults)


class _Bound:
    """Limits of one target class in a device: its running handlers, and the requests that wait for them."""

    __slots__ = ("bytes", "count", "most", "most_bytes", "pumping", "waiting")

    def __init__(self, target: type[LoadedTarget]) -> None:
        self.most = target.most_in_flight
        self.most_bytes = target.most_bytes_in_flight
        self.count = 0
        self.bytes = 0
        self.waiting: deque[_Handling] = deque()
        self.pumping = False

    def has_room_for(self, handling: _Handling) -> bool:
        """Whether another request may run. One request is always allowed."""
        return not self.count or (self.count < self.most and self.bytes + handling.weight <= self.most_bytes)


class AsyncHandlers:
    """The asynchronous handlers of one device. Methods run on the mapper's thread and hold the turn mutex, unless they
    say otherwise.
    """

    def __init__(
        self,
        turn: threading.RLock,
        event: int,
        *,
        grace: float,
        failed: Callable[[Owner, list[_engine.Fault], BaseException], None],
    ) -> None:
        """Any thread. event: see `Device.fault_event`. failed: answers faults whose handler raised. Raises OSError."""
        self._grace = grace
        self._failed = failed
        self.loop = HandlerLoop(turn, event, grace)
        self._handing_over = False
        self._ending = False
        self._has_interrupted = False
        self._gate_changes = -1
        self._alive: dict[_Handling, None] = {}
        """Requests that have not ended, in the order of their arrival."""
        self._running: set[_Handling] = set()
        self._quiet: list[asyncio.Future[None]] = []
        """Futures to complete when no handler runs."""
        self._bounds: dict[type[LoadedTarget], _Bound] = {}
        self._locks: defaultdict[int, ClusterLocks] = defaultdict(ClusterLocks)
        self._tables: dict[int, LoadedTable] = {}
        self._flushes: dict[int, list[_engine.Fault]] = {}
        """By owner whose flush runs: the flushes that arrived since."""
        self._expiry: asyncio.TimerHandle | None = None

    # Any thread

    def add(self, number: int, loaded: LoadedTable) -> None:
        """Registers the owner `number` of `loaded`: its requests come here. The caller holds the turn mutex."""
        self._tables[number] = loaded

    def forget(self, number: int) -> None:
        """Unregisters owners. Requests for them that still arrive are looked up again. The caller holds the turn
        mutex.
        """
        self._tables.pop(number, None)
        self._locks.pop(number, None)

    def wait_until_quiet(self, timeout: float | None) -> bool:
        """Waits until all handlers have ended; returns whether they have. Without the turn mutex, and not from the
        loop.
        """
        if not self._running or (work := self.loop.submitted(self._until_quiet())) is None:
            return True
        try:
            work.result(timeout)
        except TimeoutError:
            work.cancel()
            return False
        return True

    def set_handing_over(self, handing_over: bool) -> None:
        """Turns the interruption of requests that clients wait for on or off. Does not wait."""
        self._handing_over = handing_over
        self.loop.call_soon(self._interrupt_all)

    def end(self) -> None:
        """Starts no more handlers, and waits for the threads that handlers have started."""
        self._ending = True
        for handling in list(self._alive):
            if handling.over:
                continue
            if handling in self._running:
                self._cancel(handling)
            else:
                self._give_up(handling, errno.ESHUTDOWN)
        self.loop.wait(self._until_quiet())
        self.loop.end()

    # Requests

    def submit(self, number: int, owner: Owner, faults: list[_engine.Fault]) -> None:
        """Passes one fault, or several flushes, to the owner's handler."""
        fault = faults[0]
        if fault.operation == "flush":
            if number in self._flushes:
                self._flushes[number] += faults
                return
            self._flushes[number] = []
        elif fault.operation in _QUERIES and self._is_to_yield(fault):
            self._interrupt_fault(fault)
            return
        kind = type(owner.target)
        if (bound := self._bounds.get(kind)) is None:
            bound = self._bounds[kind] = _Bound(kind)
        handling = _Handling(number, owner, faults, bound)
        self._alive[handling] = None
        if self._expiry is None:
            self._expiry = self.loop.events.call_later(handling.time_left, self._expire)
        if fault.operation == "flush":
            self._begin(handling)  # one for each target at a time; it has no lock
        elif (clusters := self._clusters(number, fault)) is _NONE or self._locks[number].enter(handling, clusters):
            self._pump(bound, handling)

    def is_free(self, number: int, fault: _engine.Fault) -> bool:
        """Whether no request in progress touches the same clusters."""
        return (clusters := self._clusters(number, fault)) is _NONE or self._locks[number].is_free(clusters)

    def look_at_gates(self, changes: int) -> bool:
        """Interrupts requests that delay the closing of a gate. changes: see `Device.gate_changes`. Returns whether
        requests interrupted before are to be handled again.
        """
        if changes == self._gate_changes:
            return False
        self._gate_changes = changes
        before, self._has_interrupted = self._has_interrupted, False
        self._interrupt_all()
        return before

    def _clusters(self, number: int, fault: _engine.Fault) -> range | None:
        """The clusters of the segment that the request touches; None: all."""
        if fault.operation != "extents" and number in self._tables:
            for start, end, cluster in self._tables[number].cluster_runs(number):
                if start <= fault.offset < end:
                    first = start + (fault.offset - start) // cluster * cluster
                    clusters = range(first, fault.offset + max(fault.length, 1), cluster)
                    return clusters if len(clusters) <= MOST_CLUSTERS else None
        return _NONE

    def _pump(self, bound: _Bound, *more: ClusterLock) -> None:
        """Starts as many handlers as the limits allow, in the order of arrival."""
        bound.waiting.extend(more)  # type: ignore[arg-type]
        if bound.pumping:  # a handler that was no coroutine has ended; no deeper
            return
        bound.pumping = True
        try:
            while bound.waiting and (bound.waiting[0].over or bound.has_room_for(bound.waiting[0])):
                if not (handling := bound.waiting.popleft()).over:
                    self._begin(handling)
        finally:
            bound.pumping = False

    def _begin(self, handling: _Handling) -> None:
        faults, owner = handling.faults, handling.owner
        operation = faults[0].operation
        handling.bound.count += operation != "flush"
        handling.bound.bytes += handling.weight
        self._running.add(handling)
        if handling.number not in self._tables:  # its table was replaced while it waited
            for fault in faults:
                fault.retry()
            self._end(handling)
            return
        if self._ending or handling.time_left <= 0:
            self._give_up(handling, errno.ESHUTDOWN if self._ending else errno.ETIMEDOUT)
            return
        try:
            answer = call_handler(owner, faults[0])
            if isinstance(answer, Coroutine):
                handling.revocable = Revocable(answer)
                handling.task = self.loop.events.create_task(self._serve(handling, handling.revocable))
                return
            self._give(handling, answer)
        except BaseException as error:
            self._fail(handling, error)
        self._end(handling)

    async def _serve(self, handling: _Handling, revocable: Revocable) -> None:
        """Runs one handler and gives its answer. Never raises, so that not even SystemExit leaves the loop."""
        try:
            answer = await revocable
            if not handling.over:
                self._give(handling, answer)
        except BaseException as error:
            if not handling.over:
                self._fail(handling, error)
        if not handling.over:
            self._end(handling)

    def _give(self, handling: _Handling, answer: object) -> None:
        for fault in handling.faults:
            give_answer(handling.owner, fault, answer)

    def _fail(self, handling: _Handling, error: BaseException) -> None:
        if handling.interrupted:
            for fault in handling.faults:
                self._interrupt_fault(fault)
        elif handling.cancelled:
            for fault in handling.faults:
                fault.fail(errno.ETIMEDOUT)
        else:
            self._failed(handling.owner, handling.faults, error)

    def _end(self, handling: _Handling) -> None:
        handling.over = True
        del self._alive[handling]
        if handling in self._running:
            self._running.discard(handling)
            handling.bound.count -= handling.faults[0].operation != "flush"
            handling.bound.bytes -= handling.weight
        if not self._running:
            for waiter in self._quiet:
                if not waiter.done():
                    waiter.set_result(None)
            self._quiet.clear()
        locks = self._locks.get(handling.number)
        self._pump(handling.bound, *(locks.leave(handling) if locks is not None else ()))
        if handling.faults[0].operation == "flush" and (since := self._flushes.pop(handling.number)):
            self.submit(handling.number, handling.owner, since)

    # Early ends: interruption, time limit

    def _is_to_yield(self, fault: _engine.Fault) -> bool:
        return (self._handing_over and fault.from_client) or fault.blocks_suspend

    def _interrupt_fault(self, fault: _engine.Fault) -> None:
        self._has_interrupted = True  # first, because a thread that opens a gate after the next line checks this later
        if self._is_to_yield(fault):
            fault.interrupt(errno.ESHUTDOWN)
        else:
            fault.retry()

    def _interrupt_all(self) -> None:
        """Interrupts requests that change nothing, because a suspend or a hand-over waits for them."""
        for handling in reversed(list(self._alive)):  # so that none starts in the place of another
            if handling.over or handling.cancelled or not handling.is_query:
                continue
            if self._is_to_yield(handling.faults[0]):
                handling.interrupted = True
                if handling in self._running:
                    self._cancel(handling)
                else:
                    self._interrupt_fault(handling.faults[0])
                    self._end(handling)

    def _expire(self) -> None:
        """Cancels handlers that have exceeded their time limit."""
        self._expiry = None
        for handling in list(self._alive):
            if handling.over or handling.cancelled or handling.time_left > 0:
                continue
            if handling in self._running:
                self._cancel(handling)
            else:
                self._give_up(handling, errno.ETIMEDOUT)
        left = min((handling.time_left for handling in self._alive if not handling.cancelled), default=None)
        if left is not None:
            self._expiry = self.loop.events.call_later(left, self._expire)

    def _give_up(self, handling: _Handling, number: int) -> None:
        for fault in handling.faults:
            fault.fail(number)
        self._end(handling)

    def _cancel(self, handling: _Handling) -> None:
        if handling.task is None or handling.revocable is None or handling.cancelled:
            return
        handling.cancelled = True
        handling.task.cancel()
        if not handling.revocable.started:  # then the task does not even start
            handling.revocable.close()
            self._fail(handling, asyncio.CancelledError())
            self._end(handling)
        else:
            self.loop.events.call_later(self._grace, self._drop, handling)

    def _drop(self, handling: _Handling) -> None:
        """Revokes a handler that has not ended after its cancellation: it is never resumed."""
        if handling.over or handling.revocable is None or handling.task is None:
            return
        fault, name = handling.faults[0], handling.owner.target.name
        why = None
        try:
            handling.revocable.revoke()
        except BaseException as error:
            why = error
        what = "target %s: its handler of a %s of %d bytes at %d did not end within %g s of being cancelled; %s"
        _log.error(what, name, fault.operation, fault.length, fault.offset, self._grace, why or "it was closed")
        self._fail(handling, asyncio.CancelledError())
        self._end(handling)
        handling.task.cancel()

    async def _until_quiet(self) -> None:
        while self._running:
            waiter: asyncio.Future[None] = self.loop.events.create_future()
            self._quiet.append(waiter)
            await waiter
