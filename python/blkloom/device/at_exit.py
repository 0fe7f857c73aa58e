"""Closes devices that the program left open, when the interpreter ends.

Mapper threads are not daemon threads (a daemon thread inside native code is ended in the middle of a call), and the
interpreter joins such threads before it runs `atexit` callbacks. So this module registers its callback where
`concurrent.futures` does, which runs earlier. The set of open devices is the only global state in blkloom, because the
end of the process is global.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from typing import Final, Protocol

_log = logging.getLogger(__name__)


class Closable(Protocol):
    """An object that the end of the interpreter can close."""

    def close(self) -> None:
        """Closes the object."""


_open: Final[weakref.WeakSet[Closable]] = weakref.WeakSet()


def close_at_exit(device: Closable) -> None:
    """Registers `device`, to be closed at the end of the interpreter. Any thread."""
    _open.add(device)


def forget(device: Closable) -> None:
    """Unregisters `device`, which has closed."""
    _open.discard(device)


def _close_all() -> None:
    for device in list(_open):
        try:
            device.close()
        except Exception:
            _log.exception("closing a device at exit")


# If a future version of Python has no such hook, the program must close its devices.
getattr(threading, "_register_atexit", atexit.register)(_close_all)
