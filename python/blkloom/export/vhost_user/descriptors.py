"""Descriptors that another program has sent: what they are, and how they are closed.

A close may wait for as long as the other program likes: for a FUSE file system of its own, or for a lingering socket.
So the event loop closes nothing but memory and eventfds; a thread closes anything else. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
from typing import Final

_EVENT: Final = "anon_inode:[eventfd]"


def is_event(descriptor: int) -> bool:
    """Whether it is an eventfd, and not just a path to one."""
    return os.readlink(f"/proc/self/fd/{descriptor}") == _EVENT and not (
        fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_PATH
    )


def is_memory(descriptor: int) -> bool:
    """Whether it is a memfd."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


class Closing:
    """Closes descriptors."""

    def __init__(self) -> None:
        self._ends: list[asyncio.Future[None]] = []

    def close(self, descriptor: int) -> None:
        """Closes a descriptor, now or in a thread."""
        if is_memory(descriptor) or is_event(descriptor):
            os.close(descriptor)
            return
        loop = asyncio.get_running_loop()
        end: asyncio.Future[None] = loop.create_future()

        def close() -> None:
            os.close(descriptor)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(end.set_result, None)

        self._ends.append(end)
        threading.Thread(target=close, name="close", daemon=True).start()

    async def wait(self) -> None:
        """Waits for the threads."""
        if self._ends:
            await asyncio.wait(self._ends)
