"""Channel for messages and descriptors over a connected Unix stream socket, for threads: several send, one receives."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from blkloom.control.framing import Arrivals, ChannelClosed, ancillary_of, encode


class Channel:
    """A blocking channel. expected: type of the received messages (a Struct or a union of tagged ones)."""

    def __init__(self, connected: socket.socket, expected: Any) -> None:
        connected.setblocking(True)
        self._socket = connected
        self._arrivals = Arrivals(expected)
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """Descriptor of the socket."""
        return self._socket.fileno()

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Sends a message. The caller still owns the descriptors. Raises ChannelClosed."""
        line = encode(message, fds)
        with self._sending:
            try:
                sent = self._socket.sendmsg([line], ancillary_of(fds), socket.MSG_NOSIGNAL)
                if sent < len(line):
                    self._socket.sendall(line[sent:])
            except OSError as error:
                raise ChannelClosed(error.errno, f"the connection broke: {error.strerror}") from error

    def receive(self, timeout: float | None = None) -> tuple[Any, list[int]]:
        """Receives the next message and its descriptors. timeout: seconds. Raises ChannelClosed, BadMessage,
        TimeoutError.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (found := self._arrivals.next()) is None:
            if deadline is not None and self._socket.fileno() >= 0:
                left = max(0.0, deadline - time.monotonic())
                waiting = select.poll()  # select(2) does not support descriptors above 1023
                waiting.register(self._socket, select.POLLIN)
                if not waiting.poll(left * 1000):
                    raise TimeoutError(f"no answer within {timeout:g} s")
            self._arrivals.receive(self._socket)
        return found

    def close(self) -> None:
        """Closes the connection. A second call does nothing."""
        self._arrivals.close()
        self._socket.close()
