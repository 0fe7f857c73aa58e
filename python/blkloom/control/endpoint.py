"""RPC endpoint: sends requests over a channel, matches the answers, and opens files for the side that answers.

The supervisor has one for each worker and each client, and a worker has one for its supervisor. How messages are sent
(at once or through a queue), and all other messages, are not part of it. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Any, TypeAlias

from blkloom import open_files
from blkloom.control import messages as m
from blkloom.control.failures import to_exception

Opener: TypeAlias = Callable[[m.OpenFile, Sequence[int]], Awaitable[int]]
"""Opens a file. The caller owns the returned descriptor, and still owns the ones it passes. Raises OSError."""

Question: TypeAlias = m.WorkerRequest | m.OpenFile | m.SyncFailed


class NoAnswer(TimeoutError):
    """The other side has not answered in time. A TimeoutError, in contrast, comes from the other side."""


class _Open:
    """A request without an answer yet."""

    def __init__(self, opener: Opener | None) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.opener = opener
        self.files = 0
        """Descriptors opened for it so far."""


class Endpoint:
    """An endpoint. say: sends a message with descriptors, which the caller still owns. gone: the error for requests
    that have no answer when the channel closes.
    """

    def __init__(self, say: Callable[[Any, Sequence[int]], Awaitable[None]], gone: Callable[[], Exception]) -> None:
        self._say = say
        self._gone = gone
        self._numbers = count(1)
        self._questions: dict[int, _Open] = {}
        self._ended = False

    @property
    def has_questions(self) -> bool:
        """Whether a request waits for its answer."""
        return bool(self._questions)

    async def ask(
        self, question: Question, fds: Sequence[int] = (), *, timeout: float | None, opener: Opener | None = None
    ) -> Any:
        """Sends a request, gives it an id and waits for its answer. Returns the result of a Reply, the descriptor of an
        Opened (owned by the caller), or None for Noted. timeout: seconds. opener: opens the files that the other side
        asks for meanwhile. Raises the error of the other side, NoAnswer, errors of sending, and the error of `gone`.
        """
        if self._ended:
            raise self._gone()
        question.id = next(self._numbers)
        asked = self._questions[question.id] = _Open(opener)
        try:
            async with asyncio.timeout(timeout):
                await self._say(question, fds)
                return await asked.answer
        except TimeoutError as error:
            if asked.answer.done() and not asked.answer.cancelled():
                return asked.answer.result()
            raise NoAnswer(f"no answer within {timeout} s") from error
        finally:
            del self._questions[question.id]

    def take(self, message: Any, fds: list[int]) -> bool:
        """Handles a message if it is an answer, and returns whether it is. A descriptor that a request takes over is
        removed from `fds`.
        """
        if not isinstance(message, m.Reply | m.Failure | m.Opened | m.OpenRefused | m.Noted):
            return False
        asked = self._questions.get(message.id)
        if asked is None or asked.answer.done():
            return True
        match message:
            case m.Reply():
                asked.answer.set_result(message.result)
            case m.Failure():
                asked.answer.set_exception(to_exception(message))
            case m.Opened() if fds:
                asked.answer.set_result(fds.pop(0))
            case m.Opened():  # the descriptor was lost: this process had no free one
                asked.answer.set_exception(_os_error(errno.EMFILE))
            case m.OpenRefused():
                asked.answer.set_exception(_os_error(message.errno))
            case m.Noted():
                asked.answer.set_result(None)
        return True

    async def have_opened(self, asked: m.OpenFile, opened: list[int]) -> None:
        """Opens a file for the side that works on a request, and sends the answer. Owns `opened`."""
        try:
            try:
                fd = await self._open(asked, opened)
            except (OSError, ValueError) as error:
                number = error.errno if isinstance(error, OSError) else errno.EINVAL
                await self._say(m.OpenRefused(id=asked.id, errno=number or errno.EIO), ())
                return
            try:
                await self._say(m.Opened(id=asked.id), [fd])
            finally:
                open_files.close(fd)
        except ConnectionError:
            return  # the channel has closed; its reader notices that
        finally:
            while opened:
                open_files.close(opened.pop())

    async def _open(self, asked: m.OpenFile, opened: Sequence[int]) -> int:
        question = self._questions.get(asked.request)
        if question is None or question.opener is None:
            raise _os_error(errno.ESTALE)
        question.files += 1  # their descriptors are stored when the request has its answer
        if open_files.are_scarce(open_files.SUPERVISOR_RESERVE, more=2 * question.files):
            raise _os_error(errno.EMFILE)
        return await question.opener(asked, opened)

    def end(self) -> None:
        """Ends all requests: the channel has closed."""
        self._ended = True
        for asked in self._questions.values():
            if not asked.answer.done():
                asked.answer.set_exception(self._gone())


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
