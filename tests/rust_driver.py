"""`RustDriver`: a disk over vhost-user, through the driver of libblkio (engine/core/examples/vhost_user_driver.rs)."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest

from documented import ROOT
from vhost_user_driver import DISCARD, WRITE_ZEROES

_PROGRAM = ROOT / "engine/target/debug/examples/vhost_user_driver"
_READ, _WRITE, _FLUSH, _DISCARD, _ZERO, _ZERO_AND_UNMAP = range(6)
_MOST = 1 << 20


def rust_driver() -> Path:
    """The program."""
    if not _PROGRAM.exists():
        pytest.skip(
            f"{_PROGRAM} is missing (cargo test --manifest-path engine/Cargo.toml --examples; make test builds it)"
        )
    return _PROGRAM


class RustDriver:
    """One request at a time, with the methods of `vhost_user_driver.Machine` that the conformance suite uses."""

    def __init__(self, path: str | os.PathLike[str], *, queues: int) -> None:
        self.queues = range(queues)
        command = [rust_driver(), "serve", path, str(queues)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.capacity: int = struct.unpack("<Q", self._receive(8))[0]

    def _receive(self, length: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(length)
        assert len(data) == length, f"the driver has ended: {self._process.poll()}"
        return data

    def _request(self, kind: int, offset: int, length: int, data: bytes = b"", *, queue: int = 0) -> bytes:
        """Raises OSError."""
        assert self._process.stdin is not None
        self._process.stdin.write(struct.pack("<IIQQ", kind, queue, offset, length) + data)
        self._process.stdin.flush()
        (result,) = struct.unpack("<i", self._receive(4))
        if result:
            raise OSError(-result, os.strerror(-result))
        return self._receive(length) if kind == _READ else b""

    def read(self, offset: int, length: int, *, queue: int = 0) -> bytes:
        """Bytes at an offset; both in sectors."""
        return b"".join(
            self._request(_READ, at, min(_MOST, offset + length - at), queue=queue)
            for at in range(offset, offset + length, _MOST)
        )

    def write(self, offset: int, data: bytes, *, queue: int = 0) -> None:
        """Writes bytes at an offset; both in sectors."""
        for at in range(0, len(data), _MOST):
            part = data[at : at + _MOST]
            self._request(_WRITE, offset + at, len(part), part, queue=queue)

    def write_nothing(self, offset: int) -> None:
        """A write without data."""
        self._request(_WRITE, offset, 0)

    def flush(self) -> None:
        """All that was written is durable afterwards."""
        self._request(_FLUSH, 0, 0)

    def clear(self, kind: int, offset: int, length: int, *, unmap: bool = False) -> None:
        """DISCARD or WRITE_ZEROES."""
        kinds = {DISCARD: _DISCARD, WRITE_ZEROES: _ZERO_AND_UNMAP if unmap else _ZERO}
        self._request(kinds[kind], offset, length)

    def close(self) -> None:
        """Ends the program."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(60) == 0
