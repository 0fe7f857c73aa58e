"""One client's conversation: requests as tasks, answers in any order, files opened by the client.

A client that goes away leaves what it asked for going on; files it would have had to open then fail.
On the event loop.
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

from blkloom.control import messages as m
from blkloom.control.async_channel import AsyncChannel
from blkloom.control.failures import to_failure
from blkloom.control.framing import BadMessage, ChannelClosed
from blkloom.errors import UsageError
from blkloom.supervisor.verbs import Caller

_log = logging.getLogger(__name__)
_OPEN_SECONDS: Final = 20.0
"""For the client to open a file; it has a shorter bound of its own."""

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
                message, fds = await self._channel.receive()
                self._take(message, fds)
        except BadMessage as error:
            _log.warning("a client was dropped: %s", error)
            with contextlib.suppress(ChannelClosed):
                what = f"the supervisor (version {self._version}) did not understand a request: {error}"
                await self._channel.send(to_failure(0, UsageError(what, cure="run: blkloom upgrade")))
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

    def _take(self, message: Any, fds: list[int]) -> None:
        match message:
            case m.ClientRequest():
                task = asyncio.create_task(self._serve(message), name=f"{type(message.call).__name__}")
                self._requests.add(task)
                task.add_done_callback(self._requests.discard)
                if isinstance(message.call, m.Wait):
                    self._waits.add(task)
                    task.add_done_callback(self._waits.discard)
            case m.Opened() if fds and (asked := self._asked.get(message.id)) and not asked.done():
                asked.set_result(fds.pop(0))
            case m.Opened() if (asked := self._asked.get(message.id)) and not asked.done():
                asked.set_exception(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            case m.OpenRefused() if (asked := self._asked.get(message.id)) and not asked.done():
                asked.set_exception(OSError(message.errno, os.strerror(message.errno)))
        for fd in fds:
            os.close(fd)

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
        except ChannelClosed:
            return  # nobody to tell

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
        asked = m.OpenFile(
            id=number,
            request=request,
            path=wish.path,
            writable=wish.writable,
            direct=wish.direct,
            exclusive=wish.exclusive,
        )
        try:
            await self._channel.send(asked, opened)
            await asyncio.wait([answered], timeout=_OPEN_SECONDS)
            if not answered.done():
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), wish.path)
            return answered.result()
        finally:
            del self._asked[number]
