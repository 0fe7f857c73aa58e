"""The target `mirror`: all legs have the same data, a leg that fails is left out and said, and is resynced later."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blkloom
from blkloom.errors import TableError
from blkloom.targets.mirror_set import MirrorSet
from blkloom.units import SECTOR, Bytes, Sectors

REGION = 16
"""Sectors."""
REGIONS = 64
SECTORS = REGION * REGIONS - 6
"""The last region is not a whole one."""
SIZE = SECTORS * SECTOR


@dataclass
class Mirrored:
    """A mirror of devices whose legs can be made to fail. events: what it has said."""

    mirror: blkloom.Device
    legs: list[blkloom.Device]
    files: list[Path]
    events: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def fail(self, leg: int, features: str = "") -> None:
        """Loads an error table for a leg; features: of the target error on the file."""
        words = f"error {self.files[leg]} 0 {features}" if features else "error"
        self._load(leg, words)

    def repair(self, leg: int) -> None:
        self._load(leg, f"linear {self.files[leg]} 0")

    def _load(self, leg: int, words: str) -> None:
        self.legs[leg].load(blkloom.parse_table(f"0 {SECTORS} {words}", targets=blkloom.builtin_targets()))
        self.legs[leg].resume(flush=False)

    @property
    def status(self) -> str:
        """Regions in sync, and letters."""
        words = self.mirror.status()[0][3].split()
        return f"{words[-5]} {words[-3]}"

    def said(self, what: str) -> None:
        """Waits for the next event with these words."""
        with self.changed:
            assert self.changed.wait_for(lambda: any(what in event for event in self.events), 30), self.events
            self.events.clear()

    def again(self) -> None:
        """Suspends and resumes: what has failed is tried again."""
        self.mirror.suspend()
        self.mirror.resume()

    def contents(self) -> list[bytes]:
        return [file.read_bytes() for file in self.files]


@contextmanager
def mirrors(folder: Path) -> Iterator[Callable[..., Mirrored]]:
    """`make(legs, options)`: a mirror of so many legs with different contents, in files of the folder. bad: a leg
    that fails from the start, and the features of its error.
    """
    made: list[blkloom.Device] = []

    def opened(count: int = 2, options: str = f"1 {REGION}", bad: tuple[int, str] | None = None) -> Mirrored:
        files = [folder / f"leg{number}" for number in range(count)]
        for number, file in enumerate(files):
            file.write_bytes(random.Random(number).randbytes(SIZE))
        legs = [blkloom.open(f"0 {SECTORS} linear {file} 0") for file in files]
        devices = {f"leg{number}": leg for number, leg in enumerate(legs)}
        words = " ".join(f"blkloom:{name} 0" for name in devices)
        table = f"0 {SECTORS} mirror core {options} {count} {words} 1 handle_errors"
        found = Mirrored(None, legs, files)  # type: ignore[arg-type]

        if bad is not None:
            found.fail(*bad)

        def event(what: str) -> None:
            with found.changed:
                found.events.append(what)
                found.changed.notify_all()

        found.mirror = blkloom.Device(
            blkloom.parse_table(table, targets=blkloom.builtin_targets()),
            engine=legs[0].engine,
            devices=devices,
            on_event=event,
        )
        made.extend([found.mirror, *legs])
        return found

    try:
        yield opened
    finally:
        for device in made:
            device.close(flush=False)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Mirrored]]:
    """See `mirrors`."""
    with mirrors(tmp_path) as made:
        yield made


def fails(call: Callable[[], object]) -> int:
    """The errno; 0 if it succeeds."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def test_a_resync_makes_the_legs_the_same_while_writes_go_on(make: Callable[..., Mirrored]) -> None:
    found = make(3)
    expected = bytearray(random.Random(0).randbytes(SIZE))
    chance = random.Random(18)
    while not any("in sync" in event for event in found.events):
        at, data = chance.randrange(SIZE - 4096), chance.randbytes(chance.randrange(1, 4096))
        found.mirror.pwrite(data, at)
        expected[at : at + len(data)] = data
        assert found.mirror.pread(len(data), at) == data
    assert found.status == f"{REGIONS}/{REGIONS} AAA"
    found.mirror.flush()
    assert found.contents() == [expected] * 3
    assert found.mirror.pread(SIZE, 0) == expected


