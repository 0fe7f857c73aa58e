"""The target `torn`: what may be on a disk after a power cut. A checker keeps all versions of each block by itself."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blkloom
from async_target import PATIENCE, Calls
from blkloom.errors import TableError, UsageError
from blkloom.units import Sectors

BLOCK = 512
BLOCKS = 16
SIZE = BLOCK * BLOCKS


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    return tmp_path / "disk"


@pytest.fixture
def device(disk: Path) -> Iterator[Callable[[str], blkloom.Device]]:
    devices = []

    def opened(options: str = "") -> blkloom.Device:
        devices.append(blkloom.open(f"0 {BLOCKS} torn {disk} 0 {options}"))
        return devices[-1]

    yield opened
    for one in devices:
        one.close(flush=False)


def say(device: blkloom.Device, text: str) -> str | None:
    return device.message(Sectors(0), text.split())


def fails(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError as error:
        return error.errno == errno.EIO
    return False


class Checker:
    """What each block may contain after a cut: its contents at the last flush, or any later write to it."""

    def __init__(self, contents: bytes) -> None:
        self.allowed = [[contents[at : at + BLOCK]] for at in range(0, len(contents), BLOCK)]

    def write(self, first: int, data: bytes, *, durable: bool) -> None:
        for index in range(len(data) // BLOCK):
            block = data[index * BLOCK : (index + 1) * BLOCK]
            self.allowed[first + index] = [block] if durable else [*self.allowed[first + index], block]

    def flush(self) -> None:
        self.allowed = [blocks[-1:] for blocks in self.allowed]

    @property
    def now(self) -> bytes:
        return b"".join(blocks[-1] for blocks in self.allowed)

    def allows(self, contents: bytes) -> bool:
        found = [contents[at : at + BLOCK] for at in range(0, len(contents), BLOCK)]
        return all(block in allowed for block, allowed in zip(found, self.allowed, strict=True))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("write", "write", "write", "fua", "flush", "zero", "discard", "cut")),
        st.integers(0, BLOCKS - 1),
        st.integers(1, 4),
        st.integers(1, 255),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(STEPS)
def test_every_block_has_a_state_that_is_allowed(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int, int]]
) -> None:
    disk = tmp_path_factory.mktemp("torn") / "disk"
    disk.write_bytes(bytes(SIZE))
    checker = Checker(bytes(SIZE))
    with blkloom.open(f"0 {BLOCKS} torn {disk} 0") as device:
        for kind, first, count, byte in steps:
            count = min(count, BLOCKS - first)
            data = b"".join(bytes([byte, index]) * (BLOCK // 2) for index in range(count))
            match kind:
                case "write" | "fua":
                    device.pwrite(data, first * BLOCK, fua=kind == "fua")
                    checker.write(first, data, durable=kind == "fua")
                case "flush":
                    device.flush()
                    checker.flush()
                case "zero" | "discard":
                    call = device.write_zeroes if kind == "zero" else device.discard
                    call(first * BLOCK, count * BLOCK)
                    checker.write(first, bytes(count * BLOCK), durable=False)
                case _:
                    say(device, "cut")
                    say(device, "restore")
                    found = device.pread(SIZE, 0)
                    assert checker.allows(found)
                    assert found == disk.read_bytes()
                    checker = Checker(found)
            assert device.pread(SIZE, 0) == checker.now


def test_all_allowed_states_come_up(device: Callable[[str], blkloom.Device], tmp_path: Path) -> None:
    torn = device()
    for byte in (1, 2):
        for block in (3, 4):
            torn.pwrite(bytes([byte]) * BLOCK, block * BLOCK)
    say(torn, "cut")
    say(torn, f"states 20 {tmp_path}/state")
    states = {(tmp_path / f"state.{number}").read_bytes() for number in range(1, 10)}
    assert not (tmp_path / "state.10").exists(), "there are nine"
    assert {(state[3 * BLOCK], state[4 * BLOCK]) for state in states} == {(a, b) for a in range(3) for b in range(3)}
    say(torn, "restore 7")
    assert torn.pread(SIZE, 0) in states


def test_the_same_seed_chooses_the_same_state(device: Callable[[str], blkloom.Device], disk: Path) -> None:
    def state(options: str) -> bytes:
        disk.write_bytes(bytes(SIZE))
        torn = device(options)
        chance = random.Random(1)
        for _ in range(40):
            torn.pwrite(chance.randbytes(BLOCK), chance.randrange(BLOCKS) * BLOCK)
        say(torn, "cut")
        say(torn, "restore")
        found = torn.pread(SIZE, 0)
        torn.close()
        return found

    assert state("1 seed=5") == state("1 seed=5")
    assert len({state(f"1 seed={seed}") for seed in range(4)}) > 1


def test_everything_fails_from_the_cut_to_the_restore(device: Callable[[str], blkloom.Device]) -> None:
    torn = device()
    torn.pwrite(b"a" * BLOCK, 0)
    assert torn.status()[0][3] == f"running 1 {BLOCK} 0"
    for message in ("restore", "states 1 /tmp/x"):
        with pytest.raises(UsageError, match="the device has power"):
            say(torn, message)
    say(torn, "cut")
    calls = (
        lambda: torn.pread(BLOCK, 0),
        lambda: torn.pwrite(b"b" * BLOCK, 0),
        lambda: torn.discard(0, BLOCK),
        torn.flush,
    )
    assert all(map(fails, calls))
    assert torn.status()[0][3] == f"cut 1 {BLOCK} 0"
    say(torn, "restore")
    assert torn.status()[0][3] == "running 0 0 1"
    torn.pwrite(b"b" * BLOCK, 0)
    torn.flush()
    assert torn.pread(BLOCK, 0) == b"b" * BLOCK


@pytest.mark.parametrize("writes", [0, 1, 3])
def test_the_power_fails_after_a_number_of_writes(device: Callable[[str], blkloom.Device], writes: int) -> None:
    torn = device()
    say(torn, f"cut {writes}")
    for number in range(writes):
        torn.pwrite(b"a" * BLOCK, number * BLOCK, fua=number == 1)
        torn.flush()
    assert torn.pread(BLOCK, 5 * BLOCK) == bytes(BLOCK)
    assert fails(lambda: torn.pwrite(b"b" * BLOCK, 0))
    assert fails(lambda: torn.pread(BLOCK, 0))
    assert fails(torn.flush)
    assert torn.status()[0][3] == "cut 0 0 0"
    say(torn, "restore")
    assert torn.pread(SIZE, 0) == (b"a" * writes * BLOCK).ljust(SIZE, b"\0")
    torn.pwrite(b"b" * BLOCK, 0)  # the power stays on now
    with pytest.raises(UsageError, match="'x' is no number of writes"):
        say(torn, "cut x")


def test_a_write_that_waits_for_memory_fails_if_another_ends_the_power(
    device: Callable[[str], blkloom.Device],
) -> None:
    torn = device("1 memory=1024")
    torn.pwrite(b"a" * 1024, 0)
    say(torn, "cut 0")
    with Calls() as call:
        waiting = call(torn.pwrite, b"b" * BLOCK, 0)
        assert not waiting.done()
        assert fails(lambda: torn.pwrite(b"c" * BLOCK, 0, fua=True))
        assert isinstance(waiting.exception(PATIENCE), OSError)


@pytest.mark.parametrize(
    "words",
    [
        "linear @ 0",
        "log-writes @ /log",
        "log-writes /log @",
        f"mirror core 2 2 nosync 2 @ 0 @ {BLOCKS // 2}",
        "flakey @ 0 1 0 5 corrupt_bio_byte 1 w 0 0",
        "full @ 0 4k",
        "torn @ 0",
    ],
)
def test_a_device_on_a_cut_one_is_suspended_and_its_flushes_fail(
    device: Callable[[str], blkloom.Device], tmp_path: Path, words: str
) -> None:
    with (tmp_path / "log").open("wb") as file:
        file.truncate(64 << 10)
    torn = device("")
    words = words.replace("@", "blkloom:torn").replace("/log", str(tmp_path / "log"))
    table = blkloom.parse_table(f"0 {BLOCKS // 2} {words}", targets=blkloom.builtin_targets())
    with blkloom.Device(table, engine=torn.engine, devices={"torn": torn}) as above:
        above.pwrite(b"a" * BLOCK, 0)
        above.flush()
        say(torn, "cut")
        above.suspend()
        above.resume()
        recorded = words.endswith("blkloom:torn")
        assert fails(above.flush) != recorded, "the device of a log that fails goes on"
        assert not recorded or above.status()[0][3].endswith("logging_disabled")
        above.suspend()


def test_a_block_may_be_torn_inside(device: Callable[[str], blkloom.Device]) -> None:
    torn = device("1 tear_inside")
    for block in range(BLOCKS):
        torn.pwrite(b"\1" * BLOCK, block * BLOCK)
    say(torn, "cut")
    say(torn, "restore 3")
    found = torn.pread(SIZE, 0)
    blocks = [found[at : at + BLOCK] for at in range(0, SIZE, BLOCK)]
    assert all(block == block[:count] + bytes(BLOCK - count) for block in blocks if (count := block.count(1)) >= 0)
    assert any(0 < block.count(1) < BLOCK for block in blocks)


def test_writes_beyond_the_memory_wait_for_a_flush_or_fail(device: Callable[[str], blkloom.Device]) -> None:
    full = device("2 memory=1024 on_full=fail")
    full.pwrite(b"a" * 1024, 0)
    assert fails(lambda: full.pwrite(b"a" * BLOCK, 0))
    full.flush()
    full.pwrite(b"a" * BLOCK, 0)
    full.close()
    waiting = device("1 memory=1024")
    waiting.pwrite(b"a" * 1024, 0)
    with Calls() as call:
        write = call(waiting.pwrite, b"b" * BLOCK, 0)
        assert waiting.status()[0][3] == "running 2 1024 0"
        waiting.flush()
        assert write.result(PATIENCE) == BLOCK
        other = call(waiting.pwrite, b"c" * 1024, 0)
        say(waiting, "cut")
        assert isinstance(other.exception(PATIENCE), OSError)
        say(waiting, "restore")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("1 block=1000", "must be 512, 1024, 2048 or 4096"),
        ("1 on_full=flush", "must be wait or fail"),
        ("1 seed=x", "must be a whole number"),
    ],
)
def test_wrong_options_are_refused(device: Callable[[str], blkloom.Device], options: str, words: str) -> None:
    with pytest.raises(TableError, match=words):
        device(options)


def test_parts_of_a_block_that_are_written_at_once_are_all_there(device: Callable[[str], blkloom.Device]) -> None:
    torn = device("1 block=4096")
    with Calls() as call:
        for round_ in range(20):
            calls = [
                call(torn.pwrite, bytes([round_ + part + 1]) * 128, part * 128, fua=part % 3 == 0) for part in range(32)
            ]
            calls += [call(torn.flush) for _ in range(2)]
            for one in calls:
                one.result(PATIENCE)
            assert torn.pread(4096, 0) == b"".join(bytes([round_ + part + 1]) * 128 for part in range(32))
