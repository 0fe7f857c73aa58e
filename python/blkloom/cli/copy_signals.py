"""The end of `blkloom copy` by signals: within a bounded time, whatever does not answer.

A signal raises an exception in the main thread, which notes how much is copied and ends what it has begun. But that
thread may wait for a disk or a server that does not answer, where no handler of Python runs. So another thread learns
of the signals, too (signal.set_wakeup_fd), and ends the process if that takes too long, or at the second ^C.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final, NoReturn

_SECONDS: Final = 10.0
"""For which the main thread may end the copy after a signal."""


class EndedBySignals:
    """SIGTERM and SIGHUP end the block as SystemExit; SIGINT does so as KeyboardInterrupt anyway. Signals that are
    ignored stay so. advice: what is printed if the process has to be ended.
    """

    def __init__(self) -> None:
        self.advice: Callable[[], str] = str
        self._former: dict[int, Any] = {}
        self._former_fd = -1
        self._receiver, self._sender = socket.socketpair()
        self._thread = threading.Thread(target=self._wait, name="blkloom-signals", daemon=True)

    def __enter__(self) -> EndedBySignals:
        self._sender.setblocking(False)
        self._thread.start()
        self._former_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if (former := signal.getsignal(number)) != signal.SIG_IGN:  # as nohup does
                self._former[number] = former
                signal.signal(number, _end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        self._sender.close()  # ends the thread
        self._thread.join()
        self._receiver.close()

    def _wait(self) -> None:
        """The thread: waits for a signal, then for the end of the block."""
        first = 0
        while True:
            ready, _, _ = select.select([self._receiver], [], [], _SECONDS if first else None)
            if not ready:
                self._end_process(first, "what was begun does not end")
            numbers = self._receiver.recv(64)
            if not numbers:
                return
            for number in numbers:
                if first and number == signal.SIGINT:
                    self._end_process(number, "interrupted again")
                if number == signal.SIGINT or number in self._former:
                    first = first or number

    def _end_process(self, number: int, why: str) -> NoReturn:
        os.write(sys.stderr.fileno(), f"\nblkloom: {why}: ended without waiting\n{self.advice()}".encode())
        os._exit(128 + number)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
