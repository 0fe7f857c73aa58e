"""One kernel NBD device in a worker: the engine serves its sockets, which this module replaces when they are dead.

No request may be executed after the kernel has sent it again: the answer to the second one may have been followed by a
newer write to the same place. The kernel sends a request again when its socket has closed, or when it was not answered
within its time-out. Therefore

- a worker that goes on for one that was killed first closes all sockets that are left;
- before a request reaches half its time-out, the worker takes all connections out of the engine (`_restart`). Requests
  that are being executed end; those that wait (at a suspended device, deferred, delayed) are withdrawn. Then it closes
  all sockets and gives the kernel new ones. The kernel sends the withdrawn requests again when their time-outs expire.

This keeps the order if this module's event loop runs at least once in a quarter of a time-out. The requests of a
suspended device can wait for any time.

A hand-over passes the sockets on, and the kernel does not notice. On the event loop only; what may wait for the kernel
runs on threads, because the kernel may wait for what the engine serves.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

from blkloom import _engine
from blkloom.control.states import ConnectionState
from blkloom.errors import AttachError, ListenError
from blkloom.export.block_device_server import BlockDeviceServer
from blkloom.export.exporter import Client, Unfinished
from blkloom.export.kernel_nbd import driver
from blkloom.export.kernel_nbd.endpoints import connected_pair, dead_timeout, is_there
from blkloom.export.kernel_nbd.state import KernelNbdDetails
from blkloom.export.kernel_nbd.timeouts import Timeouts
from blkloom.printing import described
from blkloom.units import SECTOR

_log = logging.getLogger(__name__)

_LAST_REPLIES: Final = 5.0
"""Seconds in which requests in flight may end when an export is taken away."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 1.0
"""Between two attempts to replace sockets: the kernel tells of a closed socket before it has noted that itself."""
_USERS_SECONDS: Final = 1.0
"""Between two looks whether the last user of a disconnected device has closed it: nothing tells that."""
_DISCONNECTED: Final = "the client disconnected"
"""The engine's reason for the end of a connection after NBD_CMD_DISC."""

Socket = tuple[int, Unfinished]
"""A socket that the engine does not serve now, which the owner must close."""


