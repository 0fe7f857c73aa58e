"""The supervisor's end of the channel to one worker: sends requests, receives answers and notifications.

`call` sends a request and waits for its answer, with a time limit: if a worker does not answer, the command fails and
does not hang. Notifications of the worker go to `NotificationHandler`. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

from blkloom import open_files
from blkloom.control import messages as m
from blkloom.control.async_channel import AsyncChannel
from blkloom.control.endpoint import Endpoint, NoAnswer, Opener
from blkloom.control.framing import ChannelClosed
from blkloom.control.states import Label
from blkloom.errors import WorkerGone, WorkerStuck

_log = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 60.0
"""Seconds for a worker to answer, in addition to the wait of the call itself."""


class NotificationHandler(Protocol):
    """Callbacks for the notifications of a worker."""

    def keep(self, labels: Sequence[Label], fds: list[int]) -> None:
        """Stores these descriptors; the callee owns them."""

    def drop(self, labels: Sequence[Label]) -> None:
        """Drops descriptors that are no longer needed."""

    def device_changed(self, message: m.DeviceChanged) -> None:
        """The clients or the event number of a device have changed."""

    async def sync_failed(self, message: m.SyncFailed) -> None:
        """Records failed syncs. When this returns, a replacement of this worker will know of them."""

    def gone(self) -> None:
        """The channel has ended."""


class Link:
    """The connection over `channel` to the worker `name`."""

    def __init__(self, name: str, channel: AsyncChannel, handler: NotificationHandler) -> None:
        self.name = name
        self._channel = channel
        self._handler = handler
        self._endpoint = Endpoint(channel.send, self._gone)
        self._answering: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._listen(), name=f"worker {name}")

    async def greet(self, hello: m.Hello) -> None:
        """Sends the greeting. Raises WorkerGone."""
        try:
            await self._channel.send(hello)
        except ConnectionError as error:
            raise self._gone() from error

    async def call(
        self,
        call: m.WorkerCall,
        fds: Sequence[int] = (),
        *,
        opener: Opener | None = None,
        wait: float | None = None,
        answer: float = ANSWER_SECONDS,
    ) -> Any:
        """Sends a request and returns its result. opener: opens the files that the worker asks for. wait: seconds that
        the call itself may take. answer: seconds that the worker may take besides. Raises the error of the worker,
        WorkerGone, WorkerStuck.
        """
        request = m.WorkerRequest(id=0, call=call)
        try:
            return await self._endpoint.ask(request, fds, opener=opener, timeout=(wait or 0) + answer)
        except NoAnswer as error:
            raise WorkerStuck(
                f"worker {self.name} does not answer {type(call).__name__}",
                cure="see what its storage does; `remove --force` ends it",
            ) from error
        except ChannelClosed as error:
            raise self._gone() from error

    async def close(self) -> None:
        """Closes the channel. The worker continues to run."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close()  # a task cancelled before its first step has not done so

    async def _listen(self) -> None:
        try:
            while True:
                message, fds = await self._channel.receive()
                self._take(message, fds)
        except ConnectionError as error:
            if not isinstance(error, ChannelClosed):
                _log.error("worker %s: %s", self.name, error)
        except Exception:
            _log.exception("worker %s: its message could not be handled", self.name)
        finally:
            await self._channel.close()
            self._endpoint.end()
            for task in self._answering:
                task.cancel()
        self._handler.gone()

    def _take(self, message: Any, fds: list[int]) -> None:
        match message:
            case m.Keep():
                self._handler.keep(message.labels, fds)
                return
            case m.Drop():
                self._handler.drop(message.labels)
            case m.DeviceChanged():
                self._handler.device_changed(message)
            case m.OpenFile():
                self._start(self._endpoint.have_opened(message, fds), f"open {message.path}")
                return
            case m.SyncFailed():
                self._start(self._note(message), f"failed syncs of {message.minor}")
            case _:
                self._endpoint.take(message, fds)
        for fd in fds:
            open_files.close(fd)

    def _start(self, answer: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(answer, name=name)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _note(self, message: m.SyncFailed) -> None:
        await self._handler.sync_failed(message)
        with suppress(ConnectionError):  # the listener notices
            await self._channel.send(m.Noted(id=message.id))

    def _gone(self) -> WorkerGone:
        return WorkerGone(f"worker {self.name} ended before it answered", cure="its devices come back; try again")
