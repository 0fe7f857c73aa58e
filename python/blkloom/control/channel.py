"""Messages and descriptors over a connected Unix stream socket, for threads: several may send, one receives."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from blkloom.control.framing import Arrivals, ChannelClosed, ancillary_of, encode


class Channel:
    """Blocking. expected: the type of messages that come (a Struct or a union of tagged ones)."""

    def __init__(self, connected: socket.socket, expected: Any) -> None:
        connected.setblocking(True)
        self._socket = connected
        self._arrivals = Arrivals(expected)
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The socket's."""
        return self._socket.fileno()

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Sends; the descriptors stay the caller's. Raises ChannelClosed."""
        line = encode(message, fds)
        with self._sending:
            try:
                sent = self._socket.sendmsg([line], ancillary_of(fds), socket.MSG_NOSIGNAL)
                if sent < len(line):
                    self._socket.sendall(line[sent:])
            except OSError as error:
                raise ChannelClosed(error.errno, f"the connection broke: {error.strerror}") from error

    def receive(self, timeout: float | None = None) -> tuple[Any, list[int]]:
        """The next message and its descriptors. timeout: seconds. Raises ChannelClosed, BadMessage,
        TimeoutError.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (found := self._arrivals.next()) is None:
            if deadline is not None and self._socket.fileno() >= 0:
                left = max(0.0, deadline - time.monotonic())
                waiting = select.poll()  # select(2) knows no descriptors above 1023
                waiting.register(self._socket, select.POLLIN)
                if not waiting.poll(left * 1000):
                    raise TimeoutError(f"no answer within {timeout:g} s")
            self._arrivals.receive(self._socket)
        return found

    def close(self) -> None:
        """Ends the connection. Does no harm twice."""
        self._arrivals.close()
        self._socket.close()
