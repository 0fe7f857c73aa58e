"""Forks workers through the zygote, and reports how each worker ended.

If the zygote dies, the next fork starts another one; the workers continue to run. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Collection
from typing import Final

from blkloom import open_files
from blkloom.control.async_channel import AsyncChannel
from blkloom.control.framing import ChannelClosed
from blkloom.control.rundir import RunDir
from blkloom.control.zygote_messages import Exited, Fork, Forked, ForkRefused, FromZygote
from blkloom.errors import ResourceError
from blkloom.printing import described
from blkloom.supervisor.zygote_process import ZygoteProcess, start_zygote

_log = logging.getLogger(__name__)
_FORK_SECONDS: Final = 60.0
_END_SECONDS: Final = 10.0


class Forker:
    """The zygote of one run directory. exited: called with the worker, its pid and its status (minus the signal).
    client_memory: see `Fork`. zygote: a running zygote, which this object owns from now on.
    """

    def __init__(
        self,
        run_dir: RunDir,
        exited: Callable[[str, int, int], None],
        client_memory: int,
        zygote: ZygoteProcess | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._client_memory = client_memory
        self._exited = exited
        self._started = zygote
        """The zygote that was passed in and is not used yet."""
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: AsyncChannel | None = None
        self._waiting: dict[str, asyncio.Future[tuple[int, int]]] = {}
        self._listener: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    async def fork(self, worker: str, targets: Collection[str] = ()) -> tuple[int, int, socket.socket]:
        """Forks a worker. targets: names of the targets that it will need. Returns its pid, a pidfd and this end of its
        channel. Raises ResourceError.
        """
        channel = await self._reach()
        ours, theirs = socket.socketpair()
        forked: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        self._waiting[worker] = forked
        try:
            with theirs:
                order = Fork(
                    worker=worker,
                    run_dir=str(self._run_dir.sockets),
                    targets=sorted(targets),
                    client_memory=self._client_memory,
                    level=logging.getLevelName(logging.getLogger().getEffectiveLevel()),
                )
                await channel.send(order, [theirs.fileno()])
            async with asyncio.timeout(_FORK_SECONDS):
                pid, pidfd = await forked
        except BaseException as error:
            ours.close()
            if isinstance(error, ChannelClosed | TimeoutError):
                raise ResourceError(
                    f"no worker can be started: the process that forks workers has ended ({described(error)})",
                    cure="try again",
                ) from error
            raise
        finally:
            del self._waiting[worker]
        return pid, pidfd, ours

    async def _reach(self) -> AsyncChannel:
        async with self._starting:
            if self._channel is None:
                self._begin()
            assert self._channel
            return self._channel

    def _begin(self) -> None:
        """Returns the zygote that is running, or starts one."""
        zygote, self._started = self._started, None
        if zygote is not None and zygote.process.poll() is not None:
            _log.warning("the process that forks workers has ended, with status %d", zygote.process.returncode)
            zygote.connected.close()
            zygote = None
        zygote = zygote or start_zygote()
        self._process = zygote.process
        self._channel = AsyncChannel(zygote.connected, FromZygote)
        self._listener = asyncio.create_task(self._listen(self._channel, self._process), name="zygote")

    async def _listen(self, channel: AsyncChannel, process: subprocess.Popen[bytes]) -> None:
        try:
            while True:
                message, fds = await channel.receive()
                self._take(message, fds)
        except ConnectionError as error:
            _log.warning("the process that forks workers has ended: %s", error)
        finally:
            await channel.close()
            if self._channel is channel:
                self._channel = None
            for forked in self._waiting.values():
                if not forked.done():
                    forked.set_exception(ChannelClosed("the zygote has ended"))
        await _ended(process)

    def _take(self, message: Forked | ForkRefused | Exited, fds: list[int]) -> None:
        match message:
            case Forked() if not fds:  # the descriptor was lost; the worker ends with its channel
                if (forked := self._waiting.get(message.worker)) and not forked.done():
                    what = "a worker cannot be watched: the supervisor has no free descriptors"
                    forked.set_exception(ResourceError(what, cure=open_files.advice(), errno=errno.EMFILE))
            case Forked() if (forked := self._waiting.get(message.worker)) and not forked.done():
                forked.set_result((message.pid, fds.pop()))
            case ForkRefused() if (forked := self._waiting.get(message.worker)) and not forked.done():
                what = f"no process can be forked for a worker: {os.strerror(message.errno)}"
                forked.set_exception(
                    ResourceError(what, cure="check the limits of processes and memory", errno=message.errno)
                )
            case Forked() if fds:  # the caller has given up: this worker would never be used
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fds[0], signal.SIGKILL)
            case Exited():
                self._exited(message.worker, message.pid, message.status)
        for fd in fds:
            os.close(fd)

    async def close(self) -> None:
        """Ends the zygote."""
        if self._started is not None:
            self._begin()
        if self._listener is None or self._process is None:
            return
        self._listener.cancel()
        await asyncio.gather(self._listener, return_exceptions=True)
        if self._channel is not None:  # a task cancelled before its first step has not closed it
            await self._channel.close()
        try:
            async with asyncio.timeout(_END_SECONDS):
                await _ended(self._process)
        except TimeoutError:
            _log.error("the process that forks workers does not end and is killed")
            self._process.kill()
            await _ended(self._process)


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """Waits until the process has ended and been reaped."""
    if process.poll() is not None:
        return
    watched = os.pidfd_open(process.pid)
    loop = asyncio.get_running_loop()
    end: asyncio.Future[None] = loop.create_future()
    loop.add_reader(watched, _wake, end)
    try:
        await end
    finally:
        loop.remove_reader(watched)
        os.close(watched)
    process.wait()


def _wake(end: asyncio.Future[None]) -> None:
    if not end.done():
        end.set_result(None)
