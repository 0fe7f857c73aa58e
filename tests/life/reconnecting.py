"""Client that writes, flushes, loses its server, reconnects, and checks the data.

Every block contains the number of its write. Data of a completed flush must be readable after any death of the server.
A write that was answered but not flushed may be there or not; a write that was not answered may be there in part. Each
instance belongs to one thread.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from pathlib import Path

from conformance.nbd_client import FLUSH, READ, WRITE, NbdClient, Style

BLOCK = 4096
RETRY_SECONDS = 0.01
"""Between two attempts to connect, as a client of NBD that reconnects does."""


class ReconnectingWriter(threading.Thread):
    """Writes to `blocks` blocks of a device until `finish`; `failure` says what went wrong."""

    def __init__(self, path: Path, *, first: int, blocks: int, seed: int) -> None:
        super().__init__(name=f"writer {seed}", daemon=True)
        self._path = path
        self._first, self._blocks = first, blocks
        self._random = random.Random(seed)
        self._number = 0
        # Per block: the numbers of writes that may be there; None: anything may.
        self._possible: list[set[int] | None] = [{0} for _ in range(blocks)]
        self._finishing = threading.Event()
        self.failure: BaseException | None = None
        self.flushes = 0
        self.reconnects = 0
        self.progressed = threading.Condition()

    def finish(self) -> None:
        """Stops writing, reads everything back. Raises what went wrong."""
        self._finishing.set()
        self.join(120)
        assert not self.is_alive(), f"{self.name} hangs"
        if self.failure:
            raise self.failure

    def expected(self) -> bytes:
        """What its blocks hold, once it has finished."""
        assert not self.is_alive()
        return b"".join(_made_by(block, possible) for block, possible in enumerate(self._possible))

    def wait_for_flushes(self, more: int, timeout: float = 60) -> None:
        """Until that many further flushes have completed (or it failed)."""
        with self.progressed:
            wanted = self.flushes + more
            done = self.progressed.wait_for(lambda: self.flushes >= wanted or self.failure, timeout)
            assert done, f"{self.name}: no flush completes any more"
        if self.failure:
            raise self.failure

    def run(self) -> None:
        """The thread."""
        try:
            while not self._finishing.is_set():
                try:
                    self._session()
                except (ConnectionError, FileNotFoundError):
                    self.reconnects += 1
                    self._finishing.wait(RETRY_SECONDS)
            client = self._connect()
            self._check(client)
            client.close()
        except BaseException as error:
            self.failure = error
            with self.progressed:
                self.progressed.notify_all()

    def _session(self) -> None:
        client = self._connect()
        try:
            self._check(client)
            while not self._finishing.is_set():
                chosen = self._random.sample(range(self._blocks), 8)
                for block in chosen:
                    self._write(client, block)
                _ask(client, FLUSH)
                for block in chosen:
                    possible = self._possible[block]
                    assert possible is not None
                    self._possible[block] = {max(possible)}
                with self.progressed:
                    self.flushes += 1
                    self.progressed.notify_all()
        finally:
            client.close()

    def _connect(self) -> NbdClient:
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(60)
        try:
            connected.connect(str(self._path))
            return NbdClient(connected, "", Style.STRUCTURED)
        except BaseException:
            connected.close()
            raise

    def _write(self, client: NbdClient, block: int) -> None:
        self._number += 1
        before, self._possible[block] = self._possible[block], None  # until it is answered
        data = content(block, self._number)
        _ask(client, WRITE, (self._first + block) * BLOCK, BLOCK, data)
        self._possible[block] = (before or set()) | {self._number}

    def _check(self, client: NbdClient) -> None:
        """Everything is as it may be; what it is, it stays."""
        for block, possible in enumerate(self._possible):
            if possible is None:
                self._write(client, block)
                continue
            data = _ask(client, READ, (self._first + block) * BLOCK, BLOCK)
            found = struct.unpack_from("<Q", data)[0]
            assert found in possible, f"block {block} holds write {found}, may hold {sorted(possible)}"
            assert data == _made_by(block, {found}), f"block {block} is torn"
            self._possible[block] = {found}


def _ask(client: NbdClient, command: int, offset: int = 0, length: int = 0, payload: bytes = b"") -> bytes:
    reply = client.ask(command, offset, length, payload=payload)
    assert reply.error == 0, f"command {command} at {offset}: NBD error {reply.error} {reply.message}"
    return reply.data


def _made_by(block: int, possible: set[int] | None) -> bytes:
    """The block as the only write that may be there has made it; zeros before all."""
    assert possible is not None
    (number,) = possible
    return content(block, number) if number else bytes(BLOCK)


def content(block: int, number: int) -> bytes:
    """A block as write `number` makes it."""
    return struct.pack("<QQ", number, block) * (BLOCK // 16)
