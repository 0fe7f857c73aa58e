"""FUSE connection whose requests a test reads and answers one by one, while threads of the test use its file.

    with FuseByHand(tmp_path / "node") as fuse:
        reading = fuse.start(lambda fd: os.pread(fd, 4096, 0))   # in a thread; opens the file first
        request = fuse.take(Op.READ)                              # GETATTR, OPEN and the like are answered meanwhile
        fuse.answer(request, b"x" * 4096)
        assert fuse.serve(reading) == b"x" * 4096                 # what else comes is answered

Nothing waits for ever: a request that does not come fails the test, and what a thread waits for ends with the mount.

Source: Linux include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import errno
import os
import select
import struct
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import pytest

from blkloom.export.fuse.mount import clone, mount, unmount
from faulty_fs import needs_fuse

T = TypeVar("T")
TIMEOUT = 30.0
"""Seconds after which what a test waits for is taken never to come."""
SIZE = 1 << 20
"""Bytes of the file."""
RESENT = 1 << 63
_BUFFER = (1 << 20) + 4096
_NOTIFY_RESEND = 7
_QUIET = 0.05
"""Seconds in which the kernel says nothing: what it had to say was there before."""


class Op(IntEnum):
    """Requests, by their opcodes."""

    GETATTR = 3
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36


class Message(NamedTuple):
    """A request. through: the descriptor that it was read through."""

    opcode: int
    unique: int
    body: bytes
    through: int

    @property
    def offset(self) -> int:
        """Of a READ or WRITE, in bytes."""
        return int.from_bytes(self.body[8:16], "little")

    @property
    def interrupted(self) -> int:
        """Of an INTERRUPT: the unique of the request that it is about."""
        return int.from_bytes(self.body[:8], "little")


class FuseByHand:
    """Mounted on `path` from `__enter__` to `__exit__`, which closes all its descriptors. Skips without FUSE."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = ThreadPoolExecutor(8)
        self.descriptors: list[int] = []
        """Those of the connection; the first is that of the mount."""

    def __enter__(self) -> Self:
        needs_fuse()
        if os.geteuid() != 0:
            pytest.skip("clones of a FUSE connection are tested as root")
        self._mount, device = mount(self._path, source="by hand")
        self.descriptors.append(device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for descriptor in self.descriptors.copy():
            self.close(descriptor)
        unmount(self._mount, lazy=True)
        self._threads.shutdown()

    @property
    def path(self) -> str:
        """Of the file."""
        return self._mount.path

    @property
    def device(self) -> int:
        """The descriptor that was mounted."""
        return self.descriptors[0]

    def clone(self) -> int:
        """A further descriptor of the connection."""
        self.descriptors.append(clone(self.device))
        return self.descriptors[-1]

    def close(self, descriptor: int) -> None:
        """Close one of them."""
        self.descriptors.remove(descriptor)
        os.close(descriptor)

    def start(self, use: Callable[[int], T]) -> Future[T]:
        """Run `use` in a thread, with the file open for reading and writing."""

        def run() -> T:
            fd = os.open(self.path, os.O_RDWR)
            try:
                return use(fd)
            finally:
                with suppress(OSError):  # of FLUSH, where the connection has ended
                    os.close(fd)

        return self._threads.submit(run)

    def take(self, opcode: Op, *, through: int | None = None) -> Message:
        """Read the next request of that kind. Others before it are answered, so that it comes."""
        while True:
            message = self.next(through=through)
            if message.opcode == opcode:
                return message
            self.answer_simply(message)

    def next(self, *, through: int | None = None) -> Message:
        """Read the next request, of whatever kind."""
        descriptor = self.device if through is None else through
        assert self._has_come(descriptor, TIMEOUT), "no request comes"
        message = os.read(descriptor, _BUFFER)
        _, opcode, unique, *_ = struct.unpack_from("=IIQQIIII", message)
        return Message(opcode, unique, message[40:], descriptor)

    def is_quiet(self) -> bool:
        """Whether no request waits to be read."""
        return not self._has_come(self.device, _QUIET)

    def answer(self, message: Message, body: bytes = b"", *, error: int = 0, through: int | None = None) -> None:
        """Answer it, through the descriptor that it was read through, or another."""
        reply = struct.pack("=IiQ", 16 + len(body), -error, message.unique) + body
        os.write(message.through if through is None else through, reply)

    def answer_simply(self, message: Message, *, through: int | None = None) -> None:
        """Do what it asks for, to a file of zeros."""
        match message.opcode:
            case Op.INIT:
                *_, ahead, low, high = struct.unpack_from("=5I", message.body)
                flags = (1 | 1 << 5 | 1 << 15 | 1 << 22 | 1 << 30 | 1 << 36 | 1 << 39) & (low | high << 32)
                numbers = (7, 40, ahead, flags & 0xFFFF_FFFF, 64, 48, 1 << 20, 1, 256, 0, flags >> 32)
                body = struct.pack("=4I2H2I2HI28x", *numbers)
            case Op.GETATTR:
                body = struct.pack("=16x6Q10I", 1, SIZE, SIZE >> 9, 0, 0, 0, 0, 0, 0, 0o100600, 1, 0, 0, 0, 4096, 0)
            case Op.OPEN:
                body = struct.pack("=QII", 1, 1 | 1 << 6, 0)
            case Op.READ:
                body = bytes(int.from_bytes(message.body[16:20], "little"))
            case Op.WRITE:
                body = message.body[16:20] + bytes(4)
            case Op.RELEASE | Op.FSYNC | Op.FLUSH:
                body = b""
            case _:
                self.answer(message, error=errno.ENOSYS, through=through)
                return
        self.answer(message, body, through=through)

    def serve(self, future: Future[T], *, through: int | None = None) -> T:
        """Answer what comes until a thread that uses the file has ended; its result."""
        descriptor = self.device if through is None else through
        while not future.done():
            if self._has_come(descriptor, _QUIET):
                self.answer_simply(self.next(through=descriptor))
        return future.result()

    def resend(self, *, through: int | None = None) -> None:
        """FUSE_NOTIFY_RESEND."""
        os.write(self.device if through is None else through, struct.pack("=IiQ", 16, _NOTIFY_RESEND, 0))

    def _has_come(self, descriptor: int, timeout: float) -> bool:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(timeout * 1000))
