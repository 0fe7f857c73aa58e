"""Fork detection: a fork inherits Python objects, but not the threads, locks and connections that they need.

Such objects have an `OwnProcess`. In a fork, their methods raise ForkedError, and closing them (or the end of the
interpreter) does nothing: only the parent ends them.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType

from blkloom.errors import ForkedError


class OwnProcess:
    """The process that makes `what`: a name for error messages."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._pid = os.getpid()

    @property
    def is_current(self) -> bool:
        """False in a fork."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises ForkedError in a fork."""
        if not self.is_current:
            raise ForkedError.use_of(self._what)


class ProcessLock:
    """An RLock that raises ForkedError in a fork: a thread that is not there may have it."""

    def __init__(self, process: OwnProcess) -> None:
        self._process = process
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._process.check()
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()