def test_with_nosync_nothing_is_copied_and_reads_go_to_all_legs(make: Callable[..., Mirrored]) -> None:
    found = make(2, f"2 {REGION} nosync")
    assert found.status == f"{REGIONS}/{REGIONS} AA"
    before = found.contents()
    while True:  # the native map comes after the resume
        data = found.mirror.pread(SIZE, 0)
        regions = [slice(at, at + REGION * SECTOR) for at in range(0, SIZE, REGION * SECTOR)]
        legs = {next(leg for leg in (0, 1) if data[part] == before[leg][part]) for part in regions}
        if legs == {0, 1}:
            break
    assert found.contents() == before


@pytest.mark.parametrize("leg", [0, 1])
def test_a_leg_that_fails_a_write_is_left_out_and_copied_after_the_resume(
    make: Callable[..., Mirrored], leg: int
) -> None:
    found = make()
    found.said("in sync")
    found.fail(leg)
    found.mirror.pwrite(b"w" * SECTOR, 0)
    found.said(f"leg {leg} of the mirror (blkloom:leg{leg}) has failed: a write: Input/output error")
    letters = "DA" if leg == 0 else "AD"
    assert found.status == f"{REGIONS - 1}/{REGIONS} {letters}"
    found.repair(leg)
    found.mirror.pwrite(b"x" * SECTOR, 5 * REGION * SECTOR)
    assert found.status == f"{REGIONS - 2}/{REGIONS} {letters}", "it stays left out"
    assert found.mirror.pread(SECTOR, 0) == b"w" * SECTOR
    found.mirror.discard(7 * REGION * SECTOR, SECTOR)
    assert found.status == f"{REGIONS - 3}/{REGIONS} {letters}"
    found.again()
    found.said("in sync")
    assert found.status == f"{REGIONS}/{REGIONS} AA"
    first, second = found.contents()
    assert first == second
    assert first[:SECTOR] == b"w" * SECTOR


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Offsets of the writes that the engine has left to Python."""
    offsets: list[int] = []
    write = MirrorSet.write

    async def noted(self: MirrorSet, offset: Bytes, data: bytes, *, fua: bool) -> None:
        offsets.append(offset)
        await write(self, offset, data, fua=fua)

    monkeypatch.setattr(MirrorSet, "write", noted)
    return offsets


def test_the_engine_writes_where_the_legs_are_in_sync(make: Callable[..., Mirrored], written: list[int]) -> None:
    found = make()
    found.said("in sync")
    written.clear()
    found.mirror.pwrite(b"a" * SIZE, 0)
    found.mirror.pwrite(b"b" * SECTOR, SECTOR, fua=True)
    found.mirror.flush()
    assert written == []
    assert found.contents() == [b"a" * SECTOR + b"b" * SECTOR + b"a" * (SIZE - 2 * SECTOR)] * 2
    found.fail(1, "2 operations=write range=0+8")
    found.mirror.pwrite(b"c" * SECTOR, 0)
    found.mirror.pwrite(b"d" * SECTOR, 40 * SECTOR)
    assert written == [0, 40 * SECTOR], "a leg is left out"
    found.repair(1)
    found.events.clear()
    found.again()
    found.said("in sync")
    written.clear()
    found.mirror.pwrite(b"e" * SECTOR, 0)
    assert written == []
    assert len(set(found.contents())) == 1


def test_writes_of_the_same_bytes_at_the_same_time_are_the_same_on_all_legs(make: Callable[..., Mirrored]) -> None:
    """While the resync goes on, a leg fails and is repaired, and after that."""
    found = make(3)
    ended = threading.Event()

    def write(number: int) -> None:
        chance = random.Random(number)
        while not ended.is_set():
            at = chance.randrange(0, 64) * SECTOR
            found.mirror.pwrite(bytes([chance.randrange(256)]) * chance.choice([SECTOR, 8192, 65536]), at)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for leg in (None, 0, 1, 2):
            if leg is not None:
                found.fail(leg, "1 operations=write")
                found.said(f"leg {leg} of the mirror")
                found.repair(leg)
                found.again()
            found.said("the mirror is in sync")
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert found.status == f"{REGIONS}/{REGIONS} AAA"
    found.mirror.flush()
    assert len(set(found.contents())) == 1


def test_a_read_that_fails_natively_is_read_from_another_leg(make: Callable[..., Mirrored]) -> None:
    found = make()
    found.said("in sync")
    content = found.contents()[0]
    found.fail(0, "1 operations=read")
    assert found.mirror.pread(SIZE, 0) == content
    found.said("leg 0 of the mirror (blkloom:leg0) has failed: a read")
    assert found.status == f"{REGIONS}/{REGIONS} RA"
    found.mirror.pwrite(b"w" * SECTOR, 0)
    assert [content[:SECTOR] for content in found.contents()] == [b"w" * SECTOR] * 2, "it is still written"
    found.fail(1, "1 operations=read")
    assert fails(lambda: found.mirror.pread(SECTOR, 0)) == errno.EIO
    assert found.status == f"{REGIONS}/{REGIONS} RR"
    found.repair(1)
    found.again()
    assert found.mirror.pread(SECTOR, 0) == b"w" * SECTOR


def test_a_write_that_fails_on_all_legs_fails(make: Callable[..., Mirrored]) -> None:
    found = make()
    found.said("in sync")
    for leg in (0, 1):
        found.fail(leg, "1 range=0+8")
    assert fails(lambda: found.mirror.pwrite(b"w" * SECTOR, 0)) == errno.EIO
    assert found.status == f"{REGIONS - 1}/{REGIONS} DD"
    found.mirror.pwrite(b"w" * SECTOR, 16 * SECTOR)
    for leg in (0, 1):
        found.repair(leg)
    found.again()
    found.said("in sync")
    assert found.contents()[0] == found.contents()[1]


def test_a_flush_reaches_all_legs_and_fails_on_none_that_is_left_out(make: Callable[..., Mirrored]) -> None:
    found = make()
    found.said("in sync")
    found.fail(1, "1 operations=flush")
    found.mirror.flush()
    found.said("leg 1 of the mirror (blkloom:leg1) has failed: a write")
    assert found.status == f"0/{REGIONS} AD", "nothing tells what the leg has lost"
    found.mirror.flush()
    found.fail(0, "1 operations=flush")
    assert fails(found.mirror.flush) == errno.EIO
    found.repair(0)
    found.mirror.flush()


def test_the_first_leg_fails_before_the_others_have_its_data(make: Callable[..., Mirrored]) -> None:
    found = make(bad=(0, ""))
    found.said("leg 0 of the mirror (blkloom:leg0) has failed: a copy of the resync")
    assert found.status == f"0/{REGIONS} SA"
    assert fails(lambda: found.mirror.pread(SIZE, 0)) == errno.EIO
    assert fails(lambda: found.mirror.pwrite(b"w" * SECTOR, 0)) == errno.EIO
    found.repair(0)
    found.again()
    found.said("in sync")
    expected = random.Random(0).randbytes(SIZE)
    assert found.mirror.pread(SIZE - SECTOR, SECTOR) == expected[SECTOR:]
    assert found.contents()[0] == found.contents()[1]


def test_a_leg_of_three_dies_in_a_resync_and_the_others_go_on(make: Callable[..., Mirrored]) -> None:
    found = make(3, bad=(1, f"2 operations=write range={SECTORS // 2}+8"))
    found.said("leg 1 of the mirror (blkloom:leg1) has failed: a copy of the resync")
    assert found.status.endswith("ASA")
    found.repair(1)
    found.again()
    found.said("in sync")
    assert len(set(found.contents())) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("disk 2 @ 16 2 @ 0 @ 0", "unknown log type"),
        ("core 0 2 @ 0 @ 0", "wrong number of arguments"),
        ("core 3 16 sync x 2 @ 0 @ 0", "wrong number of arguments"),
        ("core 1 15 2 @ 0 @ 0", "invalid region size"),
        ("core 1 1 2 @ 0 @ 0", "invalid region size"),
        ("core 1 4096 2 @ 0 @ 0", "invalid region size"),
        ("core 2 16 maybe 2 @ 0 @ 0", "unrecognised sync argument"),
        ("core 1 16 1 @ 0", "Invalid number of mirrors"),
        ("core 1 16 10 @ 0", "Invalid number of mirrors"),
        ("core 1 16 2 @ 0 @", "Too few mirror arguments"),
        ("core 1 16 2 @ 0 @ 0 1", "Not enough arguments to support feature count"),
        ("core 1 16 2 @ 0 @ 0 0 x", "Too many mirror arguments"),
        ("core 1 16 2 @ 0 @ 0 1 fast", "Unrecognised feature requested"),
        ("core 1 16 2 @ 0 @ 0 1 keep_log", "requires the handle_errors feature"),
        ("core 1 16 2 @ 0 @ 9999", "too small for target"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, words: str, said: str) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with pytest.raises(TableError, match=said):
        blkloom.open(f"0 {SECTORS} mirror {words.replace('@', str(tmp_path / 'disk'))}")


STEPS = st.one_of(
    st.tuples(st.just("write"), st.integers(0, SECTORS - 1), st.integers(1, 40), st.integers(1, 255)),
    st.tuples(st.just("zero"), st.integers(0, SECTORS - 1), st.integers(1, 40), st.just(0)),
    st.tuples(st.just("fail"), st.integers(0, 1), st.sampled_from(["", "1 operations=read", "1 operations=write"])),
    st.tuples(st.just("repair"), st.integers(0, 1)),
    st.tuples(st.just("again")),
    st.tuples(st.just("flush")),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, min_size=5, max_size=30))
def test_what_was_answered_is_read_whatever_leg_fails(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[object, ...]]
) -> None:
    """At most one leg is bad at a time, and is good again only after a resync; so no request fails."""
    with mirrors(tmp_path_factory.mktemp("mirror")) as make:
        follow(make(2, f"2 {REGION} nosync"), steps)


def follow(found: Mirrored, steps: list[tuple[object, ...]]) -> None:
    """Does the steps, and compares with a copy of the data."""
    for file in found.files:
        file.write_bytes(bytes(SIZE))
    expected = bytearray(SIZE)
    bad: set[int] = set()
    for what, *arguments in steps:
        match what, arguments:
            case "write" | "zero", [int(sector), int(count), int(byte)]:
                length = min(count, SECTORS - sector) * SECTOR
                if byte:
                    found.mirror.pwrite(bytes([byte]) * length, sector * SECTOR)
                else:
                    found.mirror.write_zeroes(sector * SECTOR, length)
                expected[sector * SECTOR : sector * SECTOR + length] = bytes([byte]) * length
            case "fail", [int(leg), str(features)] if bad <= {leg}:
                found.fail(leg, features)
                bad.add(leg)
            case "repair", [int(leg)] if leg in bad:
                found.repair(leg)
                found.events.clear()
                found.again()
                if found.status != f"{REGIONS}/{REGIONS} AA":  # letters change last
                    found.said("in sync")
                bad.clear()
            case "again", _:
                found.again()
            case "flush", _:
                found.mirror.flush()
        assert found.mirror.pread(SIZE, 0) == expected
    for leg in bad:
        found.repair(leg)
    found.events.clear()
    found.again()
    if found.status != f"{REGIONS}/{REGIONS} AA":  # letters change last
        found.said("in sync")
    found.mirror.flush()
    assert found.contents() == [expected, expected]


def test_the_table_is_printed_as_it_was() -> None:
    for arguments in (
        "core 1 16 2 /a 0 /b 3",
        "core 2 1024 nosync 3 /a 0 blkloom:b 3 8:1 0 1 handle_errors",
        "core 2 2 sync 2 /a 0 /b 3 2 handle_errors keep_log",
    ):
        table = f"0 2048 mirror {arguments}"
        assert blkloom.format_table(blkloom.parse_table(table, targets=blkloom.builtin_targets())) == table


def test_a_read_only_mirror_reads_the_first_leg_and_writes_nothing(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * SIZE)
    table = f"0 {SECTORS} mirror core 1 {REGION} 2 {tmp_path}/a 0 {tmp_path}/b 0"
    with blkloom.open(table, read_only=True) as device:
        assert device.pread(SIZE, 0) == b"a" * SIZE
        assert fails(lambda: device.pwrite(b"w", 0)) == errno.EROFS
        assert device.status()[0][3] == f"2 {tmp_path}/a {tmp_path}/b 0/{REGIONS} 1 AA 1 core"
    assert (tmp_path / "b").read_bytes() == b"b" * SIZE
    assert os.path.getsize(tmp_path / "a") == SIZE
    assert Sectors(SECTORS) * SECTOR == SIZE
