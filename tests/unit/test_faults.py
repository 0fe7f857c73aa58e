"""Faults as values, and the command line of `blkloom fault`."""

from __future__ import annotations

import subprocess
from typing import Any

import msgspec
import pytest

from blkloom import Fault, all_targets, format_table, parse_table
from blkloom.control.faults import DEVICE
from blkloom.errors import UsageError

FAULTS = {
    "fail": Fault.fail(),
    "fail --flushes": Fault.fail(["flushes"]),
    "fail --reads --writes --probability 0.1": Fault.fail(["writes", "reads"], probability=0.1),
    "fail --probability 0.000000001": Fault.fail(probability=1e-9),
    "fail --errno EROFS --range 1+2 --range 5+1 --seed 0": Fault.fail(
        ["reads", "writes", "flushes"], errno="EROFS", ranges=[(1, 2), (5, 1)], seed=0
    ),
    "slow 0ms": Fault.slow(0),
    "slow 20ms --writes": Fault.slow(20, ["writes"]),
    "throttle --iops 3 --bps 4 --reads": Fault.throttle(iops=3, bps=4, requests=["reads"]),
    "read-only": Fault.only_reads(),
    "flaky 1 2": Fault.flaky(1, 2),
    "flaky 1 2 --error-reads": Fault.flaky(1, 2, "error_reads"),
    "bad-blocks 7 9-11": Fault.bad_blocks([(7, 1), (9, 3)]),
}


@pytest.mark.parametrize("words", FAULTS)
def test_the_words_and_the_table_of_a_fault(words: str) -> None:
    fault = FAULTS[words]
    assert fault.words == words
    table = "0 64 " + " ".join("blkloom:disk-real" if word == DEVICE else word for word in fault.line)
    assert format_table(parse_table(table, targets=all_targets())) == table.removesuffix(" 0" * (words == "fail"))
    assert msgspec.json.decode(msgspec.json.encode(fault), type=Fault) == fault


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Fault.fail(["blinks"]), "'blinks' are no requests; there are reads, writes, flushes"),  # type: ignore[list-item]
        (lambda: Fault.throttle(), "give --iops, --bps or both"),
        (lambda: Fault.throttle(iops=1, requests=["flushes"]), "give --reads or --writes alone"),
        (lambda: Fault.throttle(iops=1, requests=["reads", "writes"]), "give --reads or --writes alone"),
        (lambda: Fault.bad_blocks([]), "0 bad blocks; give 1 to 4096"),
        (lambda: Fault.bad_blocks([(0, 4097)]), "4097 bad blocks; give 1 to 4096, or use fail --range"),
    ],
)
def test_a_fault_that_means_nothing_is_refused(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("disk break", "Unknown fault 'break'."),
        ("disk slow", "slow takes a time, such as 10ms"),
        ("disk slow 10m", "slow takes a time, such as 10ms or 2s"),
        ("disk slow 1ms 2ms", "slow takes a time"),
        ("disk flaky 5", "flaky takes two times in seconds"),
        ("disk off now", "off takes no arguments"),
        ("disk bad-blocks 9-3", "bad-blocks takes sectors: 8, or 100-107"),
        ("disk fail --range 5", "--range takes <first sector>+<sectors>"),
        ("disk fail --iops 5", "fail does not take --iops."),
        ("disk read-only --range 1+1", "read-only does not take --range."),
        ("disk flaky 1 1 --drop-writes --error-reads", "Only one of --error-reads"),
        ("disk throttle --bps much", "--bps takes a size, such as 1m."),
        ("disk throttle --iops -3", "--iops takes a whole number."),
        ("--reads", "An option needs a device and what becomes of it."),
    ],
)
def test_the_command_refuses(blkloom: str, arguments: str, said: str, tmp_path: Any) -> None:
    command = [blkloom, "--run-dir", str(tmp_path), "fault", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode
    assert said in done.stderr
