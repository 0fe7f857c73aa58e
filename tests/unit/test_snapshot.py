"""The targets `snapshot`, `snapshot-origin` and `snapshot-merge`, and their exception stores."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blkloom
from async_target import PATIENCE
from blkloom.errors import BackingError, TableError
from blkloom.table import format_table, parse_table
from blkloom.targets.registry import builtin_targets

CHUNK = 4096
CHUNKS = 64
SIZE = CHUNK * CHUNKS
SECTORS = SIZE // 512


class Stack:
    """Devices that name each other: `real`, and those that a test opens on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.devices: dict[str, blkloom.Device] = {}
        self.contents = random.Random(5).randbytes(SIZE)
        (folder / "real").write_bytes(self.contents)
        self.open("real", f"linear {folder}/real 0")

    def open(self, name: str, target: str, **options: bool) -> blkloom.Device:
        table = f"0 {SECTORS} {target}"
        self.devices[name] = blkloom.open(table, name=name, devices=self.devices, **options)
        return self.devices[name]

    def origin(self) -> blkloom.Device:
        return self.open("origin", "snapshot-origin blkloom:real")

    def store(self, name: str, chunks: int = 2 * CHUNKS) -> Path:
        with (self.folder / name).open("ab") as file:
            file.truncate(chunks * CHUNK)
        return self.folder / name

    def snapshot(self, name: str, kind: str = "P", chunk: int = 8, chunks: int = 2 * CHUNKS) -> blkloom.Device:
        return self.open(name, f"snapshot blkloom:real {self.store(f'{name}.cow', chunks)} {kind} {chunk}")

    def close(self, *names: str) -> None:
        for name in names or list(reversed(self.devices)):
            self.devices.pop(name).close()


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path)
    yield stack
    stack.close()


def contents(device: blkloom.Device) -> bytes:
    return device.pread(device.size, 0)


def status(device: blkloom.Device) -> str:
    return device.status()[0][3]


def wait_for(text: str, device: blkloom.Device) -> None:
    end = time.monotonic() + PATIENCE
    while status(device) != text:
        assert time.monotonic() < end, f"{status(device)} after {PATIENCE} s"
        time.sleep(0.005)


def number_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as raised:  # noqa: PT011 - the caller looks at the number
        call()
    return raised.value.errno


def test_a_snapshot_keeps_what_the_origin_overwrites(stack: Stack) -> None:
    origin, snapshot = stack.origin(), stack.snapshot("s")
    assert status(snapshot) == "16/1024 16"
    origin.pwrite(b"x" * 10000, 5000)
    assert contents(snapshot) == stack.contents
    assert status(snapshot) == "40/1024 16"
    origin.write_zeroes(20 * CHUNK, CHUNK)
    origin.discard(30 * CHUNK, 2 * CHUNK)
    assert contents(snapshot) == stack.contents
    assert contents(origin)[5000:15000] == b"x" * 10000
    assert contents(origin)[20 * CHUNK : 21 * CHUNK] == bytes(CHUNK)
    assert status(snapshot) == "64/1024 16"


def test_a_write_to_a_snapshot_changes_nothing_else(stack: Stack) -> None:
    origin, one, other = stack.origin(), stack.snapshot("one"), stack.snapshot("other", "N", 16)
    one.pwrite(b"1" * 100, 3 * CHUNK + 7)
    other.write_zeroes(CHUNK, 5 * CHUNK)
    assert contents(origin) == stack.contents
    expected = bytearray(stack.contents)
    expected[3 * CHUNK + 7 : 3 * CHUNK + 107] = b"1" * 100
    assert contents(one) == expected
    expected = bytearray(stack.contents)
    expected[CHUNK : 6 * CHUNK] = bytes(5 * CHUNK)
    assert contents(other) == expected
    assert status(other) == "48/1024 0"


