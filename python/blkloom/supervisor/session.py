"""The session of one client: requests run as tasks, answers are sent in any order, the client opens files.

The supervisor works on a few requests of a client at the same time; a request counts until its answer is sent. Above
this number nothing is read, so further requests wait in the socket of the client, other clients do not wait for them,
and unread answers are limited. A client that reads no answer for some time is disconnected. When a client disconnects,
its requests continue; files that the client had to open then fail. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final

from blkloom import open_files
from blkloom.control import messages as m
from blkloom.control.async_channel import AsyncChannel
from blkloom.control.endpoint import Endpoint, NoAnswer, Opener
from blkloom.control.failures import to_failure
from blkloom.control.framing import BadMessage, ChannelClosed, InvalidMessage, PeerStalled
from blkloom.errors import ResourceError, UsageError

_log = logging.getLogger(__name__)
_OPEN_SECONDS: Final = 20.0
"""Seconds for the client to open a file; the client has a shorter limit of its own."""
STALL_SECONDS: Final = 30.0
"""Seconds for a client to read some of its answers (`AsyncChannel`)."""
AT_ONCE: Final = 8
"""Requests of one client that run at the same time, without its `Wait`s."""
MOST_WAITS: Final = 8192
"""Most `Wait`s of one client."""
_MOST_QUEUED: Final = 32768
_MOST_QUEUED_BYTES: Final = m.LONGEST_LINE
"""Requests that are read although they must wait, because the answer about a file may follow them."""

Answer = Callable[[m.ClientCall, Opener, "Session", int], Awaitable[Any]]


class Session:
    """A session over `channel`. answer: executes a call."""

    def __init__(self, channel: AsyncChannel, hello: m.Hello, answer: Answer, *, greet: bool = True) -> None:
        """greet: False if the program before an upgrade has greeted the client."""
        self._channel = channel
        self._hello = hello if greet else None
        self._version = hello.version
        self._answer = answer
        self._endpoint = Endpoint(channel.send, _gone)
        self._requests: set[asyncio.Task[None]] = set()
        self._queue: deque[tuple[m.ClientRequest, int]] = deque()
        """Requests that must wait, and their sizes in bytes."""
        self._queued_bytes = 0
        self._changed = asyncio.Event()
        """Set when a request has ended, or when the client was asked for a file."""
        self._waits: set[asyncio.Task[None]] = set()
        """Tasks to cancel when the client has gone."""

    def fileno(self) -> int:
        """The descriptor of the connection."""
        return self._channel.fileno()

    async def run(self) -> None:
        """Serves the client until it disconnects."""
        try:
            if self._hello is not None:
                await self._channel.send(self._hello)
            while True:
                await self._receive()
                await asyncio.sleep(0)  # the next message may be here already: give other tasks their turn
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
            self._endpoint.end()

    async def reply(self, request: int, result: Any) -> None:
        """Sends an answer. Raises ChannelClosed."""
        await self._channel.send(m.Reply(id=request, result=result))

    def _may_read(self) -> bool:
        if not self._queue:
            return True
        return (
            self._endpoint.has_questions and len(self._queue) < _MOST_QUEUED and self._queued_bytes < _MOST_QUEUED_BYTES
        )

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
        """Starts as many waiting requests as the limit allows."""
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
            case _:
                self._endpoint.take(message, fds)
        for fd in fds:
            open_files.close(fd)

    async def _serve(self, request: m.ClientRequest) -> None:
        async def opener(wish: m.OpenFile, opened: Sequence[int]) -> int:
            return await self._open(request.id, wish, opened)

        try:
            try:
                result = await self._answer(request.call, opener, self, request.id)
            except Exception as error:
                if not isinstance(error, OSError | ValueError):
                    _log.exception("%s failed", type(request.call).__name__)
                await self._send(to_failure(request.id, error))
            else:
                await self._send(m.Reply(id=request.id, result=result))
        except PeerStalled as error:
            _log.warning("a client that reads no answers was dropped: %s", error)
            self._queue.clear()
        except ChannelClosed:
            return  # the client has disconnected

    async def _refuse_wait(self, request: m.ClientRequest) -> None:
        with contextlib.suppress(ChannelClosed):
            what = f"this client waits for {len(self._waits)} events already"
            error = ResourceError(what, cure="wait for some of them first", errno=errno.EAGAIN)
            await self._send(to_failure(request.id, error))

    async def _send(self, answer: m.Reply | m.Failure) -> None:
        """Sends an answer. If it cannot be encoded, sends the reason as an error instead: the client waits for an
        answer.
        """
        try:
            await self._channel.send(answer)
        except UsageError as error:
            await self._channel.send(to_failure(answer.id, error))

    async def _open(self, request: int, wish: m.OpenFile, opened: Sequence[int]) -> int:
        asked = m.OpenFile(
            id=0,
            request=request,
            path=wish.path,
            writable=wish.writable,
            direct=wish.direct,
            exclusive=wish.exclusive,
        )
        self._changed.set()
        try:
            return int(await self._endpoint.ask(asked, opened, timeout=_OPEN_SECONDS))
        except NoAnswer as error:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), wish.path) from error


def _gone() -> OSError:
    return OSError(errno.ECONNRESET, "the client that ordered it has gone")
