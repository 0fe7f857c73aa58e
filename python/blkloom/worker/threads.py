"""Blocking calls off the event loop, each on a thread that ends with it.

A worker mostly does nothing; threads that wait for work would cost each of thousands of workers memory.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def in_thread(name: str, call: Callable[[], _T]) -> _T:
    """What `call` returns or raises. Cancelling ends the wait, not the call."""
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
