"""In which process an object was made: a fork of it has the object and none of the threads, locks and sockets' peers it
needs.

Objects with such needs keep an `OwnProcess`. In a fork what would use them raises ForkedError, and what would end them
(close, the end of the interpreter) does nothing: they are the parent's to end.
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