class KernelNbdExportServer(BlockDeviceServer):
    """See `export.exporter.ExportServer`."""

    def _open(self) -> None:
        self._disconnected = self._ended = False
        self._served: dict[int, _engine.Transport] = {}
        self._detached: list[Socket] = []
        self._changed = asyncio.Event()
        self._alone = asyncio.Lock()
        """Held by the task that changes the set of connections."""
        self._details = KernelNbdDetails.of(self._state)
        self._timeouts = Timeouts(self._details.timeout, self._now())
        self._in_background(self._watch(), "it is not watched")

    # moving to another worker

    async def pause(self, timeout: float | None) -> list[Client]:
        """Takes all connections out of the engine. Raises TimeoutError if requests in flight do not end."""
        self._paused = True
        try:
            async with asyncio.timeout(timeout), self._alone:
                self._details.paused, self._details.oldest = self._now(), self._timeouts.oldest
                self._details.put(self._state)
                moved = await self._detach_all()
        except TimeoutError as error:
            raise TimeoutError(errno.ETIMEDOUT, self._state.path) from error
        return [
            (ConnectionState(export=self._state.id, number=0), descriptor, unfinished)
            for descriptor, unfinished in moved
        ]

    def go_on(self, clients: Iterable[Client] = ()) -> None:
        """Serves these connections, if there are as many as the kernel has. Otherwise the kernel gets new ones."""
        self._detached += [(descriptor, unfinished) for _, descriptor, unfinished in clients]
        self._paused = False
        self._in_background(self._go_on(), "it is not served")

    async def end(self) -> None:
        """Answers what is in flight, and serves no more; of a paused one, leaves that to the next worker."""
        await self._end_tasks()
        for transport in self._served.values():
            transport.close()
        try:
            async with asyncio.timeout(_LAST_REPLIES):
                while self._served:
                    await self._next_change()
        except TimeoutError:
            _log.error("%s: requests in flight had not ended after %g s", self._state.path, _LAST_REPLIES)
        self._finish()

    # serving

    async def _start(self) -> None:
        """Serves the first sockets, or new ones where these have closed. Raises AttachError, ListenError."""
        driver.check_block_size(self._block_size())
        async with self._alone:
            first = [os.dup(descriptor) for descriptor in self._descriptors.values()]
            self._detached += [(descriptor, Unfinished()) for descriptor in first]
            await self._serve_again()
        await self._update_size()

    async def _go_on(self) -> None:
        """Goes on after a hand-over, or for a worker that was killed."""
        async with self._alone:
            self._detached = await self._detach_all()  # those for which `pause` did not wait
            await self._serve_again(since=self._details.paused, oldest=self._details.oldest)
        await self._update_size()

    async def _serve_again(self, *, since: float | None = None, oldest: float | None = None) -> None:
        """Serves all detached sockets again. They were detached at `since`; if that is long ago, or some are missing,
        the kernel gets new ones. oldest: see `Timeouts.restarted`.
        """
        recent = since is None or self._now() - since < self._timeouts.short
        if not recent or len(self._detached) != self._details.connections or any(map(_has_ended, self._detached)):
            await self._reconnect()
            return
        while self._detached:
            self._serve(*self._detached.pop())
        self._timeouts.restarted(self._now(), oldest)

    def _serve(self, descriptor: int, unfinished: Unfinished) -> None:
        """Has the engine serve a socket, and closes this descriptor of it. Raises ListenError."""
        token = next(self._tokens)
        try:
            self._served[token] = _engine.serve_nbd(
                self._engine,
                self._export,
                descriptor,
                self._notices,
                token,
                initial=unfinished.initial,
                unsent=unfinished.unsent,
                skipping=unfinished.skipping,
            )
        except OSError as error:
            what = f"{self._state.path} cannot be served: {error.strerror}"
            raise ListenError(what, errno=error.errno or errno.EIO) from error
        finally:
            os.close(descriptor)

    async def _detach_all(self) -> list[Socket]:
        """Takes all connections out of the engine, and waits until no request is being executed."""
        for transport in self._served.values():
            transport.detach()
        while self._served:
            await self._next_change()
        moved, self._detached = self._detached, []
        return moved

    async def _restart(self, *, slow: bool) -> None:
        """See the module. slow: requests took long, although the device is not suspended."""
        began = self._now()
        async with self._alone:
            if self._paused or self._disconnected:
                return
            self._detached = await self._detach_all()
            whole = not any(unfinished.initial or unfinished.skipping for _, unfinished in self._detached)
            if slow:
                self._timeouts.slower(self._now())
            if whole:
                await self._serve_again(since=began)
            else:
                await self._reconnect()
            if slow:
                await self._tell(timeout=self._timeouts.request)

    async def _reconnect(self) -> None:
        """Closes all sockets, and gives the kernel new ones. No request is being executed."""
        self._close_sockets()
        pause = _FIRST_PAUSE
        missing = self._details.connections
        while True:
            pairs = [connected_pair() for _ in range(missing)]
            try:
                numbers = [kernels.fileno() for _, kernels in pairs]
                dead = dead_timeout(self._state)
                await self._tell(timeout=self._timeouts.request, dead_timeout=dead, sockets=numbers)
            except AttachError:
                for ours, _ in pairs:
                    ours.close()
                self._end_device()
                raise
            finally:
                for _, kernels in pairs:
                    kernels.close()
            for ours, _ in pairs:
                if _has_ended((ours.fileno(), Unfinished())):  # the kernel has not noted yet that one is dead
                    ours.close()
                else:
                    missing -= 1
                    self._serve(ours.detach(), Unfinished())
            self._timeouts.restarted(self._now())
            if not missing:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _tell(self, **wanted: Any) -> None:
        """RECONFIGURE. Raises AttachError."""
        await asyncio.to_thread(driver.reconfigure, self._details.number, tag=self._details.tag, **wanted)

    async def _take_over_size(self) -> None:
        began = self._now()
        async with self._alone:
            if not (self._paused or self._disconnected):  # otherwise that follows
                oldest = self._timeouts.oldest
                self._detached = await self._detach_all()
                await self._serve_again(since=began, oldest=oldest)
        await self._update_size()

    async def _update_size(self) -> None:
        """Tells the kernel the size, if it has another one. This waits for all requests in flight, so a suspended
        device keeps the size that it has. Raises AttachError.
        """
        async with self._alone:
            if self._paused or self._ending or self._disconnected or self._device.suspended:
                return
            size = self._device.size // SECTOR * SECTOR
            if is_there(self._state) and (found := driver.sectors_of(self._details.number)) != size // SECTOR:
                # A mounted file system keeps its blocks.
                await self._tell(size=size, block_size=None if found else self._block_size())

    def _block_size(self) -> int:
        limits = getattr(self._device, "limits", None)
        return limits.logical if limits else SECTOR

    async def _watch(self) -> None:
        """Looks after the connections until the device was disconnected."""
        while not self._disconnected:
            await asyncio.sleep(self._timeouts.pause)
            if self._paused or self._disconnected or self._alone.locked():
                continue
            try:
                await self._look()
            except (AttachError, ListenError) as error:
                _log.error("%s: %s", self._state.path, described(error))

    async def _look(self) -> None:
        """Restarts the connections before a request reaches its time-out, and if some have ended. Raises AttachError,
        ListenError.
        """
        now = self._now()
        if len(self._served) < self._details.connections:
            await self._restart(slow=False)
            return
        await self._update_size()
        if not self._export.older_requests():
            if self._timeouts.none_old(now):
                self._timeouts.calm()
                await self._tell(timeout=self._timeouts.request)
        elif self._timeouts.is_due(now):
            _log.info("%s: requests take long; its connections are made again", self._state.path)
            await self._restart(slow=not self._device.suspended)

    # the end

    def _end_device(self) -> None:
        """Called when the device was disconnected: no other socket can serve it."""
        self._disconnected = True
        if not self._ended and not self._ending:
            self._ended = True
            self._in_background(self._await_users(), "its end is not noticed")

    async def _await_users(self) -> None:
        """Waits until the last user of a disconnected device has closed it. Requests fail meanwhile."""
        while is_there(self._state) and not self._ending:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(_USERS_SECONDS)
        self._gone = True
        self._on_change()

    def _take_notices(self) -> None:
        lost = False
        for token, result, error in self._notices.take():
            self._served.pop(token, None)
            if isinstance(result, _engine.Detached):
                unfinished = Unfinished(result.initial, result.unsent, result.skipping)
                self._detached.append((result.take_descriptor(), unfinished))
            elif result == _DISCONNECTED:
                self._disconnected = True
            else:
                lost = not self._ending
                _log.info("%s: a connection has ended: %s", self._state.path, result or os.strerror(error))
        self._changed.set()
        if self._disconnected:
            self._end_device()
        elif lost and not self._paused and not self._alone.locked():
            self._in_background(self._restart(slow=False), "it is not served")

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _close_sockets(self) -> None:
        """Closes the connections, also for those who have other descriptors of them."""
        for descriptor in self._descriptors.values():
            _shut_down(descriptor)
        while self._detached:
            descriptor, _ = self._detached.pop()
            _shut_down(descriptor)
            os.close(descriptor)

    def _finish(self) -> None:
        super()._finish()
        while self._detached:
            os.close(self._detached.pop()[0])

    @staticmethod
    def _now() -> float:
        """CLOCK_MONOTONIC, which is the same in all processes."""
        return asyncio.get_running_loop().time()


def _has_ended(connection: Socket) -> bool:
    """Whether the kernel has closed its end."""
    poll = select.poll()
    poll.register(connection[0], select.POLLRDHUP)
    return any(flags & (select.POLLHUP | select.POLLRDHUP | select.POLLERR) for _, flags in poll.poll(0))


def _shut_down(descriptor: int) -> None:
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)
