"""Closes devices the program left open, when the interpreter ends.

Mapper threads are not daemons (a daemon thread inside native code is torn down mid-call), and the
interpreter joins such threads before it runs `atexit` callbacks; so this hooks in earlier, where
`concurrent.futures` does. The set of open devices is the one thing in blkloom that is global,
because the end of the process is.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from typing import Final, Protocol

_log = logging.getLogger(__name__)


class Closable(Protocol):
    """What can be left open."""

    def close(self) -> None:
        """Ends it."""


_open: Final[weakref.WeakSet[Closable]] = weakref.WeakSet()


def close_at_exit(device: Closable) -> None:
    """From now on the end of the interpreter closes `device`. Any thread."""
    _open.add(device)


def forget(device: Closable) -> None:
    """`device` has closed."""
    _open.discard(device)


def _close_all() -> None:
    for device in list(_open):
        try:
            device.close()
        except Exception:
            _log.exception("closing a device at exit")


# Where a future Python has no such hook, devices must be closed by the program.
getattr(threading, "_register_atexit", atexit.register)(_close_all)
