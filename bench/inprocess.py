"""The in-process contenders: a Python program that does the I/O itself.

Run as a program it brings one side up, prints `ready`, then reads a number of seconds a line and
answers each with a line of JSON: operations, seconds. Requests and buffers are made beforehand, so
that a loop's iteration is one call and nothing else. Every offset is read once and checked before
the first answer. `map` answers with how long a table of so many segments took to parse and open.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import blkloom
from blkloom.table import parse
from blkloom.target.registry import builtin_targets

from tables import table_text

BLOCK: Final = 4096
_OFFSETS: Final = 1 << 16
_CALLS: Final = 1024  # calls between two looks at the clock


def main(side: str, subject: str, size: str, number: str) -> None:
    """side: `preadv` (subject: a file), `ram` (a device of size bytes), `map` (subject: a file to cut
    into `number` segments). number otherwise: requests a call.
    """
    ways = {"preadv": _preadv, "ram": _ram, "map": _map}
    with ways[side](subject, int(size), int(number)) as answer:
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(float(line))), flush=True)


_Request = tuple[Literal["r", "w"], bytearray, int]
Answer = Callable[[float], dict[str, float]]


def _offsets(size: int) -> list[int]:
    return [block * BLOCK for block in random.Random(0).sample(range(size // BLOCK), min(_OFFSETS, size // BLOCK))]


@contextmanager
def _preadv(path: str, size: int, batch: int) -> Iterator[Answer]:
    """One os.preadv a request; a batch is that many calls with that many buffers."""
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
    """pread_into one by one, or `batch` requests a call."""
    with blkloom.open(f"0 {size // 512} ram") as device:
        piece = os.urandom(1 << 20)
        for position in range(0, size, len(piece)):
            device.pwrite(piece[: size - position], position)
        offsets = _offsets(size)
        if batch == 1:
            buffer, pread_into = bytearray(BLOCK), device.pread_into
            if any(pread_into(buffer, offset) != BLOCK for offset in offsets):
                raise OSError("ram: short read")

            def turn(first: int) -> int:
                for offset in offsets[first : first + _CALLS]:
                    pread_into(buffer, offset)
                return _CALLS

            yield lambda seconds: _spin(turn, len(offsets), seconds)
        else:
            buffers, submit = [bytearray(BLOCK) for _ in range(batch)], device.batch
            batches: list[list[_Request]] = [
                [("r", buffers[i], offset) for i, offset in enumerate(offsets[first : first + batch])]
                for first in range(0, len(offsets), batch)
            ]
            if any(moved != BLOCK for requests in batches for moved in submit(requests)):
                raise OSError("ram: short read")
            each = _CALLS // batch

            def turn_batches(first: int) -> int:
                for requests in batches[first : first + each]:
                    submit(requests)
                return each * batch

            yield lambda seconds: _spin(turn_batches, len(batches), seconds, each)


@contextmanager
def _map(path: str, size: int, segments: int) -> Iterator[Answer]:
    text = table_text(Path(path), size, segments)

    def once(_: float) -> dict[str, float]:
        begun = time.perf_counter()
        table = parse(text, targets=builtin_targets())
        parsed = time.perf_counter()
        with blkloom.open(table):
            mapped = time.perf_counter()
        return {"operations": segments, "seconds": mapped - begun, "parse_seconds": parsed - begun}

    yield once


def _spin(turn: Callable[[int], int], calls: int, seconds: float, stride: int = _CALLS) -> dict[str, float]:
    """Turns through all calls, again and again, until the time is over."""
    operations, first, begun = 0, 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < seconds:
        operations += turn(first)
        first = first + stride if first + 2 * stride <= calls else 0
    return {"operations": operations, "seconds": passed}


if __name__ == "__main__":
    main(*sys.argv[1:])
