"""The asyncio loop that runs a device's coroutines on its mapper's thread.

It holds the turn mutex (the mutex for the targets' code, see `mapper`) except while it waits, so the Python code of a
target never runs on two threads at the same time: between two awaits, a coroutine is alone. The thread that first loads
a target with coroutines makes the loop; it ends with the mapper.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import selectors
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any, TypeVar

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class _TurnSelector(selectors.DefaultSelector):
    """Selector that releases the turn mutex while the loop waits."""

    def __init__(self, turn: threading.RLock) -> None:
        super().__init__()
        self._turn = turn

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Waits for events without the turn mutex, and takes it again."""
        self._turn.release()
        try:
            return super().select(timeout)
        finally:
            self._turn.acquire()


class Revocable:
    """Awaitable that wraps a handler's coroutine. After `revoke`, the coroutine is closed and never resumed."""

    __slots__ = ("_coroutine", "_revoked", "started")

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._coroutine = coroutine
        self._revoked = False
        self.started = False

    def revoke(self) -> None:
        """Closes the coroutine. Raises the exception that the coroutine raises then."""
        self._revoked = True
        self._coroutine.close()

    def __await__(self) -> Revocable:
        self.started = True
        return self

    def __iter__(self) -> Revocable:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        """As `send` of a coroutine."""
        if self._revoked:
            raise asyncio.CancelledError
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        """As `throw` of a coroutine."""
        if self._revoked:
            raise asyncio.CancelledError
        return self._coroutine.throw(*error)

    def close(self) -> None:
        """As `close` of a coroutine."""
        if not self._revoked:
            self._coroutine.close()


class HandlerLoop:
    """The asyncio loop of one device. Methods run on the mapper's thread and hold the turn mutex, unless they say
    otherwise.
    """

    def __init__(self, turn: threading.RLock, event: int, grace: float) -> None:
        """Any thread. event: see `Device.fault_event`. grace: seconds for what was cancelled to end. Raises OSError."""
        self._turn = turn
        self._event = event
        self._grace = grace
        self.events = asyncio.SelectorEventLoop(_TurnSelector(turn))
        self._ended = False

    # Any thread

    def call(self, act: Callable[[], None]) -> None:
        """Calls `act` on the loop, and waits for its result. Without the turn mutex, and not from the loop."""
        done: Future[None] = Future()

        def called() -> None:
            try:
                act()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        with self._turn:
            if not (ended := self._ended):
                self.call_soon(called)
        act() if ended else done.result()

    def run_to_end(self, coroutine: Coroutine[Any, Any, Any], timeout: float) -> Any:
        """Runs a coroutine of a target and returns its result. It is cancelled after `timeout` seconds, with OSError
        (ETIMEDOUT); its own exceptions are raised. Without the turn mutex, and not from the loop.
        """
        if (work := self.submitted(self._bounded(coroutine, timeout))) is None:
            coroutine.close()
            raise OSError(errno.ESHUTDOWN, "the device has closed")
        try:
            answer, error = work.result()
        except CancelledError:
            raise OSError(errno.ESHUTDOWN, "the device has closed") from None
        if error is not None:
            raise error
        return answer

    def submitted(self, coroutine: Coroutine[Any, Any, _T]) -> Future[_T] | None:
        """A future for the coroutine, None if the loop has ended. Without the turn mutex."""
        with self._turn:
            if not self._ended:
                return asyncio.run_coroutine_threadsafe(coroutine, self.events)
        coroutine.close()
        return None

    def call_soon(self, act: Callable[[], None]) -> None:
        """Schedules `act` on the loop, unless the loop ends before that. Does not wait."""
        try:
            self.events.call_soon_threadsafe(act)
        except RuntimeError:  # it has ended
            return

    # The loop

    def run(self, step: Callable[[], float | None]) -> None:
        """Runs until `step` returns None. step: answers faults; it is called when there are some, and after as many
        seconds as it returned (inf: only for faults).
        """
        timer: asyncio.TimerHandle | None = None
        closed = False

        def on_event() -> None:
            nonlocal timer, closed
            if timer is not None:
                timer.cancel()
                timer = None
            seconds = step()
            if seconds is None:
                closed = True
                self.events.stop()
            elif seconds < math.inf:
                timer = self.events.call_later(seconds, on_event)

        self.events.add_reader(self._event, on_event)
        self.events.call_soon(on_event)
        while not closed:
            self._run_on(self.events.run_forever)
        self.events.remove_reader(self._event)

    def end(self) -> None:
        """Accepts nothing more, cancels running coroutines, and waits for the threads that they have started."""
        self._ended = True
        others = asyncio.all_tasks(self.events)
        for task in others:
            task.cancel()
        if others:
            self.wait(asyncio.wait(others, timeout=self._grace))
        self.wait(self.events.shutdown_asyncgens())
        self.wait(self.events.shutdown_default_executor())

    def close(self) -> None:
        """Closes the loop, after `end`."""
        self.wait(asyncio.sleep(0))  # transports that were closed since then
        self.events.close()

    def wait(self, what: Coroutine[Any, Any, Any]) -> None:
        """Runs the loop until `what` has ended."""
        self._run_on(partial(self.events.run_until_complete, what))

    def _run_on(self, run: Callable[..., Any]) -> None:
        """Runs the loop, again if a task of a target raises SystemExit or the like, which asyncio does not catch."""
        try:
            run()
        except BaseException:
            _log.exception("a task of a target's")

    async def _bounded(self, coroutine: Coroutine[Any, Any, Any], timeout: float) -> tuple[Any, BaseException | None]:
        revocable = Revocable(coroutine)

        async def outcome() -> tuple[Any, BaseException | None]:
            try:
                return await revocable, None
            except BaseException as error:
                return None, error

        task = self.events.create_task(outcome())
        done, _ = await asyncio.wait({task}, timeout=timeout)
        if done:
            return task.result()
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=self._grace)
        if not done:
            revocable.revoke()
        return None, TimeoutError(errno.ETIMEDOUT, f"no answer in {timeout:g} s")
