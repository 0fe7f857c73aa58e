"""In-process contenders: a Python program that does the I/O itself.

The program opens its device or file and prints `ready`. Then it reads lines with a number of seconds, and answers each
with a line of JSON: operations, seconds. Requests and buffers are made in advance, so that one iteration of the loop is
one call. Every offset is read once and checked before the first answer (on a disk only the first few, because it is
slow). `map` answers with the time to parse and open a table, `delayed` with that of one call with many delayed
requests.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import blkloom

from tables import table_text

BLOCK: Final = 4096
DELAY_MS: Final = 10
_OFFSETS: Final = 1 << 16
_CHECKED: Final = 256
_CALLS: Final = 1024  # calls between two looks at the clock


def main(side: str, subject: str, size: str, number: str, pattern: str = "randread") -> None:
    """Run one contender. side: `preadv` (subject: a file), `ram` (a device of size bytes), `map` (subject: a file to
    cut into `number` segments), `delayed` (memory; `number` requests a call), `table` (subject: the table of a device),
    `calls` (subject: a block device). number: segments for `map`, otherwise requests per call. pattern: `randread`, or
    `randwrite` for `table` and `calls`.
    """
    ways = {"preadv": _preadv, "ram": _ram, "map": _map, "delayed": _delayed}
    directed = {"table": _table, "calls": _calls}
    if side in directed:
        ready = directed[side](subject, int(size), int(number), writes=pattern == "randwrite")
    else:
        ready = ways[side](subject, int(size), int(number))
    with ready as answer:
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(float(line))), flush=True)


_Request = tuple[Literal["r", "w"], bytearray | memoryview, int]
Answer = Callable[[float], dict[str, float]]


def _offsets(size: int) -> list[int]:
    return [block * BLOCK for block in random.Random(0).sample(range(size // BLOCK), min(_OFFSETS, size // BLOCK))]


@contextmanager
def _preadv(path: str, size: int, batch: int) -> Iterator[Answer]:
    """os.preadv for each request; a batch is as many calls as it has requests."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    vectors = [[bytearray(BLOCK)] for _ in range(batch)]
    calls = [(vectors[i % batch], offset) for i, offset in enumerate(_offsets(size))]
    preadv = os.preadv
    if any(preadv(fd, vector, offset) != BLOCK for vector, offset in calls):
        raise OSError(f"{path}: short read")

    def turn(first: int) -> int:
        for vector, offset in calls[first : first + _CALLS]:
            preadv(fd, vector, offset)
        return _CALLS

    yield lambda seconds: _spin(turn, len(calls), seconds)
    os.close(fd)


@contextmanager
def _ram(_: str, size: int, batch: int) -> Iterator[Answer]:
    """`pread_into` for each request, or `batch` for several."""
    with blkloom.open(f"0 {size // 512} ram") as device:
        piece = os.urandom(1 << 20)
        for position in range(0, size, len(piece)):
            device.pwrite(piece[: size - position], position)
        yield _answer(device, [bytearray(BLOCK) for _ in range(batch)], _offsets(size), checked=_OFFSETS)


@contextmanager
def _table(text: str, size: int, batch: int, *, writes: bool) -> Iterator[Answer]:
    """Reads or writes of any table, with buffers aligned for direct I/O."""
    with blkloom.open(text) as device, _aligned(batch) as buffers:
        yield _answer(device, buffers, _offsets(size), checked=_CHECKED, writes=writes)


@contextmanager
def _calls(path: str, size: int, depth: int, *, writes: bool) -> Iterator[Answer]:
    """os.preadv or os.pwritev for each request on a block device, bypassing the page cache."""
    if depth != 1:
        raise ValueError(f"a system call is one request, not {depth}")
    fd = os.open(path, (os.O_RDWR if writes else os.O_RDONLY) | os.O_DIRECT | os.O_CLOEXEC)
    with _aligned(1) as buffers:
        move, offsets = os.pwritev if writes else os.preadv, _offsets(size)
        if any(move(fd, buffers, offset) != BLOCK for offset in offsets[:_CHECKED]):
            raise OSError(f"{path}: short transfer")

        def turn(first: int) -> int:
            for offset in offsets[first : first + _CALLS]:
                move(fd, buffers, offset)
            return _CALLS

        yield lambda seconds: _spin(turn, len(offsets), seconds)
    os.close(fd)


@contextmanager
def _aligned(count: int) -> Iterator[list[memoryview]]:
    """Page-aligned buffers with random bytes."""
    with mmap.mmap(-1, count * BLOCK) as memory, memoryview(memory) as whole:
        whole[:] = os.urandom(len(whole))
        pieces = [whole[at : at + BLOCK] for at in range(0, len(whole), BLOCK)]
        yield pieces
        for piece in pieces:
            piece.release()


def _answer(
    device: blkloom.Device,
    buffers: Sequence[bytearray | memoryview],
    offsets: list[int],
    *,
    checked: int,
    writes: bool = False,
) -> Answer:
    """Measure calls of one request, or of as many requests as there are buffers. checked: number of requests tried
    first.
    """
    if len(buffers) == 1:
        buffer, move = buffers[0], device.pwrite if writes else device.pread_into
        if any(move(buffer, offset) != BLOCK for offset in offsets[:checked]):
            raise OSError("short transfer")

        def turn(first: int) -> int:
            for offset in offsets[first : first + _CALLS]:
                move(buffer, offset)
            return _CALLS

        return lambda seconds: _spin(turn, len(offsets), seconds)
    batch, submit = len(buffers), device.batch
    way: Literal["r", "w"] = "w" if writes else "r"
    batches: list[list[_Request]] = [
        [(way, buffers[i], offset) for i, offset in enumerate(offsets[first : first + batch])]
        for first in range(0, len(offsets), batch)
    ]
    if any(moved != BLOCK for requests in batches[: checked // batch] for moved in submit(requests)):
        raise OSError("short transfer")
    each = _CALLS // batch

    def turn_batches(first: int) -> int:
        for requests in batches[first : first + each]:
            submit(requests)
        return each * batch

    return lambda seconds: _spin(turn_batches, len(batches), seconds, each)


@contextmanager
def _map(path: str, size: int, segments: int) -> Iterator[Answer]:
    text = table_text(Path(path), size, segments)

    def once(_: float) -> dict[str, float]:
        begun = time.perf_counter()
        with blkloom.open(text):
            opened = time.perf_counter()
        return {"operations": segments, "seconds": opened - begun}

    yield once


@contextmanager
def _delayed(_: str, size: int, number: int) -> Iterator[Answer]:
    """One call with so many reads, each of which is delayed."""
    sectors = size // 512
    with (
        blkloom.open(f"0 {sectors} ram") as below,
        blkloom.open(f"0 {sectors} delay blkloom:below 0 {DELAY_MS}", devices={"below": below}) as device,
    ):
        requests: list[_Request] = [("r", bytearray(BLOCK), offset) for offset in _offsets(size)[:number]]

        def once(_: float) -> dict[str, float]:
            begun = time.perf_counter()
            if any(result != BLOCK for result in device.batch(requests)):
                raise OSError("short transfer")
            return {"operations": number, "seconds": time.perf_counter() - begun}

        yield once


def _spin(turn: Callable[[int], int], calls: int, seconds: float, stride: int = _CALLS) -> dict[str, float]:
    """Repeat all calls until the time is over."""
    operations, first, begun = 0, 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < seconds:
        operations += turn(first)
        first = first + stride if first + 2 * stride <= calls else 0
    return {"operations": operations, "seconds": passed}


if __name__ == "__main__":
    main(*sys.argv[1:])
