"""The supervisor's end of one worker's channel: calls out, answers and news in.

`call` sends a request and waits for its answer, with a bound: a worker that does not answer makes an
error, never a hung command. What the worker says of its own accord goes to `Heard`. On the event loop.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Final, Protocol

from blkloom import open_files
from blkloom.control import messages as m
from blkloom.control.async_channel import AsyncChannel
from blkloom.control.failures import to_exception
from blkloom.control.framing import ChannelClosed
from blkloom.control.states import Label
from blkloom.errors import WorkerGone, WorkerStuck

_log = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 60.0
"""For a worker to answer, over what the call itself may wait."""

Opener = Callable[[m.OpenFile, Sequence[int]], Awaitable[int]]
"""Has a file opened; the descriptor becomes the caller's, and what rides along stays so. Raises OSError."""


class Heard(Protocol):
    """Who is told what a worker says."""

    def keep(self, labels: Sequence[Label], fds: list[int]) -> None:
        """Owns the descriptors."""

    def drop(self, labels: Sequence[Label]) -> None:
        """They are not needed any more."""

    def happened(self, news: m.Happened) -> None:
        """A device's clients or event number changed."""

    async def sync_failed(self, news: m.SyncFailed) -> None:
        """A worker that takes this one's place will know of it when this returns."""

    def gone(self) -> None:
        """The channel has ended."""


class Link:
    """Over `channel`, to the worker `name`."""

    def __init__(self, name: str, channel: AsyncChannel, heard: Heard) -> None:
        self.name = name
        self._channel = channel
        self._heard = heard
        self._numbers = count(1)
        self._open: dict[int, tuple[asyncio.Future[Any], Opener | None]] = {}
        self._files: Counter[int] = Counter()
        """Opened for a call so far; their descriptors are stored when it succeeds."""
        self._answering: set[asyncio.Task[None]] = set()
        self._ended = False
        self._task = asyncio.create_task(self._listen(), name=f"worker {name}")

    async def greet(self, hello: m.Hello) -> None:
        """Says who is speaking. Raises WorkerGone."""
        try:
            await self._channel.send(hello)
        except ConnectionError as error:
            raise self._gone() from error

    async def call(
        self, call: m.WorkerCall, fds: Sequence[int] = (), *, opener: Opener | None = None, wait: float | None = None
    ) -> Any:
        """The result. opener: has the files opened that the worker asks for. wait: seconds the call
        itself may take. Raises what the worker raises, WorkerGone, WorkerStuck.
        """
        if self._ended:
            raise self._gone()
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[number] = (answer, opener)
        try:
            async with asyncio.timeout((wait or 0) + ANSWER_SECONDS):
                await self._channel.send(m.WorkerRequest(id=number, call=call), fds)
                return await answer
        except TimeoutError as error:
            if answer.done():  # the worker's own
                raise
            raise WorkerStuck(
                f"worker {self.name} does not answer {type(call).__name__}",
                cure="see what its storage does; `remove --force` ends it",
            ) from error
        except ChannelClosed as error:
            raise self._gone() from error
        finally:
            self._open.pop(number, None)
            self._files.pop(number, None)

    async def close(self) -> None:
        """Ends the conversation, not the worker."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _listen(self) -> None:
        try:
            while True:
                message, fds = await self._channel.receive()
                self._take(message, fds)
        except ConnectionError as error:
            if not isinstance(error, ChannelClosed):
                _log.error("worker %s: %s", self.name, error)
        except Exception:
            _log.exception("worker %s: what it said could not be acted on", self.name)
        finally:
            self._ended = True
            await self._channel.close()
            for answer, _ in self._open.values():
                if not answer.done():
                    answer.set_exception(self._gone())
            for task in self._answering:
                task.cancel()
        self._heard.gone()

    def _take(self, message: Any, fds: list[int]) -> None:
        match message:
            case m.Keep():
                self._heard.keep(message.labels, fds)
                return
            case m.Drop():
                self._heard.drop(message.labels)
            case m.Happened():
                self._heard.happened(message)
            case m.OpenFile():
                self._start(self._have_opened(message, fds), f"open {message.path}")
                return
            case m.SyncFailed():
                self._start(self._note(message), f"failed syncs of {message.minor}")
            case m.Reply() | m.Failure() if message.id in self._open:
                answer, _ = self._open[message.id]
                if not answer.done():
                    if isinstance(message, m.Reply):
                        answer.set_result(message.result)
                    else:
                        answer.set_exception(to_exception(message))
        for fd in fds:
            open_files.close(fd)

    def _start(self, answer: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(answer, name=name)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _note(self, news: m.SyncFailed) -> None:
        await self._heard.sync_failed(news)
        with suppress(ConnectionError):  # the listener notices
            await self._channel.send(m.Noted(id=news.id))

    async def _have_opened(self, asked: m.OpenFile, opened: list[int]) -> None:
        """Owns what rode along."""
        _, opener = self._open.get(asked.request, (None, None))
        try:
            try:
                self._files[asked.request] += 1
                if open_files.are_scarce(open_files.SUPERVISOR_RESERVE, more=2 * self._files[asked.request]):
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                if opener is None:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
                fd = await opener(asked, opened)
            except (OSError, ValueError) as error:
                number = error.errno if isinstance(error, OSError) else errno.EINVAL
                await self._channel.send(m.OpenRefused(id=asked.id, errno=number or errno.EIO))
                return
            try:
                await self._channel.send(m.Opened(id=asked.id), [fd])
            finally:
                open_files.close(fd)
        except ConnectionError:
            return  # the listener notices
        finally:
            while opened:
                open_files.close(opened.pop())

    def _gone(self) -> WorkerGone:
        return WorkerGone(f"worker {self.name} ended before it answered", cure="its devices come back; try again")
