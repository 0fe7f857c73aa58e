"""Test targets for workers, whose coroutines send a question to the test over a Unix socket and wait for the answer:
`asking` in its fault handlers, `asking-backend` in a backend. The requests of a third one, `never`, wait for days.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from installed_targets import install_targets

PATIENCE = 60.0

_TARGET = """
import asyncio
import os
from blkloom import Backend, DelayFilter, Extent, LoadedTarget, TargetSpec, syntax

async def ask(path, operation):
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(f"{operation} {os.getpid()}\\n".encode())
        assert await reader.readline() == b"go on\\n"
    finally:
        writer.close()

class Asking(TargetSpec):
    path: str
    name = "asking"
    arguments = (syntax.word("path"),)

    def load(self, context, start, length):
        return LoadedAsking(self, [(0, length, Extent.fault())])

class LoadedAsking(LoadedTarget):
    writes = True

    async def read(self, offset, length):
        await ask(self.spec.path, "read")
        return b"a" * length

    async def write(self, offset, data, *, fua):
        await ask(self.spec.path, "write")

class Remote(Backend):
    def __init__(self, path):
        self.path = path

    async def read(self, offset, length):
        await ask(self.path, "read")
        return b"a" * length

    async def write(self, offset, data, *, fua):
        await ask(self.path, "write")

class AskingBackend(Asking):
    name = "asking-backend"

    def load(self, context, start, length):
        return LoadedTarget(self, [(0, length, Extent.backend(context.backend(Remote(self.path)), 0))])

class Never(TargetSpec):
    name = "never"

    def load(self, context, start, length):
        zero = Extent.zero(discard_writes=True)
        return LoadedTarget(self, [(0, length, Extent.filtered(DelayFilter(1e6, 1e6), zero))])
"""


_ENTRY_POINTS = {"asking": "Asking", "asking-backend": "AskingBackend", "never": "Never"}


class Question:
    """What a handler waits for."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(PATIENCE)
        words = b""
        while not words.endswith(b"\n"):
            received = connection.recv(100)
            assert received, "it was cancelled before it had asked"
            words += received
        operation, pid = words.decode().split()
        self.operation = operation
        self.pid = int(pid)

    def answer(self) -> None:
        """Lets it go on."""
        self._connection.sendall(b"go on\n")
        assert self._connection.recv(1) == b""
        self._connection.close()

    def is_cancelled(self, within: float = PATIENCE) -> bool:
        """Whether it goes away within so many seconds."""
        if not select.select([self._connection], [], [], within)[0]:
            return False
        gone = self._connection.recv(1) == b""
        self._connection.close()
        return gone


class Asked:
    """Where handlers ask."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(64)
        self._listening.settimeout(PATIENCE)

    def next(self) -> Question:
        """Waits for a handler to ask."""
        return Question(self._listening.accept()[0])

    def nothing_waits(self) -> bool:
        """Whether no handler has asked that `next` has not told of."""
        return not select.select([self._listening], [], [], 0)[0]

    def close(self) -> None:
        self._listening.close()


@contextmanager
def asking_target(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """Processes that are started from now on know targets `asking <path>` and `asking-backend <path>`."""
    install_targets(folder, monkeypatch, "asking", _TARGET, _ENTRY_POINTS)
    asked = Asked(folder / "asked")
    try:
        yield asked
    finally:
        asked.close()
