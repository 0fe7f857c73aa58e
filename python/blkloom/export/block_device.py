"""Removal of a block device that a driver of the kernel has made for an export, and the checks before it."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from blkloom.errors import AttachError, BlkloomError

if TYPE_CHECKING:
    from blkloom.control.states import ExportState

_log = logging.getLogger(__name__)

_SYNC_SECONDS: Final = 30.0
"""For the cached pages of a block device to be written before it is removed."""


async def written_and_unused(state: ExportState, check: Callable[[ExportState], None]) -> None:
    """Runs `check` on a thread, with a time limit: it calls `check_unused`. Raises AttachError."""
    try:
        async with asyncio.timeout(_SYNC_SECONDS):
            await asyncio.to_thread(check, state)
    except TimeoutError as error:
        what = f"what is cached of it was not written within {_SYNC_SECONDS:g} s"
        cure = "see what its storage waits for, or use --force: it is lost then"
        raise AttachError(what, path=state.path, errno=errno.ETIMEDOUT, cure=cure) from error


def check_unused(path: str, users: Collection[str]) -> None:
    """Writes what is cached of an unused block device. users: processes that have it open, as text. Raises AttachError
    (EBUSY) where there are some, and where it is mounted or used by another device.
    """
    try:
        if not users:
            with suppress(FileNotFoundError):
                device = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
                try:
                    os.fsync(device)
                finally:
                    os.close(device)
            return
    except OSError as error:
        if error.errno != errno.EBUSY:
            what = f"what is cached of it cannot be written: {os.strerror(error.errno or errno.EIO)}"
            cure = "use --force: it is lost then"
            raise AttachError(what, path=path, errno=error.errno or errno.EIO, cure=cure) from error
    by = ", ".join(users) or f"`fuser -vm {path}` tells by whom"
    cure = "unmount or close it first, or use --force: requests of its users fail then"
    raise AttachError(f"is in use ({by})", path=path, errno=errno.EBUSY, cure=cure)


def remove_on_thread(path: str, remove: Callable[[], None]) -> None:
    """Calls `remove`, which removes the block device at `path`, on a thread of its own: that may wait. An error is
    logged.
    """

    def run() -> None:
        try:
            remove()
        except (BlkloomError, OSError) as error:
            _log.error("%s cannot be removed: %s", path, error)

    threading.Thread(target=run, name=f"blkloom-remove {os.path.basename(path)}", daemon=True).start()
