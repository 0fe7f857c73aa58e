"""Targets that treat requests by a filter of the engine: delay, dust, error, flakey, pause, throttle; and unstriped."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import blkloom
from async_target import PATIENCE, Calls
from blkloom.errors import TableError, UsageError
from blkloom.table.printing import format_table
from blkloom.units import Sectors

SECTOR = 512
SIZE = 256 << 10
SECTORS = SIZE // SECTOR
CONTENT = random.Random(18).randbytes(SIZE)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def device(disk: Path) -> Iterator[Callable[[str], blkloom.Device]]:
    """Opens devices; `@` in a table is the disk."""
    devices = []

    def opened(table: str) -> blkloom.Device:
        devices.append(blkloom.open(table.replace("@", str(disk))))
        return devices[-1]

    yield opened
    for one in devices:
        one.close()


def refused(call: Callable[[], object], number: int = errno.EIO) -> bool:
    try:
        call()
    except OSError as error:
        return error.errno == number
    return False


def say(device: blkloom.Device, text: str) -> str | None:
    return device.message(Sectors(0), text.split())


def status(device: blkloom.Device) -> str:
    return device.status()[0][3]


# delay


def test_a_delay_counts_what_waits(device: Callable[[str], blkloom.Device]) -> None:
    slow = device(f"0 {SECTORS} delay @ 0 0 @ 0 3600000 @ 0 0")
    assert status(slow) == "0 0 0"
    with Calls() as call:
        waiting = [call(slow.pwrite, b"w" * SECTOR, number * SECTOR) for number in range(3)]
        while status(slow) != "0 3 0":
            assert not any(one.done() for one in waiting)
        slow.load(blkloom.parse_table(f"0 {SECTORS} zero", targets=blkloom.builtin_targets()))
        slow.resume()  # with another table, so that they wait no longer
        assert [one.result(PATIENCE) for one in waiting] == [SECTOR] * 3


def test_a_durable_write_does_not_wait_as_a_flush(device: Callable[[str], blkloom.Device], disk: Path) -> None:
    slow = device(f"0 {SECTORS} delay @ 0 0 @ 0 0 @ 0 3600000")
    with Calls() as call:
        assert call(lambda: slow.pwrite(b"w" * SECTOR, 0, fua=True)).result(PATIENCE) == SECTOR
        slow.close(flush=False)
    assert disk.read_bytes()[:SECTOR] == b"w" * SECTOR


@pytest.mark.parametrize("count", [0, 1, 2, 4, 7, 10])
def test_a_delay_has_three_arguments_for_each_class(device: Callable[[str], blkloom.Device], count: int) -> None:
    words = ["@", "0", "1"] * 4
    with pytest.raises(TableError, match="Requires exactly 3, 6 or 9 arguments"):
        device(f"0 {SECTORS} delay {' '.join(words[:count])}")


# unstriped


def test_unstriped_is_the_inverse_of_striped(disk: Path, tmp_path: Path) -> None:
    stripes = [tmp_path / str(number) for number in range(3)]
    for stripe in stripes:
        stripe.write_bytes(os.urandom(SIZE // 8))
    size = 3 * (SIZE // 8) // SECTOR // 24 * 24
    legs = " ".join(f"{stripe} 0" for stripe in stripes)
    with blkloom.open(f"0 {size} striped 3 8 {legs}", read_only=True) as striped:
        disk.write_bytes(striped.pread(size * SECTOR, 0))
    for number, stripe in enumerate(stripes):
        table = f"0 {size // 3} unstriped 3 8 {number} {disk} 0"
        with blkloom.open(table, read_only=True) as one:
            assert one.pread(one.size, 0) == stripe.read_bytes()[: one.size]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("2 8 2 @ 0", "Unstripe set to stripe greater than or equal to number of stripes"),
        ("0 8 0 @ 0", "must be from 1"),
        ("2 0 0 @ 0", "must be from 1"),
        ("2 7 0 @ 0", "Target length not divisible by chunk size"),
        ("200 8 0 @ 0", "too small for target"),
    ],
)
def test_unstriped_refuses_what_does_not_fit(
    device: Callable[[str], blkloom.Device], arguments: str, words: str
) -> None:
    with pytest.raises(TableError, match=words):
        device(f"0 {SECTORS // 2} unstriped {arguments}")


# flakey


def test_flakey_without_features_fails_all_while_down(device: Callable[[str], blkloom.Device]) -> None:
    down = device(f"0 {SECTORS} flakey @ 0 0 9")
    assert format_table(down.table).rstrip().endswith(" 0 9 2 error_reads error_writes")
    calls = (
        lambda: down.pread(SECTOR, 0),
        lambda: down.pwrite(CONTENT[:SECTOR], 0),
        lambda: down.write_zeroes(0, SECTOR),
        lambda: down.discard(0, SECTOR),
        down.flush,
    )
    assert all(refused(call) for call in calls)
    down.suspend()  # does not fail, so that another table can take its place
    down.load(blkloom.parse_table(f"0 {SECTORS} zero", targets=blkloom.builtin_targets()))
    down.resume()
    assert down.pread(SECTOR, 0) == bytes(SECTOR)


def test_flakey_is_up_in_the_up_interval(device: Callable[[str], blkloom.Device]) -> None:
    up = device(f"0 {SECTORS} flakey @ 0 4294967295 0 1 drop_writes")
    up.pwrite(b"w" * SECTOR, 0)
    up.flush()
    assert up.pread(SECTOR, 0) == b"w" * SECTOR


def test_flakey_drops_writes(device: Callable[[str], blkloom.Device], disk: Path) -> None:
    dropping = device(f"0 {SECTORS} flakey @ 0 0 9 1 drop_writes")
    dropping.pwrite(b"w" * SECTOR, 0, fua=True)
    dropping.write_zeroes(0, SECTOR)
    dropping.discard(0, SECTOR)
    dropping.flush()
    assert dropping.pread(SIZE, 0) == CONTENT
    assert disk.read_bytes() == CONTENT


def test_flakey_fails_only_reads_or_only_writes(device: Callable[[str], blkloom.Device]) -> None:
    reads = device("0 64 flakey @ 0 0 9 1 error_reads")
    reads.pwrite(CONTENT[:SECTOR], 0)
    reads.flush()
    assert refused(lambda: reads.pread(SECTOR, 0))
    reads.close()
    writes = device("0 64 flakey @ 0 0 9 1 error_writes")
    assert writes.pread(SECTOR, 0) == CONTENT[:SECTOR]
    assert refused(lambda: writes.pwrite(CONTENT[:SECTOR], 0))
    assert refused(writes.flush)


def test_flakey_changes_one_byte(device: Callable[[str], blkloom.Device], disk: Path) -> None:
    reads = device(f"0 {SECTORS} flakey @ 0 0 9 5 corrupt_bio_byte 3 r {CONTENT[2] ^ 1} 0")
    expected = bytearray(CONTENT[:4096])
    expected[2] ^= 1
    assert reads.pread(4096, 0) == expected
    reads.close()
    writes = device(f"0 {SECTORS} flakey @ 0 0 9 5 corrupt_bio_byte 512 w 7 0")
    writes.pwrite(b"w" * 1024, 0)
    writes.flush()
    assert writes.pread(1024, 0) == b"w" * 511 + b"\7" + b"w" * 512
    assert disk.read_bytes()[1024:] == CONTENT[1024:]


def test_flakey_changes_random_bytes_with_a_probability(device: Callable[[str], blkloom.Device]) -> None:
    corrupting = device(f"0 {SECTORS} flakey @ 0 0 9 2 random_read_corrupt 500000000")
    read = [corrupting.pread(SIZE, 0) for _ in range(200)]
    changed = [data for data in read if data != CONTENT]
    assert 0 < len(changed) < len(read)
    assert all(sum(a != b for a, b in zip(data, CONTENT, strict=True)) == 1 for data in changed[:3])


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ("0 0", "Total .up . down. interval is zero"),
        ("4294967295 1", "Interval overflow"),
        ("1 1 1", "Insufficient feature arguments"),
        ("1 1 1 drop", "Unrecognised flakey feature requested"),
        ("1 1 2 drop_writes drop_writes", "duplicated"),
        ("1 1 2 drop_writes error_writes", "drop_writes is incompatible with error_writes"),
        ("1 1 6 drop_writes corrupt_bio_byte 1 w 1 0", "drop_writes is incompatible with corruption of writes"),
        ("1 1 3 error_reads random_read_corrupt 1", "error_reads is incompatible with corruption of reads"),
        ("1 1 5 corrupt_bio_byte 0 r 1 0", "must be from 1"),
        ("1 1 5 corrupt_bio_byte 1 x 1 0", "Invalid corrupt bio direction"),
        ("1 1 5 corrupt_bio_byte 1 r 256 0", "must be from 0 to 255"),
        ("1 1 2 random_read_corrupt 1000000001", "must be from 0 to 1000000000"),
        ("1 1 1 random_read_corrupt", "requires parameters"),
    ],
)
def test_flakey_refuses_features_that_make_no_sense(
    device: Callable[[str], blkloom.Device], features: str, words: str
) -> None:
    with pytest.raises(TableError, match=words):
        device(f"0 {SECTORS} flakey @ 0 {features}")


# dust


def test_dust_fails_reads_of_bad_blocks_until_they_are_written(device: Callable[[str], blkloom.Device]) -> None:
    dust = device(f"0 {SECTORS} dust @ 0 1024")
    assert say(dust, "countbadblocks") == "countbadblocks: 0 badblock(s) found"
    assert say(dust, "clearbadblocks") == "clearbadblocks: no badblocks found"
    for block in (60, 67, 72, 200):
        say(dust, f"addbadblock {block}")
    assert dust.pread(SIZE, 0) == CONTENT  # not enabled
    assert status(dust).split(" ")[1:] == ["bypass", "verbose"]
    say(dust, "enable")
    say(dust, "quiet")
    assert status(dust).split(" ")[1:] == ["fail_read_on_bad_block", "quiet"]
    assert say(dust, "listbadblocks") == "60\n67\n72\n200"
    assert refused(lambda: dust.pread(SIZE, 0))
    assert dust.pread(60 * 1024, 0) == CONTENT[: 60 * 1024]
    assert refused(lambda: dust.pread(SECTOR, 60 * 1024))
    assert say(dust, "queryblock 60") == "queryblock: block 60 found in badblocklist"
    dust.pwrite(CONTENT[60 * 1024 : 60 * 1024 + SECTOR], 60 * 1024)
    assert say(dust, "queryblock 60") == "queryblock: block 60 not found in badblocklist"
    dust.pwrite(CONTENT[64 * 1024 : 80 * 1024], 64 * 1024)
    assert say(dust, "listbadblocks") == "200"
    say(dust, "removebadblock 200")
    assert say(dust, "listbadblocks") == "No blocks in badblocklist"
    assert dust.pread(SIZE, 0) == CONTENT


def test_dust_fails_some_writes_first(device: Callable[[str], blkloom.Device]) -> None:
    dust = device(f"0 {SECTORS} dust @ 0 512")
    say(dust, "addbadblock 3 2")
    say(dust, "enable")
    for _ in range(2):
        assert refused(lambda: dust.pwrite(b"w" * SECTOR, 3 * SECTOR))
        assert refused(lambda: dust.pread(SECTOR, 3 * SECTOR))
    dust.pwrite(b"w" * SECTOR, 3 * SECTOR)
    assert dust.pread(SECTOR, 3 * SECTOR) == b"w" * SECTOR


def test_dust_counts_blocks_from_the_start_of_the_lower_device(device: Callable[[str], blkloom.Device]) -> None:
    dust = device("0 64 dust @ 16 4096")
    say(dust, "addbadblock 2")
    say(dust, "enable")
    assert refused(lambda: dust.pread(4096, 0))
    assert dust.pread(4096, 4096) == CONTENT[3 * 4096 : 4 * 4096]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("addbadblock", "unrecognized message"),
        ("addbadblock x", "is no block number"),
        ("addbadblock 512", "out of range"),
        ("addbadblock 1 256", "write fail count out of range"),
        ("addbadblock 7", "already in badblocklist"),
        ("removebadblock 1", "not found in badblocklist"),
        ("unknown", "unrecognized message"),
    ],
)
def test_dust_refuses_wrong_messages(device: Callable[[str], blkloom.Device], message: str, words: str) -> None:
    dust = device(f"0 {SECTORS} dust @ 0 512")
    say(dust, "addbadblock 7")
    with pytest.raises(UsageError, match=words):
        say(dust, message)
    assert say(dust, "listbadblocks") == "7"


@pytest.mark.parametrize("size", ["0", "511", "1000", "2147483648", "524288"])
def test_dust_refuses_block_sizes(device: Callable[[str], blkloom.Device], size: str) -> None:
    with pytest.raises(TableError):
        device(f"0 {SECTORS} dust @ 0 {size}")


# error


def test_error_selects_requests(device: Callable[[str], blkloom.Device]) -> None:
    failing = device(f"0 {SECTORS} error @ 0 4 range=8+8 range=12+8 operations=write+flush errno=ENOSPC")
    assert failing.pread(SIZE, 0) == CONTENT
    failing.pwrite(CONTENT[: 8 * SECTOR], 0)
    failing.pwrite(CONTENT[20 * SECTOR :], 20 * SECTOR)
    assert refused(lambda: failing.pwrite(b"w" * SECTOR, 8 * SECTOR), errno.ENOSPC)
    assert refused(lambda: failing.pwrite(b"w" * SECTOR, 19 * SECTOR), errno.ENOSPC)
    assert refused(failing.flush, errno.ENOSPC)


def test_error_with_a_probability_and_a_seed_fails_the_same_requests_again(
    device: Callable[[str], blkloom.Device],
) -> None:
    def failed() -> list[bool]:
        failing = device("0 64 error 3 probability=0.25 operations=read seed=7")
        found = []
        for _ in range(400):
            try:
                assert failing.pread(SECTOR, 0) == bytes(SECTOR)
                found.append(False)
            except OSError:
                found.append(True)
        failing.pwrite(b"w" * SECTOR, 0)
        return found

    first = failed()
    assert first == failed()
    assert 50 < sum(first) < 150  # 100 on average; 6 standard deviations


def test_error_without_features_fails_everything(device: Callable[[str], blkloom.Device]) -> None:
    for table in ("0 64 error", "0 64 error @ 0", "0 64 error 0", "0 64 error 1 errno=EIO"):
        failing = device(table)
        assert refused(lambda: failing.pread(SECTOR, 0))  # noqa: B023  called at once
        assert refused(lambda: failing.pwrite(bytes(SECTOR), 0))  # noqa: B023  called at once


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("1 probability=1.1", "must be from 0 to 1"),
        ("1 probability=nan", "must be from 0 to 1"),
        ("1 probability=0.0000000001", "at most 9 decimal places"),
        ("1 operations=read+move", "must be one or more of"),
        ("1 errno=ENOTHING", "must be the name of an error"),
        ("1 range=8", "<first sector>.<number of sectors>"),
        ("1 range=0+513", "range past the end of the segment"),
        ("1 seed=-1", "must be a whole number"),
        ("@ 1 1 probability=0.5", "too small for target"),
    ],
)
def test_error_refuses_wrong_features(device: Callable[[str], blkloom.Device], arguments: str, words: str) -> None:
    with pytest.raises(TableError, match=words):
        device(f"0 {SECTORS} error {arguments}")


# throttle


def test_a_throttle_makes_what_exceeds_the_limit_wait(device: Callable[[str], blkloom.Device]) -> None:
    slow = device(f"0 {SECTORS} throttle @ 0 3 iops_wr=1 bps_rd=1g burst=0")
    slow.pwrite(b"w" * SECTOR, 0)
    with Calls() as call:
        waiting = call(slow.pwrite, b"w" * SECTOR, 0)
        while not status(slow).startswith("1 "):
            assert not waiting.done()
        assert status(slow) == "1 iops_wr=1 bps_rd=1073741824 burst=0"
        assert slow.pread(SECTOR, SECTOR) == CONTENT[SECTOR : 2 * SECTOR]
        assert waiting.result(PATIENCE) == SECTOR


def test_limits_change_by_a_message(device: Callable[[str], blkloom.Device]) -> None:
    slow = device(f"0 {SECTORS} throttle @ 0")
    assert status(slow) == "0"
    say(slow, "set bps=1m iops=7")
    assert status(slow) == "0 iops=7 bps=1048576"
    say(slow, "set")
    assert status(slow) == "0"
    for message, words in (("get", "unrecognized"), ("set x=1", "unknown limit"), ("set iops=0", "from 1 to")):
        with pytest.raises(UsageError, match=words):
            say(slow, message)


# pause


def test_paused_requests_wait_for_the_message(device: Callable[[str], blkloom.Device]) -> None:
    paused = device(f"0 {SECTORS} pause @ 0")
    assert status(paused) == "running 0"
    say(paused, "pause writes")
    assert paused.pread(SECTOR, SECTOR) == CONTENT[SECTOR : 2 * SECTOR]
    with Calls() as call:
        write, zeroes = call(paused.pwrite, b"w" * SECTOR, 0), call(paused.write_zeroes, 4096, SECTOR)
        while status(paused) != "paused_writes 2":
            assert not write.done()
        say(paused, "pause")
        read = call(paused.pread, SECTOR, 0)
        while status(paused) != "paused 3":
            assert not read.done()
        paused.suspend()  # waits for none of them
        paused.resume()
        assert status(paused).startswith("paused ")
        assert not any(one.done() for one in (write, zeroes, read))
        say(paused, "resume")
        assert write.result(PATIENCE) == SECTOR
        zeroes.result(PATIENCE)
        read.result(PATIENCE)
    assert paused.pread(SECTOR, 0) == b"w" * SECTOR
    with pytest.raises(UsageError, match="unrecognized message"):
        say(paused, "stop")


def test_a_table_may_begin_paused(device: Callable[[str], blkloom.Device]) -> None:
    paused = device(f"0 {SECTORS} pause @ 0 1 paused_reads")
    assert status(paused) == "paused_reads 0"
    paused.pwrite(b"w" * SECTOR, 0)
