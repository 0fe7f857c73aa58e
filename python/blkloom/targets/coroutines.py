"""Detects handlers that are coroutine functions, and runs blocking calls of coroutines on threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from blkloom.targets.loaded import LoadedTarget

_T = TypeVar("_T")

HANDLERS: Final = (
    "read",
    "write",
    "write_lazily",
    "on_no_space",
    "flush",
    "discard",
    "write_zeroes",
    "extents",
    "block_status",
    "message",
)
"""Handlers that may be `async def`."""

_CO_COROUTINE: Final = 0x80
"""`inspect.CO_COROUTINE`, a flag of code objects. Not imported, because the import of `inspect` is slow."""


def has_coroutines(target: type[LoadedTarget]) -> bool:
    """Whether one of its handlers is `async def`, decorated (by `functools.wraps`) or not."""
    return any(_is_coroutine_function(getattr(target, name)) for name in HANDLERS)


def _is_coroutine_function(function: Any) -> bool:
    while (wrapped := getattr(function, "__wrapped__", None)) is not None:
        function = wrapped
    code = getattr(function, "__code__", None)
    return code is not None and bool(code.co_flags & _CO_COROUTINE)


async def in_thread(call: Callable[..., _T], *arguments: Any) -> _T:
    """Runs `call` on a thread; returns or raises what the call does. Ends only after the call has ended: if cancelled,
    it raises CancelledError after that. A cancelled `asyncio.to_thread` does not wait, so its call could still change
    data that was read in the meantime.
    """
    import asyncio  # takes long

    work = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    cancelled = None
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return work.result()
    work.exception()  # looked at, so that asyncio does not complain of it
    raise cancelled
