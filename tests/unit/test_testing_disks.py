"""The disks of `blkloom.testing` that lose power, fail, are slow or full, as devices of this process."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from async_target import PATIENCE, Calls
from blkloom.errors import TableError, UsageError
from blkloom.testing import flaky_disk, full_disk, power_cut, served, slow_disk

BLOCK = 4096


def failed(call: Callable[[], object]) -> int:
    """The errno of the call; 0 if it succeeds."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


# power_cut


def test_a_power_cut_loses_only_what_no_flush_covers() -> None:
    with power_cut("1M", seed=3) as disk:
        disk.device.pwrite(b"a" * BLOCK, 0)
        disk.device.flush()
        for number in range(1, 4):
            disk.device.pwrite(b"b" * 512, number * BLOCK)
        found = set()
        for state in disk.states(100):
            assert state.device.pread(BLOCK, 0) == b"a" * BLOCK
            found.add(state.device.pread(4 * BLOCK, 0)[BLOCK::BLOCK])
            state.device.pwrite(b"c" * BLOCK, 0)
        assert len(found) == 8
        assert failed(lambda: disk.device.pread(1, 0)) == errno.EIO
        disk.restore()
        assert disk.device.pread(4 * BLOCK, 0)[BLOCK::BLOCK] in found
        assert disk.device.pread(BLOCK, 0) == b"a" * BLOCK


def test_a_power_cut_may_come_at_a_later_write() -> None:
    with power_cut("1M") as disk:
        disk.cut(after=1)
        disk.device.pwrite(b"a", 0, fua=True)
        assert failed(lambda: disk.device.pwrite(b"b", 0, fua=True)) == errno.EIO
        disk.restore()
        assert disk.device.pread(1, 0) == b"a"


def test_a_power_cut_repeats_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def contents(seed: int | None = None) -> bytes:
        with power_cut("64K", seed=seed) as disk:
            for number in range(16):
                disk.device.pwrite(bytes([number + 1]) * BLOCK, number * BLOCK)
            disk.restore()
            return disk.device.pread(disk.size, 0)

    assert len({contents(seed) for seed in range(5)}) > 1
    assert contents(7) == contents(7)
    monkeypatch.setenv("BLKLOOM_SEED", "7")
    assert contents() == contents(7)
    assert contents(8) == contents(8)


def test_the_seed_and_the_state_are_noted_at_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLKLOOM_SEED", raising=False)

    def fails_in_the_second() -> None:
        with power_cut("64K") as disk:
            seeds.append(disk.seed)
            disk.device.pwrite(b"a" * BLOCK, 0)
            for state in disk.states(2):
                paths.append(state.path)
                assert state.number != 2

    seeds: list[int] = []
    paths: list[Path] = []
    with pytest.raises(AssertionError) as info:
        fails_in_the_second()
    assert info.value.__notes__ == [
        f"power_cut: seed {seeds[0]}, state 2; to repeat: seed={seeds[0]}, or BLKLOOM_SEED={seeds[0]}"
    ]
    assert not any(path.parent.exists() for path in paths)


def test_the_states_of_a_loop_that_is_left_are_removed() -> None:
    with power_cut("64K") as disk:
        disk.device.pwrite(b"a" * BLOCK, 0)
        states = disk.states()
        state = next(states)
        state.device.pread(BLOCK, 0)
    assert state.device.closed
    assert not state.path.parent.exists()


def test_a_disk_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "with blanks"
    path.write_bytes(bytes(1 << 20))
    with power_cut(path) as disk:
        disk.device.pwrite(b"flushed", 0)
        disk.device.flush()
        disk.device.pwrite(b"lost", 1 << 16)
    assert path.read_bytes() == b"flushed".ljust(1 << 20, b"\0")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lower": "nonsense"}, "'nonsense' is not a size"),
        ({"lower": 1000}, "a disk of 1000 bytes"),
        ({"seed": -1}, "'-1' is no seed"),
        ({"block": 7}, "must be 512, 1024, 2048 or 4096"),
        ({"on_full": "flush"}, "must be wait or fail"),
    ],
)
def test_wrong_arguments_of_a_power_cut_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises((TableError, UsageError), match=words), power_cut(**arguments):  # type: ignore[arg-type]
        pass


def test_a_wrong_seed_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLKLOOM_SEED", "x")
    with pytest.raises(UsageError, match="BLKLOOM_SEED: 'x' is no seed"), power_cut():
        pass


# flaky_disk


def test_a_flaky_disk_fails_with_its_probability() -> None:
    with flaky_disk("1M", probability=0.2, operations=["read"], error=errno.ETIMEDOUT, seed=1) as disk:
        found = [failed(lambda: disk.device.pread(BLOCK, 0)) for _ in range(200)]
        assert set(found) == {0, errno.ETIMEDOUT}
        assert not any(failed(lambda: disk.device.pwrite(b"a", 0)) for _ in range(200))
        disk.stop_failing()
        assert not any(failed(lambda: disk.device.pread(BLOCK, 0)) for _ in range(200))
        disk.start_failing()
        assert [failed(lambda: disk.device.pread(BLOCK, 0)) for _ in range(200)] == found


