"""A worker's end of the channel to one supervisor: receives requests, sends answers and notifications, asks for files.

All messages go through one queue, so a notification that was posted before a reply arrives before it. Requests run as
tasks. When the channel closes, their requests for files fail, and the tasks finish. Runs on the event loop, except for
the calls of `opener_for`, which come from threads that load tables.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from blkloom import open_files
from blkloom.control.async_channel import AsyncChannel
from blkloom.control.endpoint import Endpoint, NoAnswer
from blkloom.control.failures import to_failure
from blkloom.control.framing import ChannelClosed
from blkloom.control.messages import (
    PROTOCOL,
    DeviceChanged,
    Drop,
    Hello,
    Keep,
    OpenFile,
    Reply,
    SyncFailed,
    WorkerRequest,
)
from blkloom.control.states import FailedSync
from blkloom.errors import BackingError
from blkloom.worker.load_descriptors import FileOpener

_log = logging.getLogger(__name__)

_OPEN_TIMEOUT: Final = 120.0
"""Seconds for the client that ordered a load to open a file; the client has a shorter limit of its own."""

_LAST_WORDS: Final = 5.0
"""Seconds for the supervisor to read the messages."""

Handler = Callable[[WorkerRequest, list[int], FileOpener], Awaitable[Any]]
"""Executes a request; owns the descriptors. Returns the result; an exception becomes a Failure."""


class SupervisorLink:
    """A connection over `channel`. greeting: the first message. greeted: called with the greeting of the supervisor."""

    def __init__(
        self,
        channel: AsyncChannel,
        greeting: Hello,
        handler: Handler,
        greeted: Callable[[SupervisorLink, Hello], None],
    ) -> None:
        self._channel = channel
        self._greeting = greeting
        self._handler = handler
        self._greeted = greeted
        self._outgoing: asyncio.Queue[tuple[Any, list[int]] | None] = asyncio.Queue()
        self._endpoint = Endpoint(self._post, _gone)
        self._requests: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._ended = False

    async def run(self) -> None:
        """Runs until the supervisor disconnects or `end` is called."""
        writer = asyncio.create_task(self._write(), name="worker speaks")
        self.post(self._greeting)
        try:
            while True:
                message, descriptors = await self._channel.receive()
                self._take(message, descriptors)
        except ConnectionError as error:
            level = logging.DEBUG if isinstance(error, ChannelClosed) else logging.ERROR
            _log.log(level, "the supervisor's channel has ended: %s", error)
        finally:
            self._ended = True
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            await self._channel.close()
            self._endpoint.end()
            while not self._outgoing.empty():
                _close_all((self._outgoing.get_nowait() or (None, []))[1])
                self._outgoing.task_done()

    async def end(self) -> None:
        """Sends the queued messages, then ends."""
        if self._ended:
            return
        self._outgoing.put_nowait(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS):
                await self._outgoing.join()
        await self._channel.close()

    def post(
        self, message: Reply | Keep | Drop | DeviceChanged | OpenFile | Hello | Any, fds: Sequence[int] = ()
    ) -> None:
        """Queues a message. The caller still owns the descriptors. Raises OSError if there is no free descriptor for a
        copy.
        """
        if self._ended:
            return
        copies: list[int] = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))
        except OSError:
            _close_all(copies)
            raise
        self._outgoing.put_nowait((message, copies))

    async def _post(self, message: Any, fds: Sequence[int] = ()) -> None:
        self.post(message, fds)

    async def sent(self) -> None:
        """Waits until all queued messages are sent and the copies of their descriptors are closed."""
        await self._outgoing.join()

    def opener_for(self, request: int) -> FileOpener:
        """Returns a function that opens files through the supervisor, for `request`. Call it on other threads only."""

        def ask(path: str, *, writable: bool, direct: bool, exclusive: bool, opened: int | None = None) -> int:
            wish = OpenFile(id=0, request=request, path=path, writable=writable, direct=direct, exclusive=exclusive)
            return asyncio.run_coroutine_threadsafe(self._ask(wish, opened), self._loop).result()

        return ask

    async def _ask(self, wish: OpenFile, opened: int | None) -> int:
        try:
            return int(await self._endpoint.ask(wish, () if opened is None else (opened,), timeout=_OPEN_TIMEOUT))
        except NoAnswer as error:
            raise BackingError(
                f"could not be opened within {_OPEN_TIMEOUT:g} s",
                path=wish.path,
                errno=errno.ETIMEDOUT,
                cure="see what keeps its storage",
            ) from error
        except ConnectionResetError as error:
            raise BackingError(
                "could not be opened: the supervisor ended meanwhile",
                path=wish.path,
                errno=errno.ECONNRESET,
                cure="load the table again",
            ) from error

    async def confirm(self, minor: int, failed_syncs: list[FailedSync]) -> None:
        """Sends failed syncs and waits until the supervisor has recorded them. Raises ConnectionError if it
        disconnects.
        """
        await self._endpoint.ask(SyncFailed(id=0, minor=minor, failed_syncs=failed_syncs), timeout=None)

    def _take(self, message: object, descriptors: list[int]) -> None:
        match message:
            case Hello():
                if message.protocol != PROTOCOL:
                    raise ConnectionError(f"the supervisor speaks protocol {message.protocol}, this is {PROTOCOL}")
                self._greeted(self, message)
            case WorkerRequest():
                task = asyncio.create_task(self._serve(message, descriptors), name=f"request {message.id}")
                self._requests.add(task)
                task.add_done_callback(self._requests.discard)
                return
            case _:
                self._endpoint.take(message, descriptors)
        _close_all(descriptors)

    async def _serve(self, request: WorkerRequest, descriptors: list[int]) -> None:
        try:
            result = await self._handler(request, descriptors, self.opener_for(request.id))
        except Exception as error:
            if not isinstance(error, OSError | ValueError):
                _log.exception("request %d (%s)", request.id, type(request.call).__name__)
            self.post(to_failure(request.id, error))
        else:
            self.post(Reply(id=request.id, result=result))

    async def _write(self) -> None:
        while (item := await self._outgoing.get()) is not None:
            message, descriptors = item
            try:
                await self._channel.send(message, descriptors)
            except ChannelClosed:
                pass  # the reader notices this, and ends the connection
            finally:
                _close_all(descriptors)
                self._outgoing.task_done()
        self._outgoing.task_done()


def _gone() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "the supervisor has gone")


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        open_files.close(descriptors.pop())
