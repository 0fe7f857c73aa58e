"""Test of an untrusted image: open it, read it, write to it, and check that blkloom survives.

`examine` allows two outcomes: an error of blkloom (or an OSError of an I/O), or bytes. All other outcomes are a
`Misbehaviour`: an exception that shows a missing check (also one that a handler raised and the device turned into EIO),
more additional memory than `MEMORY`, a file opened outside the image's directory. The caller must detect hangs. Tests
and the fuzzer use this module.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import blkloom
from blkloom.errors import BlkloomError

MEMORY = 768 << 20
"""Beyond what the process had; stacks of threads and what malloc keeps for them count in full."""
PIECE = 64 << 10
_PIECES = 24
_P = ParamSpec("_P")
_R = TypeVar("_R")
_OURS = (sys.prefix, sys.base_prefix, str(Path(blkloom.__file__).parent), "/proc/", "/sys/", "/usr/")


class Misbehaviour(AssertionError):
    """What must not come of any image."""


@dataclass(frozen=True)
class Examined:
    """refused: why it was not opened, "" if it was. content: what was read of the whole disk, None where
    a part could not be read or the disk is too large.
    """

    refused: str = ""
    size: int = 0
    content: bytes | None = None


def examine(path: Path, *, writable: bool) -> Examined:
    """Raises Misbehaviour. writable: also write, zero, discard and flush here and there."""
    with _bounded_memory(), _watched(path.parent), _logged() as surprises:
        try:
            found = _use(path, writable=writable)
        except BlkloomError as error:
            if not str(error).strip():
                raise Misbehaviour("an error without words") from error
            found = Examined(refused=str(error))
        except MemoryError as error:
            raise Misbehaviour(f"it takes more than {MEMORY >> 20} MiB") from error
        except Exception as error:
            raise Misbehaviour(f"{type(error).__name__}: {error}") from error
    if surprises:
        raise Misbehaviour(f"raised inside the target: {surprises[0]}")
    return found


def _use(path: Path, *, writable: bool) -> Examined:
    device = blkloom.open(path, read_only=not writable)
    try:
        return _use_device(device, writable=writable)
    finally:
        _try(device.close)  # its flush fails where the image was found corrupt after it was written to


def _use_device(device: blkloom.Device, *, writable: bool) -> Examined:
    size = device.size
    whole = size <= _PIECES * PIECE
    places = list(range(0, size, PIECE)) if whole else _here_and_there(size)
    pieces = [_try(device.pread, min(PIECE, size - at), at) for at in places]
    for at in places:
        for context in ("base:allocation", *device.contexts[:4]):
            _try(device.extents, at, min(PIECE, size - at), context=context)
    if writable:
        for at in places:
            length = min(PIECE, size - at)
            _try(device.pwrite, b"\xa5" * min(1024, length), at)
            _try(device.write_zeroes, at + length // 2, min(4096, length - length // 2))
            _try(device.discard, at, length)
        _try(device.flush)
    if whole and None not in pieces:
        return Examined(size=size, content=b"".join(piece for piece in pieces if piece is not None))
    return Examined(size=size)


def _here_and_there(size: int) -> list[int]:
    last = (size - PIECE) // 512 * 512
    return sorted({last * number // (_PIECES - 1) // 512 * 512 for number in range(_PIECES)})


def _try(call: Callable[_P, _R], *arguments: _P.args, **named: _P.kwargs) -> _R | None:
    """None for an I/O that failed, which a broken image may."""
    try:
        return call(*arguments, **named)
    except OSError:
        return None


@contextmanager
def _bounded_memory() -> Iterator[None]:
    gc.collect()  # devices of earlier cases
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[5]) * resource.getpagesize()
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))


class _Openings:
    """Paths that this process opens while the hook is active. An audit hook cannot be taken out again, so
    there is one for good.
    """

    def __init__(self) -> None:
        self.seen: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and self.seen is not None and isinstance(arguments[0], str | bytes):
            self.seen.append(os.fsdecode(arguments[0]))


_openings = _Openings()


@contextmanager
def _watched(folder: Path) -> Iterator[None]:
    seen: list[str] = []
    _openings.seen = seen
    try:
        yield
    finally:
        _openings.seen = None
    inside = os.path.realpath(folder)
    for path in seen:
        real = os.path.realpath(path)
        if not (real == inside or real.startswith((inside + "/", *_OURS))) or real.endswith("/mem"):
            raise Misbehaviour(f"it opened {path}")


class _Surprises(logging.Handler):
    """Exceptions in the log that are not of the kinds a target may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, OSError | BlkloomError):
            self.found.append(f"{type(error).__name__}: {error} ({_where(error)})")


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "?"


@contextmanager
def _logged() -> Iterator[list[str]]:
    handler, log = _Surprises(), logging.getLogger("blkloom")
    log.addHandler(handler)
    try:
        yield handler.found
    finally:
        log.removeHandler(handler)
