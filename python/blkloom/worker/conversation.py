"""A worker's side of one supervisor's channel: requests in, answers and news out, files asked for.

Everything that is said goes through one queue, so what was posted before a reply arrives before it.
Requests run as tasks; the channel's end fails what they asked for and lets them finish. On the event
loop, except for `asker`'s calls, which come from threads that load.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Any, Final

from blkloom import open_files
from blkloom.control.async_channel import AsyncChannel
from blkloom.control.failures import to_failure
from blkloom.control.framing import ChannelClosed
from blkloom.control.messages import (
    PROTOCOL,
    Drop,
    Happened,
    Hello,
    Keep,
    Noted,
    Opened,
    OpenFile,
    OpenRefused,
    Reply,
    SyncFailed,
    WorkerRequest,
)
from blkloom.control.states import FailedSync
from blkloom.errors import BackingError
from blkloom.worker.stock import Ask

_log = logging.getLogger(__name__)

_OPEN_TIMEOUT: Final = 120.0
"""Seconds for the one who ordered a load to open a file; he has a shorter bound himself."""

_LAST_WORDS: Final = 5.0
"""Seconds the supervisor has to read them."""

Handler = Callable[[WorkerRequest, list[int], Ask], Awaitable[Any]]
"""Does what a request asks; owns the descriptors. Returns the result, raises what becomes a Failure."""


class Conversation:
    """Over `channel`. greeting: the first thing said. greeted: called with the supervisor's greeting."""

    def __init__(
        self,
        channel: AsyncChannel,
        greeting: Hello,
        handler: Handler,
        greeted: Callable[[Conversation, Hello], None],
    ) -> None:
        self._channel = channel
        self._greeting = greeting
        self._handler = handler
        self._greeted = greeted
        self._outgoing: asyncio.Queue[tuple[Any, list[int]] | None] = asyncio.Queue()
        self._asked: dict[int, asyncio.Future[int]] = {}
        self._numbers = count(1)
        self._requests: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._ended = False

    async def run(self) -> None:
        """Until the supervisor goes or `end`."""
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
            for asked in self._asked.values():
                if not asked.done():
                    asked.set_exception(ConnectionResetError(errno.ECONNRESET, "the supervisor has gone"))
            while not self._outgoing.empty():
                _close_all((self._outgoing.get_nowait() or (None, []))[1])
                self._outgoing.task_done()

    async def end(self) -> None:
        """Says what is still to be said, then ends."""
        if self._ended:
            return
        self._outgoing.put_nowait(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS):
                await self._outgoing.join()
        await self._channel.close()

    def post(self, message: Reply | Keep | Drop | Happened | OpenFile | Hello | Any, fds: Sequence[int] = ()) -> None:
        """Says something, after all that was posted before; the descriptors stay the caller's. Raises
        OSError when there are no descriptors left to send.
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

    async def told(self) -> None:
        """Returns when all that was posted has been sent, and the copies of its descriptors are closed."""
        await self._outgoing.join()

    def asker(self, request: int) -> Ask:
        """Opens files through the supervisor, on behalf of `request`. For threads other than the loop's."""

        def ask(path: str, *, writable: bool, direct: bool, exclusive: bool, opened: int | None = None) -> int:
            wish = OpenFile(id=0, request=request, path=path, writable=writable, direct=direct, exclusive=exclusive)
            return asyncio.run_coroutine_threadsafe(self._ask(wish, opened), self._loop).result()

        return ask

    async def _ask(self, wish: OpenFile, opened: int | None) -> int:
        wish.id = next(self._numbers)
        answered: asyncio.Future[int] = self._loop.create_future()
        self._asked[wish.id] = answered
        try:
            if self._ended:
                raise ConnectionResetError(errno.ECONNRESET, "the supervisor has gone")
            self.post(wish, () if opened is None else (opened,))
            async with asyncio.timeout(_OPEN_TIMEOUT):
                return await answered
        except TimeoutError as error:
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
        finally:
            del self._asked[wish.id]

    async def confirm(self, minor: int, failed_syncs: list[FailedSync]) -> None:
        """The supervisor has noted them when this returns. Raises ConnectionError when it goes."""
        number = next(self._numbers)
        noted: asyncio.Future[int] = self._loop.create_future()
        self._asked[number] = noted
        try:
            if self._ended:
                raise ConnectionResetError(errno.ECONNRESET, "the supervisor has gone")
            self.post(SyncFailed(id=number, minor=minor, failed_syncs=failed_syncs))
            await noted
        finally:
            del self._asked[number]

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
            case Opened() if descriptors and (asked := self._asked.get(message.id)) and not asked.done():
                asked.set_result(descriptors.pop(0))
            case Opened() if (asked := self._asked.get(message.id)) and not asked.done():
                asked.set_exception(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            case OpenRefused() if (asked := self._asked.get(message.id)) and not asked.done():
                asked.set_exception(OSError(message.errno, os.strerror(message.errno)))
            case Noted() if (asked := self._asked.get(message.id)) and not asked.done():
                asked.set_result(0)
        _close_all(descriptors)

    async def _serve(self, request: WorkerRequest, descriptors: list[int]) -> None:
        try:
            result = await self._handler(request, descriptors, self.asker(request.id))
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
                pass  # the reader notices, and ends the conversation
            finally:
                _close_all(descriptors)
                self._outgoing.task_done()
        self._outgoing.task_done()


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        open_files.close(descriptors.pop())