def test_a_flaky_disk_keeps_its_contents_while_it_begins_to_fail() -> None:
    with flaky_disk("1M", probability=1, failing=False) as disk:
        disk.device.pwrite(b"good", 0)
        disk.start_failing()
        calls = (lambda: disk.device.pread(4, 0), lambda: disk.device.pwrite(b"bad", 0), disk.device.flush)
        assert [failed(call) for call in calls] == [errno.EIO] * 3
        disk.stop_failing()
        assert disk.device.pread(4, 0) == b"good"


@pytest.mark.parametrize(
    ("operations", "read", "write"),
    [(("read",), errno.EIO, 0), (("write", "flush", "discard", "write_zeroes"), 0, errno.EIO), (None, 5, 5)],
)
def test_a_flaky_disk_may_be_down_for_some_seconds(operations: tuple[str, ...] | None, read: int, write: int) -> None:
    more = {} if operations is None else {"operations": operations}
    with flaky_disk("1M", up=0, down=3600, **more) as disk:  # type: ignore[arg-type]
        assert failed(lambda: disk.device.pread(4, 0)) == read
        assert failed(lambda: disk.device.pwrite(b"a", 0)) == write
    with flaky_disk("1M", up=3600, down=1, **more) as disk:  # type: ignore[arg-type]
        disk.device.pwrite(b"a", 0)
        assert disk.device.pread(1, 0) == b"a"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"probability": 2}, "probability: 2"),
        ({"operations": ["trim"]}, "operations:.*'trim'.*give one or more of read, write"),
        ({"error": 99999}, "99999 is no error number"),
        ({"down": 1, "error": errno.ENOSPC}, "fails with EIO"),
        ({"down": 1, "operations": ["write"]}, "cannot fail only write"),
    ],
)
def test_wrong_arguments_of_a_flaky_disk_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words), flaky_disk(**arguments):  # type: ignore[arg-type]
        pass


# slow_disk


def test_requests_to_a_slow_disk_wait() -> None:
    with slow_disk("1M", write_ms=3_600_000) as disk, Calls() as call:
        write = call(disk.device.pwrite, b"a", 0)
        while disk.status != "0 1 0":
            assert not write.done()
        assert disk.device.pread(1, 0) == b"\0"
        disk.set_delays()
        assert write.result(PATIENCE) == 1


def test_the_limits_of_a_slow_disk_may_change() -> None:
    with slow_disk("1M", iops=1, burst=0) as disk:
        disk.device.pwrite(b"a", 0)
        disk.set_limits(bps="1T")
        for _ in range(1000):  # a second each otherwise
            disk.device.pwrite(b"a", 0)
        with pytest.raises(UsageError, match="unknown limit 'bpm=1'"):
            disk.set_limits(bpm=1)


# full_disk


def test_a_full_disk_has_no_space_for_more() -> None:
    with full_disk("1M", space="16K") as disk:
        for number in (0, 10, 20):
            disk.device.pwrite(b"a" * BLOCK, number * BLOCK)
        assert failed(lambda: disk.device.pwrite(b"b" * 2 * BLOCK, 30 * BLOCK)) == errno.ENOSPC
        disk.device.pwrite(b"c", 31 * BLOCK)
        assert disk.used == 4 * BLOCK
        assert failed(lambda: disk.device.write_zeroes(40 * BLOCK, 1)) == errno.ENOSPC
        disk.device.pwrite(b"d" * BLOCK, 10 * BLOCK)
        disk.device.flush()
        assert disk.device.pread(BLOCK, 30 * BLOCK) == bytes(BLOCK)
        disk.device.discard(10 * BLOCK, BLOCK)
        disk.device.pwrite(b"e", 50 * BLOCK)
        assert failed(lambda: disk.device.pwrite(b"f", 60 * BLOCK)) == errno.ENOSPC
        disk.set_space("20K")
        disk.device.pwrite(b"f", 60 * BLOCK)
        assert disk.device.pread(1, 60 * BLOCK) == b"f"
        assert disk.status == f"{5 * BLOCK} {5 * BLOCK}"


def test_the_space_of_a_full_disk_is_what_a_model_counts() -> None:
    chance = random.Random(18)
    with full_disk("256K", space="100K") as disk:
        used: set[int] = set()
        for _ in range(500):
            offset = chance.randrange(disk.size)
            length = chance.randrange(1, min(20_000, disk.size - offset + 1))
            if chance.random() < 0.2:
                disk.device.discard(offset, length)
                used -= {block for block in used if offset <= block * BLOCK and (block + 1) * BLOCK <= offset + length}
                continue
            needed = {at // BLOCK for at in range(offset, offset + length)}
            fits = len(used | needed) <= 25 or needed <= used
            assert failed(partial(disk.device.pwrite, bytes(length), offset)) == (0 if fits else errno.ENOSPC)
            used |= needed if fits else set()
            assert disk.used == len(used) * BLOCK


def test_a_disk_is_served() -> None:
    with full_disk("1M", space=0) as disk, disk.served() as uri:
        assert uri.startswith("nbd+unix:///disk?socket=")
    with power_cut("1M") as disk, served(disk.device) as uri:
        assert uri.startswith("nbd+unix:///")
