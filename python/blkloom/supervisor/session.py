"""One client's conversation: requests as tasks, answers in any order, files opened by the client.

A few requests of a client are worked on at once, and one counts until its answer is sent. While more have come
nothing is read, so what a client asks for in a row waits in its socket and keeps no other client waiting, and
answers that it does not read are bounded. A client that reads none of them for some time is cut off. One that
goes away leaves what it asked for going on; files it would have had to open then fail. On the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from itertools import count
from typing import Any, Final

from blkloom import open_files
from blkloom.control import messages as m
from blkloom.control.async_channel import AsyncChannel
from blkloom.control.failures import to_failure
from blkloom.control.framing import BadMessage, ChannelClosed, InvalidMessage, PeerStalled
from blkloom.errors import ResourceError, UsageError
from blkloom.supervisor.verbs import Caller

_log = logging.getLogger(__name__)
_OPEN_SECONDS: Final = 20.0
"""For the client to open a file; it has a shorter bound of its own."""
STALL_SECONDS: Final = 30.0
"""For a client to read some of what it was answered (`AsyncChannel`)."""
AT_ONCE: Final = 8
"""Requests of one client that are worked on at the same time, `Wait`s excepted."""
MOST_WAITS: Final = 8192
"""`Wait`s of one client."""
_MOST_QUEUED: Final = 32768
_MOST_QUEUED_BYTES: Final = m.LONGEST_LINE
"""Requests that are read although they must wait, because a file that the client opens comes behind them."""

Answer = Callable[[m.ClientCall, Caller, "Session", int], Awaitable[Any]]


class Session:
    """Over `channel`. answer: does what a call asks."""

    def __init__(self, channel: AsyncChannel, hello: m.Hello, answer: Answer, *, greet: bool = True) -> None:
        """greet: False for a client that was greeted by a former program."""
        self._channel = channel
        self._hello = hello if greet else None
        self._version = hello.version
        self._answer = answer
        self._numbers = count(1)
        self._asked: dict[int, asyncio.Future[int]] = {}
        self._requests: set[asyncio.Task[None]] = set()
        self._queue: deque[tuple[m.ClientRequest, int]] = deque()
        """Requests that have to wait, and their bytes."""
        self._queued_bytes = 0
        self._changed = asyncio.Event()
        """A request has ended, or the client was asked for a file."""
        self._waits: set[asyncio.Task[None]] = set()
        """Requests that nobody needs once the client has gone."""

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._channel.fileno()

    async def run(self) -> None:
        """Until the client leaves."""
        try:
            if self._hello is not None:
                await self._channel.send(self._hello)
            while True:
                await self._receive()
                await asyncio.sleep(0)  # the next message may be here already, and others have their turn
                while not self._may_read():
                    self._changed.clear()
                    await self._changed.wait()
        except BadMessage as error:
            _log.warning("a client was dropped: %s", error)
            with contextlib.suppress(ChannelClosed):
                await self._channel.send(self._not_understood(0, error))
        except ChannelClosed:
            pass
        finally:
            await self._channel.close()
            for wait in self._waits:
                wait.cancel()
            for asked in self._asked.values():
                if not asked.done():
                    asked.set_exception(OSError(errno.ECONNRESET, "the client that ordered it has gone"))

    async def reply(self, request: int, result: Any) -> None:
        """Answers. Raises ChannelClosed."""
        await self._channel.send(m.Reply(id=request, result=result))

    def _may_read(self) -> bool:
        if not self._queue:
            return True
        return bool(self._asked) and len(self._queue) < _MOST_QUEUED and self._queued_bytes < _MOST_QUEUED_BYTES

    async def _receive(self) -> None:
        try:
            message, fds = await self._channel.receive()
        except InvalidMessage as error:
            if error.id is None:
                raise
            await self._channel.send(self._not_understood(error.id, error))
            return
        self._take(message, fds)

    def _not_understood(self, request: int, error: BadMessage) -> m.Failure:
        what = f"the supervisor (version {self._version}) did not understand a request: {error}"
        return to_failure(request, UsageError(what, cure="if it is of another version, run: blkloom upgrade"))

    def _start(self, request: m.ClientRequest, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work, name=f"{type(request.call).__name__}")
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():  # the supervisor ends
            self._queue.clear()
        self._start_queued()

    def _start_queued(self) -> None:
        """As many as there is room for."""
        while self._queue and len(self._requests) < AT_ONCE:
            request, length = self._queue.popleft()
            self._queued_bytes -= length
            refused = isinstance(request.call, m.Wait)
            self._start(request, self._refuse_wait(request) if refused else self._serve(request), self._requests)
        self._changed.set()

    def _take(self, message: Any, fds: list[int]) -> None:
        match message:
            case m.ClientRequest(call=m.Wait()) if len(self._waits) < MOST_WAITS:
                self._start(message, self._serve(message), self._waits)
            case m.ClientRequest():
                self._queue.append((message, self._channel.length))
                self._queued_bytes += self._channel.length
                self._start_queued()
            case m.Opened() if fds and (asked := self._asked.get(message.id)) and not asked.done():
                asked.set_result(fds.pop(0))
            case m.Opened() if (asked := self._asked.get(message.id)) and not asked.done():
                asked.set_exception(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            case m.OpenRefused() if (asked := self._asked.get(message.id)) and not asked.done():
                asked.set_exception(OSError(message.errno, os.strerror(message.errno)))
        for fd in fds:
            open_files.close(fd)

    async def _serve(self, request: m.ClientRequest) -> None:
        async def opener(wish: m.OpenFile, opened: Sequence[int]) -> int:
            return await self._open(request.id, wish, opened)

        try:
            try:
                result = await self._answer(request.call, Caller(opener), self, request.id)
            except Exception as error:
                if not isinstance(error, OSError | ValueError):
                    _log.exception("%s failed", type(request.call).__name__)
                await self._say(to_failure(request.id, error))
            else:
                await self._say(m.Reply(id=request.id, result=result))
        except PeerStalled as error:
            _log.warning("a client that reads no answers was dropped: %s", error)
            self._queue.clear()
        except ChannelClosed:
            return  # nobody to tell

    async def _refuse_wait(self, request: m.ClientRequest) -> None:
        with contextlib.suppress(ChannelClosed):
            what = f"this client waits for {len(self._waits)} events already"
            error = ResourceError(what, cure="wait for some of them first", errno=errno.EAGAIN)
            await self._say(to_failure(request.id, error))

    async def _say(self, answer: m.Reply | m.Failure) -> None:
        """The client waits: one that cannot be said is answered with why."""
        try:
            await self._channel.send(answer)
        except UsageError as error:
            await self._channel.send(to_failure(answer.id, error))

    async def _open(self, request: int, wish: m.OpenFile, opened: Sequence[int]) -> int:
        number = next(self._numbers)
        answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._asked[number] = answered
        self._changed.set()
        asked = m.OpenFile(
            id=number,
            request=request,
            path=wish.path,
            writable=wish.writable,
            direct=wish.direct,
            exclusive=wish.exclusive,
        )
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                await self._channel.send(asked, opened)
                return await answered
        except TimeoutError as error:
            if answered.done() and not answered.cancelled():
                return answered.result()
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), wish.path) from error
        finally:
            del self._asked[number]
