"""The worker process: start, event loop and end.

A worker gets requests from its supervisor on the channel that it was forked with. When that channel closes, the worker
continues to serve, and waits for another supervisor on `<run-dir>/workers/<id>.sock`: a process of the same user, or of
root, that sends a greeting. SIGTERM or `Leave` ends the worker cleanly: it drains and flushes all devices, unless
another process has taken them over.
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
from blkloom.control.messages import DeviceChanged, Drop, Hello, Keep, Leave, ToWorker, WorkerRequest
from blkloom.control.states import FailedSync
from blkloom.export.nbd.listening import listen_unix
from blkloom.peer_credentials import peer_credentials
from blkloom.targets.registry import Targets, all_targets
from blkloom.version import VERSION
from blkloom.worker.host import Host
from blkloom.worker.hosted_device import KEEP_SECONDS
from blkloom.worker.load_descriptors import FileOpener
from blkloom.worker.supervisor_link import SupervisorLink

_log = logging.getLogger(__name__)
_ACCEPT_RETRY: Final = 1.0
"""Seconds before the next try to accept a supervisor."""


def run(
    channel_socket: socket.socket, worker_id: str, run_dir: str, *, targets: Targets | None = None, client_memory: int
) -> int:
    """Runs the worker `worker_id`, which keeps at most `client_memory` bytes for its clients. Returns the exit status:
    1 if a flush has failed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return asyncio.run(Worker(worker_id, run_dir, targets or all_targets(), client_memory).run(channel_socket))


class Worker:
    """The worker `id` of the supervisor that has its sockets in `run_dir`."""

    def __init__(self, id: str, run_dir: str, targets: Targets, client_memory: int) -> None:
        self._id = id
        self._run_dir = run_dir
        self._host = Host(targets, os.path.join(run_dir, "dev"), self._notify, self._sent, self._confirm, client_memory)
        self._links: set[asyncio.Task[None]] = set()
        self._supervisor: SupervisorLink | None = None
        self._connected = asyncio.Event()
        """Whether a supervisor is connected."""
        self._failed = False
        self._leaving: asyncio.Future[bool]

    async def run(self, channel_socket: socket.socket) -> int:
        """Runs until the worker is told to end."""
        loop = asyncio.get_running_loop()
        self._leaving = loop.create_future()
        loop.add_signal_handler(signal.SIGTERM, self._leave, True)
        listener = listen_unix(os.path.join(self._run_dir, "workers", f"{self._id}.sock"))
        loop.add_reader(listener.socket.fileno(), self._accept, listener.socket)
        self._supervisor = self._connect(channel_socket)
        self._connected.set()
        try:
            if await self._leaving and await self._host.close(to_next=True):
                self._failed = True
        finally:
            loop.remove_reader(listener.socket.fileno())
            with contextlib.suppress(OSError):
                listener.close()
            if self._supervisor:
                await self._supervisor.end()
            for task in self._links:
                task.cancel()
            await asyncio.gather(*self._links, return_exceptions=True)
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
                loop = asyncio.get_running_loop()  # the connection waits in the socket, which would always be readable
                loop.remove_reader(listening.fileno())
                loop.call_later(_ACCEPT_RETRY, self._accept_again, listening)
            return
        peer = peer_credentials(connected)
        if not peer.may_command:
            _log.warning("process %d of user %d is no supervisor of this worker", peer.pid, peer.uid)
            connected.close()
            return
        self._connect(connected)

    def _accept_again(self, listening: socket.socket) -> None:
        if listening.fileno() >= 0:  # it has not disconnected meanwhile
            asyncio.get_running_loop().add_reader(listening.fileno(), self._accept, listening)

    def _connect(self, connected: socket.socket) -> SupervisorLink:
        greeting = Hello(version=VERSION, pid=os.getpid())
        link = SupervisorLink(AsyncChannel(connected, ToWorker), greeting, self._answer, self._greeted)
        task = asyncio.create_task(link.run(), name="link")
        self._links.add(task)
        task.add_done_callback(lambda _done: self._closed(link, task))
        return link

    def _greeted(self, link: SupervisorLink, _hello: Hello) -> None:
        """Makes this connection the one to the supervisor, and ends a former one."""
        former, self._supervisor = self._supervisor, link
        self._connected.set()
        if former is not None and former is not link:
            self._links.add(task := asyncio.create_task(former.end()))
            task.add_done_callback(self._links.discard)

    def _closed(self, link: SupervisorLink, task: asyncio.Task[None]) -> None:
        self._links.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("a supervisor's channel failed", exc_info=error)
        if self._supervisor is link:
            self._supervisor = None
            self._connected.clear()
            if not self._host.devices:
                self._leave(False)  # without devices and supervisor, it is of no use

    def _notify(self, message: Keep | Drop | DeviceChanged, fds: Sequence[int]) -> None:
        if self._supervisor:  # a later supervisor asks for the complete state
            self._supervisor.post(message, fds)

    async def _sent(self) -> None:
        if self._supervisor:
            await self._supervisor.sent()

    async def _confirm(self, minor: int, failed_syncs: list[FailedSync]) -> None:
        async with asyncio.timeout(KEEP_SECONDS):
            while True:
                await self._connected.wait()
                try:
                    if self._supervisor:
                        return await self._supervisor.confirm(minor, failed_syncs)
                except ConnectionError:  # another supervisor may connect
                    await asyncio.sleep(0)

    async def _answer(self, request: WorkerRequest, descriptors: list[int], opener: FileOpener) -> Any:
        if not isinstance(request.call, Leave):
            return await self._host.answer(request.call, descriptors, opener)
        try:
            for error in await self._host.close() if request.call.flush else ():
                self._failed = True
                raise error
        finally:
            # The reply is sent before the process ends: `run` waits for the connection to finish.
            asyncio.get_running_loop().call_soon(self._leave, False)