def test_a_later_snapshot_has_what_the_origin_contains_then(stack: Stack) -> None:
    origin, first = stack.origin(), stack.snapshot("first")
    origin.pwrite(b"a" * CHUNK, 0)
    between = contents(origin)
    second = stack.snapshot("second", chunk=16)
    origin.pwrite(b"b" * CHUNK, 0)
    assert (contents(first), contents(second)) == (stack.contents, between)


def test_a_persistent_store_is_read_again(stack: Stack) -> None:
    origin, snapshot = stack.origin(), stack.snapshot("s", chunk=0, chunks=CHUNKS)
    for chunk in range(0, CHUNKS, 5):
        origin.pwrite(os.urandom(10), chunk * CHUNK)
    snapshot.pwrite(b"mine", 99)
    seen, before = contents(snapshot), status(snapshot)
    stack.close("s")
    again = stack.snapshot("s", chunk=8, chunks=CHUNKS)  # its own chunk size counts
    assert (contents(again), status(again)) == (seen, before)
    header = struct.unpack("<4I", (stack.folder / "s.cow").read_bytes()[:16])
    assert header == (0x70416E53, 1, 1, 32)


def test_exceptions_continue_in_the_next_area(tmp_path: Path) -> None:
    """With chunks of 512 bytes an area has 32 exceptions."""
    stack = Stack(tmp_path)
    origin, snapshot = stack.origin(), stack.snapshot("s", chunk=1)
    for chunk in range(0, 130, 2):
        origin.pwrite(b"x", chunk * 512)
    origin.pwrite(b"y" * 65 * 512, 512 * 200)
    assert contents(snapshot) == stack.contents
    assert status(snapshot) == "136/1024 6"  # the header, 5 areas, 130 chunks
    stack.close("s")
    again = stack.snapshot("s", chunk=1)
    assert (contents(again), status(again)) == (stack.contents, "136/1024 6")
    stack.close()


@pytest.mark.parametrize(
    ("kind", "writer", "expected"),
    [
        ("P", "origin", "Invalid"),
        ("PO", "origin", "Invalid"),
        ("N", "origin", "Invalid"),
        ("P", "s", "Invalid"),
        ("N", "s", "Invalid"),
        ("PO", "s", "Overflow"),
    ],
)
def test_a_full_store_never_harms_the_origin(stack: Stack, kind: str, writer: str, expected: str) -> None:
    origin, snapshot = stack.origin(), stack.snapshot("s", kind, chunks=6)
    data = os.urandom(SIZE)
    if writer == "origin":
        origin.pwrite(data, 0)
        assert contents(origin) == data
    else:
        assert number_of(lambda: snapshot.pwrite(data, 0)) == errno.EIO
        assert contents(origin) == stack.contents
    assert status(snapshot) == expected
    assert number_of(lambda: snapshot.pwrite(b"x" * CHUNK, 0)) == errno.EIO
    if expected == "Overflow":
        assert len(contents(snapshot)) == SIZE
        origin.pwrite(data, 0)
        assert (status(snapshot), contents(origin)) == ("Invalid", data)
    assert number_of(lambda: contents(snapshot)) == errno.EIO
    stack.close("s")
    if kind != "N":
        assert status(stack.snapshot("s", kind)) == "Invalid"


def test_a_store_that_fails_never_harms_the_origin(stack: Stack) -> None:
    cow = stack.store("cow")
    stack.devices["cow"] = blkloom.open(f"0 32 linear {cow} 0\n32 992 error", name="cow", devices=stack.devices)
    origin = stack.origin()
    snapshot = stack.open("s", "snapshot blkloom:real blkloom:cow P 8")
    for chunk in range(4):
        origin.pwrite(b"x", chunk * CHUNK)
    assert status(snapshot) == "Invalid"
    assert contents(origin)[0] == contents(origin)[3 * CHUNK] == ord("x")


