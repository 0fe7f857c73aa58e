"""The asyncio loop of one backend: takes operations from its queue, and runs the backend's coroutines.

Imported when a table with a backend is loaded, because the import of asyncio is slow. The loading thread creates the
loop, and any thread may close it. Everything else runs on the loop's own thread.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Final

from blkloom import _engine
from blkloom.errors import FaultError
from blkloom.printing import described
from blkloom.units import Bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from blkloom.targets.backend import Backend

_log = logging.getLogger(__name__)
CLOSE_SECONDS: Final = 5.0
"""How long coroutines may take to end when the backend is closed, and how long its own `close` may take."""


class BackendLoop:
    """Event loop and thread of one backend. Runs until `close`."""

    def __init__(self, backend: Backend) -> None:
        """Starts the thread. Raises OSError or RuntimeError if the loop or the thread cannot be created."""
        self._backend = backend
        self._name = type(backend).__name__
        self.queue = _engine.BackendQueue(
            longest=backend.longest, most=backend.most_in_flight, most_bytes=backend.most_bytes_in_flight
        )
        self._tasks: dict[tuple[int, int, int], asyncio.Task[None]] = {}
        self._reported: set[tuple[str, type[BaseException]]] = set()
        self._events = asyncio.SelectorEventLoop()
        backend.loop = self._events
        self._thread = threading.Thread(target=self._run, name=f"blkloom-back {self._name}")
        try:
            self._thread.start()
        except RuntimeError:
            self._events.close()
            raise

    def close(self) -> None:
        """Cancels unfinished operations and waits for the backend to close. Not on the loop's thread."""
        self.queue.close()
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join()

    def _run(self) -> None:
        self._events.add_reader(self.queue.fileno(), self._take)
        self._events.run_forever()
        self._events.remove_reader(self.queue.fileno())
        try:
            self._events.run_until_complete(self._end())
        finally:
            self._events.close()

    def _take(self) -> None:
        begun, cancelled = self.queue.take()
        for name in cancelled:
            if (task := self._tasks.get(name)) is not None:
                task.cancel()
        for operation in begun:
            task = self._events.create_task(self._serve(operation))
            self._tasks[operation.id] = task
            task.add_done_callback(partial(self._forget, operation))

    def _forget(self, operation: _engine.BackendOperation, task: asyncio.Task[None]) -> None:
        """Removes a task that ended, or that was cancelled before it began."""
        operation.fail(errno.ESHUTDOWN)  # only the first answer counts
        if self._tasks.get(operation.id) is task:
            del self._tasks[operation.id]

    async def _serve(self, operation: _engine.BackendOperation) -> None:
        """Runs one operation. Never raises, so that not even SystemExit leaves the loop."""
        try:
            answer = await self._call(operation)
            if operation.operation == "read" and (size := memoryview(answer or b"").nbytes) != operation.length:
                raise ValueError(f"{self._name}.read returned {size} bytes, not {operation.length}")
            operation.done(answer)
        except (asyncio.CancelledError, GeneratorExit):  # the latter: it did not end before the loop had
            operation.fail(errno.ESHUTDOWN)
            raise
        except BaseException as error:
            operation.fail(self._errno_of(error, operation))

    async def _call(self, operation: _engine.BackendOperation) -> Buffer | None:
        backend, offset, length = self._backend, Bytes(operation.offset), Bytes(operation.length)
        match operation.operation:
            case "read":
                return await backend.read(offset, length)
            case "write":
                await backend.write(offset, operation.payload(), fua=operation.fua)
            case "write_zeroes":
                await backend.write_zeroes(offset, length, may_unmap=operation.may_unmap)
            case "discard":
                await backend.discard(offset, length)
            case "flush":
                await (backend.flush_for_suspend() if operation.suspending else backend.flush())
            case other:
                raise FaultError(errno.EOPNOTSUPP, f"no operation {other}")
        return None

    def _errno_of(self, error: BaseException, operation: _engine.BackendOperation) -> int:
        """The errno of the request. Errors that the user must know about are logged, once for each kind."""
        if isinstance(error, FaultError):
            return error.errno or errno.EIO
        if isinstance(error, MemoryError):
            return errno.ENOMEM
        expected = isinstance(error, OSError)
        if (kind := (operation.operation, type(error))) not in self._reported:
            self._reported.add(kind)
            what = "backend %s failed a %s of %d bytes at %d: %s (said once)"
            level, trace = (logging.WARNING, None) if expected else (logging.ERROR, error)
            of = (self._name, operation.operation, operation.length, operation.offset)
            _log.log(level, what, *of, described(error), exc_info=trace)
        return (error.errno if isinstance(error, OSError) else None) or errno.EIO

    async def _end(self) -> None:
        """Cancels unfinished operations and closes the backend. Those that do not end in time are never resumed."""
        tasks = set(self._tasks.values())
        for task in tasks:
            task.cancel()
        late = (await asyncio.wait(tasks, timeout=CLOSE_SECONDS))[1] if tasks else set()
        if late:
            what = "backend %s: %d operations did not end within %g s of being cancelled"
            _log.error(what, self._name, len(late), CLOSE_SECONDS)
        try:
            await asyncio.wait_for(self._backend.close(), CLOSE_SECONDS)
        except BaseException:
            _log.exception("backend %s failed to close", self._name)
        await self._events.shutdown_asyncgens()
        await self._events.shutdown_default_executor()
