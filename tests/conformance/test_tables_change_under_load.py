"""Suspend, resume and table swaps while several threads read and write over every access path.

Each thread has a part of the device, which is unaligned and crosses segments. It writes and reads back the part again
and again, and must always see its own last write.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import blkloom
from blkloom import _engine
from blkloom.table import Table, parse_table
from blkloom.targets.registry import all_targets
from blkloom.testing import NbdThread

from .growing import Growing
from .ways_in import WAYS_IN, WayIn

pytestmark = pytest.mark.timeout(120)

SECTORS = 2048
SIZE = SECTORS * 512
SHARE = SIZE // len(WAYS_IN) - 77
"""Bytes of each worker: not a multiple of anything."""
ROUNDS = 120
"""Changes of the table in one test."""


def table(text: str) -> Table:
    return parse_table(text, targets=all_targets([Growing]))


def one_line(path: Path) -> str:
    return f"0 {SECTORS} loop {path}"


def many_lines(path: Path, *, target: str = "linear") -> str:
    """The same bytes in segments of all lengths."""
    chance, at, lines = random.Random(7), 0, []
    while at < SECTORS:
        length = min(chance.choice([1, 3, 8, 61, 128]), SECTORS - at)
        lines.append(f"{at} {length} {target} {path} {at if target == 'linear' else at * 512}")
        at += length
    return "\n".join(lines)


class Worker:
    """Writes and verifies its part until told to stop. forgives: errnos a request may fail with."""

    def __init__(self, number: int, way: WayIn, stop: threading.Event, forgives: frozenset[int]) -> None:
        first, unit = number * SHARE + number, getattr(way, "unit", 1)
        self._first = -(-first // unit) * unit
        self._size = (first + SHARE) // unit * unit - self._first
        self._content = bytearray(self._size)
        self._way = way
        self._stop = stop
        self._forgives = forgives
        self._random = random.Random(number)
        self.requests = 0
        self.failures = 0
        self.began = threading.Event()

    def run(self) -> tuple[int, bytes]:
        """Its part, and what that holds in the end."""
        while not self._attempt(self._clear):
            pass
        self.began.set()
        while not self._stop.is_set():
            self._attempt(self._change)
            self._attempt(self._verify)
        while not self._attempt(self._verify_all):
            pass
        return self._first, bytes(self._content)

    def _attempt(self, request: Callable[[], None]) -> bool:
        self.requests += 1
        try:
            request()
        except OSError as error:
            if error.errno not in self._forgives:
                raise
            self.failures += 1
            return False
        return True

    def _clear(self) -> None:
        self._way.write([(self._first, bytes(self._size))], fua=False)

    def _change(self) -> None:
        at = self._random.randrange(self._size)
        data = self._random.randbytes(min(self._random.choice([1, 512, 5000, 40_000]), self._size - at))
        before = bytes(self._content[at : at + len(data)])
        try:
            self._way.write([(self._first + at, data)], fua=False)
        except OSError:
            # In part or not at all: put back what was there, so that it is known again.
            self._content[at : at + len(data)] = before
            while not self._attempt(lambda: self._way.write([(self._first + at, before)], fua=False)):
                pass
            raise
        self._content[at : at + len(data)] = data

    def _verify(self) -> None:
        at = self._random.randrange(self._size)
        length = min(self._random.choice([1, 512, 5000, 40_000]), self._size - at)
        found = self._way.read([(self._first + at, length)], df=False)
        assert found == self._content[at : at + length], f"{length} bytes at {self._first + at}"

    def _verify_all(self) -> None:
        assert self._way.read([(self._first, self._size)], df=False) == self._content


@contextmanager
def load(
    device: blkloom.Device, host: NbdThread, *, forgives: frozenset[int] = frozenset()
) -> Iterator[tuple[list[Worker], list[Future[tuple[int, bytes]]]]]:
    """A worker by every way in, already working; they are stopped, and must have been content, in the end."""
    stop = threading.Event()
    workers: list[Worker] = []

    def work(number: int, name: str, ready: Future[Worker]) -> tuple[int, bytes]:
        # An asyncio view belongs to one thread, so ways are entered where they are used.
        try:
            with WAYS_IN[name](device, host) as way:
                worker = Worker(number, way, stop, forgives)
                ready.set_result(worker)
                return worker.run()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise

    with ThreadPoolExecutor(len(WAYS_IN)) as pool:
        results = []
        try:
            for number, name in enumerate(WAYS_IN):
                ready: Future[Worker] = Future()
                results.append(pool.submit(work, number, name, ready))
                workers.append(ready.result(30))
            for worker in workers:
                assert worker.began.wait(30)
            yield workers, results
        finally:
            stop.set()
        for result in results:
            result.result(60)


def progress(workers: list[Worker]) -> None:
    """Returns when every worker has finished a request since, and begun another."""
    before = [worker.requests for worker in workers]
    pause = threading.Event()
    deadline = time.monotonic() + 30
    while any(worker.requests < count + 2 for worker, count in zip(workers, before, strict=True)):
        assert time.monotonic() < deadline, "a worker's request does not end"
        pause.wait(0.0002)


def final_content(results: list[Future[tuple[int, bytes]]]) -> dict[int, bytes]:
    return dict(result.result(0) for result in results)


def test_workers_keep_their_bytes_while_tables_are_replaced(
    engine: _engine.Engine, host: NbdThread, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(SIZE))
    tables = [table(one_line(path)), table(many_lines(path)), table(many_lines(path, target="loop"))]
    with blkloom.Device(tables[0], engine=engine) as device:
        with load(device, host) as (workers, results):
            for number in range(ROUNDS):
                device.load(tables[number % len(tables)])
                device.resume()
                progress(workers)
        device.flush()
        for at, content in final_content(results).items():
            assert path.read_bytes()[at : at + len(content)] == content


def test_nothing_changes_while_suspended_and_everything_goes_on_after(
    engine: _engine.Engine, host: NbdThread, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(SIZE))
    with blkloom.Device(table(many_lines(path)), engine=engine) as device, load(device, host) as (workers, _):
        for _ in range(ROUNDS):
            device.suspend()
            before = path.read_bytes()
            device.load(table(one_line(path)))
            device.clear()
            assert path.read_bytes() == before
            device.resume()
            progress(workers)


def test_old_file_is_not_written_once_its_table_is_replaced(
    engine: _engine.Engine, host: NbdThread, tmp_path: Path
) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(bytes(SIZE))
    with blkloom.Device(table(one_line(paths[0])), engine=engine) as device, load(device, host) as (workers, _):
        for number in range(ROUNDS // 2):
            old, new = paths[number % 2], paths[(number + 1) % 2]
            device.suspend()
            new.write_bytes(old.read_bytes())  # its content moves, as a mirror's would
            device.load(table(many_lines(new) if number % 3 else one_line(new)))
            device.resume()
            left = old.read_bytes()
            progress(workers)
            assert old.read_bytes() == left


def test_failing_table_fails_requests_and_the_next_serves_them_again(
    engine: _engine.Engine, host: NbdThread, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(SIZE))
    good, bad = table(many_lines(path)), table(f"0 {SECTORS} error")
    with (
        blkloom.Device(good, engine=engine) as device,
        load(device, host, forgives=frozenset({errno.EIO})) as (workers, _),
    ):
        for _ in range(ROUNDS // 4):
            device.load(bad)
            device.resume()
            progress(workers)
            device.load(good)
            device.resume()
            progress(workers)
    assert all(worker.failures for worker in workers)


def test_lower_device_is_suspended_and_replaced_under_the_upper_ones_load(
    engine: _engine.Engine, host: NbdThread, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(SIZE))
    with (
        blkloom.Device(table(one_line(path)), engine=engine, name="lower") as lower,
        blkloom.Device(
            table(f"0 {SECTORS} striped 2 8 blkloom:lower 0 blkloom:lower {SECTORS // 2}"),
            engine=engine,
            devices={"lower": lower},
        ) as upper,
        load(upper, host) as (workers, _),
    ):
        for number in range(ROUNDS):
            lower.load(table(many_lines(path) if number % 2 else one_line(path)))
            lower.resume()
            if number % 5 == 0:
                upper.suspend()
                upper.resume()
            progress(workers)


def test_clusters_are_allocated_and_forgotten_under_load(engine: _engine.Engine, host: NbdThread) -> None:
    with (
        blkloom.Device(table(f"0 {SECTORS} growing"), engine=engine) as device,
        load(device, host) as (workers, _),
    ):
        for number in range(ROUNDS):
            if number % 2:
                device.flush()  # drops every mapping
            else:
                device.suspend()
                device.resume()
            progress(workers)