def test_a_table_that_is_loaded_again_misses_no_write_of_the_origin(stack: Stack) -> None:
    origin, snapshot = stack.origin(), stack.snapshot("s")
    ended = threading.Event()

    def write() -> None:
        chance = random.Random(1)
        while not ended.is_set():
            origin.pwrite(chance.randbytes(512), chance.randrange(SECTORS) * 512)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            snapshot.load(snapshot.table)
            snapshot.resume()
            assert contents(snapshot) == stack.contents
    finally:
        ended.set()
        writer.join()
    assert contents(snapshot) == stack.contents


@pytest.mark.parametrize("kind", ["P", "PO", "N"])
@pytest.mark.parametrize("origin", ["blkloom:real", "{folder}/alone"], ids=["a device", "a file"])
def test_a_table_that_is_loaded_again_keeps_the_changes_of_the_snapshot(stack: Stack, kind: str, origin: str) -> None:
    (stack.folder / "alone").write_bytes(stack.contents)
    place = origin.format(folder=stack.folder)
    snapshot = stack.open("s", f"snapshot {place} {stack.store('s.cow')} {kind} 8")
    expected = bytearray(stack.contents)
    for number in range(3):
        data = bytes([number + 1]) * CHUNK
        snapshot.pwrite(data, (9 * number + 3) * CHUNK)
        expected[(9 * number + 3) * CHUNK : (9 * number + 4) * CHUNK] = data
        before = status(snapshot)
        snapshot.load(snapshot.table)
        snapshot.resume()
        assert (status(snapshot), contents(snapshot)) == (before, bytes(expected))


def test_a_reload_of_an_invalid_transient_snapshot_does_not_make_it_valid(stack: Stack) -> None:
    origin, snapshot = stack.origin(), stack.snapshot("s", "N", chunks=2)
    origin.pwrite(b"x" * 3 * CHUNK, 0)
    assert status(snapshot) == "Invalid"
    snapshot.load(snapshot.table)
    snapshot.resume()
    assert status(snapshot) == "Invalid"


@pytest.mark.parametrize(("live", "loaded"), [("N 8", "N 16"), ("N 8", "PO 8"), ("P 8", "N 8")])
def test_a_reload_that_would_lose_exceptions_in_memory_is_refused(stack: Stack, live: str, loaded: str) -> None:
    store = stack.store("s.cow")
    snapshot = stack.open("s", f"snapshot blkloom:real {store} {live}")
    snapshot.pwrite(b"x" * CHUNK, 3 * CHUNK)
    expected = contents(snapshot)
    table = parse_table(f"0 {SECTORS} snapshot blkloom:real {store} {loaded}", targets=builtin_targets())
    with pytest.raises(TableError, match=rf"would be lost: '{store}' \(write {live}, as in the live table"):
        snapshot.load(table)
    assert contents(snapshot) == expected


def test_reads_in_flight_see_nothing_of_the_origins_later_writes(stack: Stack) -> None:
    origin, snapshot = stack.origin(), stack.snapshot("s")
    wrong: list[int] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            if contents(snapshot) != stack.contents:
                wrong.append(1)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for chunk in range(CHUNKS):
        origin.pwrite(b"!" * CHUNK, chunk * CHUNK)
    ended.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert contents(snapshot) == stack.contents


