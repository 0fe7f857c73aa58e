"""Runs blocking calls outside of the event loop, each on a new thread.

There is no thread pool: most workers are idle most of the time, and idle threads would cost memory in each of thousands
of workers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def in_thread(name: str, call: Callable[[], _T]) -> _T:
    """Returns or raises the outcome of `call`. Cancelling ends the wait, not the call."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[_T] = loop.create_future()

    def finish(deliver: Callable[[], None]) -> None:
        if not ended.done():
            deliver()

    def work() -> None:
        try:
            result = call()
        except BaseException as error:
            failed = error
            loop.call_soon_threadsafe(finish, lambda: ended.set_exception(failed))
        else:
            loop.call_soon_threadsafe(finish, lambda: ended.set_result(result))

    threading.Thread(target=work, name=name, daemon=True).start()
    return await ended


def verb_thread(minor: int) -> str:
    """The name of a thread that executes a verb of a device."""
    return f"blkloom-verb {minor}"
