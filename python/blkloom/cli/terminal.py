"""Terminal control for a full-screen command: reads single keys, and restores the terminal at the end.

`Terminal` is a context manager for the main thread. In its block, keys need no Return and are not echoed. SIGTERM and
SIGHUP end the block as SystemExit, so that every `finally` runs. Settings and signal handlers are always restored,
except after SIGKILL.
"""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import sys
import termios
import tty
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any, Final, NoReturn, Self

RESIZED: Final = "resized"
SUSPENDED: Final = "suspended"
"""^Z was pressed: leave the block, stop the process, then enter a new block."""
HUNG_UP: Final = "hung up"
"""The terminal has hung up: no more keys will come."""

_KEYS: Final = {
    b"A": "up",
    b"B": "down",
    b"H": "home",
    b"F": "end",
    b"1~": "home",
    b"4~": "end",
    b"5~": "pageup",
    b"6~": "pagedown",
}
_SEQUENCE: Final = re.compile(rb"\x1b[\[O]([0-9;]*[A-Za-z~])|[\x00-\xff]", re.DOTALL)


def keys_of(data: bytes) -> list[str]:
    """Decodes input into keys: characters, and names of keys that send several characters."""
    found = []
    for match in _SEQUENCE.finditer(data):
        if match[1] is None:
            found.append(match[0].decode("latin-1"))
        elif (name := _KEYS.get(match[1])) is not None:
            found.append(name)
    return found


class Terminal:
    """keys: a descriptor of a terminal; None if there is no terminal to read keys from."""

    def __init__(self, keys: int | None) -> None:
        self._keys = keys
        self._stack = ExitStack()
        self._woken = -1

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, self._woken)
            stack.callback(os.close, wake)
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(wake, warn_on_full_buffer=False))
            for number in (signal.SIGTERM, signal.SIGHUP):
                stack.callback(signal.signal, number, signal.signal(number, _end))
            for number in (signal.SIGWINCH, signal.SIGTSTP):
                stack.callback(signal.signal, number, signal.signal(number, _wake_only))
            if self._keys is not None:
                settings = termios.tcgetattr(self._keys)
                stack.callback(_restore, self._keys, settings)
                tty.setcbreak(self._keys)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def wait(self, seconds: float) -> list[str]:
        """Waits for events: keys, RESIZED, SUSPENDED, HUNG_UP. Returns them at once; [] after `seconds`."""
        watched = [self._woken] if self._keys is None else [self._woken, self._keys]
        ready, _, _ = select.select(watched, [], [], max(0.0, seconds))
        found = []
        if self._woken in ready:
            numbers = os.read(self._woken, 4096)
            found += [RESIZED] if signal.SIGWINCH in numbers else []
            found += [SUSPENDED] if signal.SIGTSTP in numbers else []
        if self._keys is not None and self._keys in ready:
            found += self._pressed(self._keys)
        return found

    def _pressed(self, keys: int) -> list[str]:
        try:
            data = os.read(keys, 1024)
        except OSError:  # EIO: the terminal is gone, or belongs to another job
            data = b""
        return keys_of(data) if data else [HUNG_UP]


def stop_until_continued() -> None:
    """Stops the process, as ^Z does. Returns after `fg`. Call it outside of a `Terminal` block."""
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGTSTP)


def _restore(keys: int, settings: list[Any]) -> None:
    try:
        termios.tcsetattr(keys, termios.TCSADRAIN, settings)
    except termios.error as error:
        if error.args[0] != errno.EIO:  # it has hung up: nothing to restore
            raise


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _wake_only(_number: int, _frame: FrameType | None) -> Any:
    """Empty handler: the wakeup descriptor wakes `wait`."""