def test_a_merge_makes_the_origin_what_the_snapshot_was(stack: Stack) -> None:
    origin, snapshot = stack.origin(), stack.snapshot("s")
    chance = random.Random(3)
    for _ in range(60):
        chance.choice([origin, snapshot]).pwrite(chance.randbytes(700), chance.randrange(SIZE - 700))
    expected = bytearray(contents(snapshot))
    stack.close("s", "origin")
    other_expected = contents(stack.devices["real"])
    other = stack.snapshot("other")
    merge = stack.open("merge", f"snapshot-merge blkloom:real {stack.folder}/s.cow P 8")
    merge.pwrite(b"while it merges", 9 * CHUNK)
    expected[9 * CHUNK : 9 * CHUNK + 15] = b"while it merges"
    assert contents(merge) == expected
    wait_for("16/1024 16", merge)
    assert contents(merge) == expected
    assert contents(stack.devices["real"]) == expected
    assert contents(other) == other_expected


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("snapshot a b X 8", "not P or N"),
        ("snapshot a b P 12", "not a power of 2"),
        ("snapshot a b P 4194304", "too high"),
        ("snapshot a b P 8 1 discard_passdown_origin", "depends on"),
        ("snapshot a b P 8 1 other", "unknown option"),
        ("snapshot blkloom:real blkloom:real P 8", "cannot be the same"),
        ("snapshot blkloom:real {cow} N 0", "not set"),
        ("snapshot blkloom:real {junk} P 8", "corrupt"),
        ("snapshot-merge blkloom:real {cow} N 8", "does not support"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(stack: Stack, line: str, what: str) -> None:
    (stack.folder / "junk").write_bytes(b"j" * SIZE)
    text = line.format(cow=stack.store("cow"), junk=stack.folder / "junk")
    with pytest.raises(TableError, match=what):
        stack.open("s", text)


def test_a_merge_needs_a_store(stack: Stack) -> None:
    with pytest.raises(BackingError, match="no header"):
        stack.open("merge", f"snapshot-merge blkloom:real {stack.store('cow')} P 8")


def test_a_table_prints_itself() -> None:
    line = "0 128 snapshot blkloom:a b PO 8 2 discard_zeroes_cow discard_passdown_origin"
    assert format_table(parse_table(line, targets=builtin_targets())).strip() == line


def test_discards_of_unchanged_chunks_do_nothing_or_go_to_the_origin(stack: Stack) -> None:
    plain = stack.snapshot("plain")
    plain.discard(0, SIZE)
    assert contents(plain) == stack.contents
    stack.close("plain")
    features = "2 discard_zeroes_cow discard_passdown_origin"
    passing = stack.open("passing", f"snapshot blkloom:real {stack.store('p')} P 8 {features}")
    passing.discard(8 * CHUNK, CHUNK)
    assert contents(stack.devices["real"])[8 * CHUNK : 9 * CHUNK] == bytes(CHUNK)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("write", "write", "write", "zero", "discard", "flush", "reopen", "new")),
        st.integers(0, 3),
        st.integers(0, SECTORS - 1),
        st.integers(1, 40),
        st.integers(1, 255),
    ),
    max_size=30,
)


@settings(max_examples=60)
@given(steps=STEPS, chunks=st.lists(st.sampled_from((1, 2, 8, 32)), min_size=3, max_size=3))
def test_snapshots_and_origin_are_what_a_slow_model_says(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int, int, int]], chunks: list[int]
) -> None:
    stack = Stack(tmp_path_factory.mktemp("model"))
    stack.origin()
    model = {"origin": bytearray(stack.contents)}
    for kind, who, sector, count, byte in steps:
        names = list(model)
        name = names[who % len(names)]
        device, expected = stack.devices[name], model[name]
        at, length = sector * 512, min(count, SECTORS - sector) * 512
        match kind:
            case "write":
                device.pwrite(bytes([byte]) * length, at)
                expected[at : at + length] = bytes([byte]) * length
            case "zero":
                device.write_zeroes(at, length)
                expected[at : at + length] = bytes(length)
            case "discard":
                device.discard(at, length)
                found = device.pread(length, at)
                assert all(new in (old, 0) for new, old in zip(found, expected[at : at + length], strict=True))
                expected[at : at + length] = found
            case "flush":
                device.flush()
            case "new" if len(model) < 4:
                name = f"s{len(model)}"
                stack.snapshot(name, "PN"[who % 2], chunks[len(model) - 1], chunks=6 * CHUNKS)
                model[name] = bytearray(model["origin"])
            case "reopen" if name != "origin" and " P " in str(device.table):
                table = device.table
                stack.close(name)
                stack.devices[name] = blkloom.open(table, name=name, devices=stack.devices)
            case _:
                pass
    for name, expected in model.items():
        assert contents(stack.devices[name]) == expected, name
    stack.close()
