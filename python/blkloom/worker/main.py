"""A worker process from its first instruction of its own to its end.

It listens to its supervisor on the channel it was born with, and when that is gone serves on and awaits
another on `<run-dir>/workers/<id>.sock`: whoever is of the same user, or root, and greets. SIGTERM, or
`Leave`, ends it: cleanly, with all devices drained and flushed, unless another process has taken over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Sequence
from typing import Any, Final

from blkloom.control.async_channel import AsyncChannel
from blkloom.control.messages import Drop, Happened, Hello, Keep, Leave, ToWorker, WorkerRequest
from blkloom.control.states import FailedSync
from blkloom.export.nbd.listening import listen_unix
from blkloom.peer import peer_of
from blkloom.target.registry import Targets, all_targets
from blkloom.version import VERSION
from blkloom.worker.conversation import Conversation
from blkloom.worker.host import Host
from blkloom.worker.hosted import KEEP_SECONDS
from blkloom.worker.stock import Ask

_log = logging.getLogger(__name__)
_ACCEPT_RETRY: Final = 1.0
"""Seconds before a supervisor that could not be accepted is tried again."""


def run(
    channel_socket: socket.socket, worker_id: str, run_dir: str, *, targets: Targets | None = None, client_memory: int
) -> int:
    """Lives as the worker `worker_id`, whose clients may make it keep `client_memory` bytes. Returns the exit status: 1
    when something could not be flushed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return asyncio.run(Worker(worker_id, run_dir, targets or all_targets(), client_memory).live(channel_socket))


class Worker:
    """The worker `id` of the supervisor that has `run_dir`."""

    def __init__(self, id: str, run_dir: str, targets: Targets, client_memory: int) -> None:
        self._id = id
        self._run_dir = run_dir
        self._host = Host(targets, os.path.join(run_dir, "dev"), self._tell, self._told, self._confirm, client_memory)
        self._conversations: set[asyncio.Task[None]] = set()
        self._supervisor: Conversation | None = None
        self._spoken_to = asyncio.Event()
        """There is a supervisor."""
        self._failed = False
        self._leaving: asyncio.Future[bool]

    async def live(self, channel_socket: socket.socket) -> int:
        """Until it is told to leave."""
        loop = asyncio.get_running_loop()
        self._leaving = loop.create_future()
        loop.add_signal_handler(signal.SIGTERM, self._leave, True)
        listener = listen_unix(os.path.join(self._run_dir, "workers", f"{self._id}.sock"))
        loop.add_reader(listener.socket.fileno(), self._accept, listener.socket)
        self._supervisor = self._converse(channel_socket)
        self._spoken_to.set()
        try:
            if await self._leaving and await self._host.close():
                self._failed = True
        finally:
            loop.remove_reader(listener.socket.fileno())
            with contextlib.suppress(OSError):
                listener.close()
            if self._supervisor:
                await self._supervisor.end()
            for task in self._conversations:
                task.cancel()
            await asyncio.gather(*self._conversations, return_exceptions=True)
        return 1 if self._failed else 0

    def _leave(self, flush: bool) -> None:
        if not self._leaving.done():
            self._leaving.set_result(flush)

    def _accept(self, listening: socket.socket) -> None:
        try:
            connected, _ = listening.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                _log.error("a supervisor could not be accepted: %s", error)
                loop = asyncio.get_running_loop()  # it waits in the socket, which would be ready for ever
                loop.remove_reader(listening.fileno())
                loop.call_later(_ACCEPT_RETRY, self._accept_again, listening)
            return
        peer = peer_of(connected)
        if not peer.may_command:
            _log.warning("process %d of user %d is no supervisor of this worker", peer.pid, peer.uid)
            connected.close()
            return
        self._converse(connected)

    def _accept_again(self, listening: socket.socket) -> None:
        if listening.fileno() >= 0:  # it has not left meanwhile
            asyncio.get_running_loop().add_reader(listening.fileno(), self._accept, listening)

    def _converse(self, connected: socket.socket) -> Conversation:
        greeting = Hello(version=VERSION, pid=os.getpid())
        conversation = Conversation(AsyncChannel(connected, ToWorker), greeting, self._answer, self._greeted)
        task = asyncio.create_task(conversation.run(), name="conversation")
        self._conversations.add(task)
        task.add_done_callback(lambda _done: self._over(conversation, task))
        return conversation

    def _greeted(self, conversation: Conversation, _hello: Hello) -> None:
        """It speaks for the supervisor from now on; one that came before has been succeeded."""
        former, self._supervisor = self._supervisor, conversation
        self._spoken_to.set()
        if former is not None and former is not conversation:
            self._conversations.add(task := asyncio.create_task(former.end()))
            task.add_done_callback(self._conversations.discard)

    def _over(self, conversation: Conversation, task: asyncio.Task[None]) -> None:
        self._conversations.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("a supervisor's channel failed", exc_info=error)
        if self._supervisor is conversation:
            self._supervisor = None
            self._spoken_to.clear()
            if not self._host.devices:
                self._leave(False)  # nobody can want it for anything

    def _tell(self, message: Keep | Drop | Happened, fds: Sequence[int]) -> None:
        if self._supervisor:  # one that comes later asks for everything
            self._supervisor.post(message, fds)

    async def _told(self) -> None:
        if self._supervisor:
            await self._supervisor.told()

    async def _confirm(self, minor: int, failed_syncs: list[FailedSync]) -> None:
        async with asyncio.timeout(KEEP_SECONDS):
            while True:
                await self._spoken_to.wait()
                try:
                    if self._supervisor:
                        return await self._supervisor.confirm(minor, failed_syncs)
                except ConnectionError:  # another may come
                    await asyncio.sleep(0)

    async def _answer(self, request: WorkerRequest, descriptors: list[int], ask: Ask) -> Any:
        if not isinstance(request.call, Leave):
            return await self._host.answer(request.call, descriptors, ask)
        try:
            for error in await self._host.close() if request.call.flush else ():
                self._failed = True
                raise error
        finally:
            # The reply is sent before the process ends: `live` lets the conversation finish.
            asyncio.get_running_loop().call_soon(self._leave, False)
