"""Images written by blkloom, checked by QEMU: both run the same commands, and each reads the images of the other."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import blkloom

pytestmark = pytest.mark.usefixtures("qemu_tools")

KIB = 1 << 10
MIB = 1 << 20
KINDS = {
    "default": [],
    "version 2": ["compat=0.10"],
    "small clusters": ["cluster_size=512", "refcount_bits=64"],
    "large clusters": ["cluster_size=2M", "refcount_bits=1"],
    "extended": ["extended_l2=on"],
    "lazy": ["lazy_refcounts=on"],
    "preallocated": ["preallocation=metadata"],
}


def _qemu_img(*words: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True).stdout


def _create(path: Path, size: int, options: list[str], backing: Path | None = None) -> None:
    words: list[str | Path] = ["-o", ",".join(options)] if options else []
    words += ["-b", backing, "-F", "raw"] if backing else []
    _qemu_img("create", "-q", "-f", "qcow2", *words, path, str(size))


def _commands(size: int, seed: int) -> list[tuple[str, int, int, int]]:
    """(verb, offset, length, byte)."""
    dice = random.Random(seed)
    found = []
    for number in range(40):
        verb = dice.choice(["write"] * 5 + ["zero", "unmap", "discard"])
        at = dice.randrange(size // 512) * 512
        length = min(dice.choice([512, 4 * KIB, 64 * KIB, 100 * KIB, 700 * KIB]), size - at)
        found.append((verb, at, length, number + 1))
    return found


def _by_qemu(path: Path, commands: list[tuple[str, int, int, int]]) -> None:
    words = []
    for verb, at, length, byte in commands:
        flag = {"write": f"-P {byte}", "zero": "-z", "unmap": "-z -u", "discard": ""}[verb]
        words += ["-c", f"{'discard' if verb == 'discard' else 'write'} {flag} {at} {length}"]
    subprocess.run(["qemu-io", "-d", "unmap", *words, path], check=True, capture_output=True)


def _by_us(path: Path, size: int, commands: list[tuple[str, int, int, int]], *options: str) -> None:
    count = f" {len(options)} {' '.join(options)}" if options else ""
    with blkloom.open(f"0 {size // 512} qcow2 {path}{count}") as device:
        for verb, at, length, byte in commands:
            if verb == "write":
                device.pwrite(bytes([byte]) * length, at)
            elif verb == "discard":
                device.discard(at, length)
            else:
                device.write_zeroes(at, length, unmap=verb == "unmap")


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_commands_give_the_same_disk(tmp_path: Path, kind: str, backed: bool) -> None:
    if backed and kind == "preallocated":
        pytest.skip("QEMU preallocates no such image")
    size = 12 * MIB
    backing = tmp_path / "below.raw" if backed else None
    if backing:
        backing.write_bytes(bytes(range(1, 129)) * (64 * KIB))
    theirs, ours = tmp_path / "theirs.qcow2", tmp_path / "ours.qcow2"
    _create(theirs, size, KINDS[kind], backing)
    shutil.copy(theirs, ours)
    commands = _commands(size, seed=len(kind))
    commands = [(verb, *_whole(at, length, verb), byte) for verb, at, length, byte in commands]
    _by_qemu(theirs, commands)
    _by_us(ours, size, commands)
    _qemu_img("check", ours)
    assert "identical" in _qemu_img("compare", theirs, ours)


def _whole(at: int, length: int, verb: str) -> tuple[int, int]:
    """Discards of whole clusters of any size: what becomes of parts is everybody's own choice."""
    if verb != "discard":
        return at, length
    return at // (2 * MIB) * 2 * MIB, 2 * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_each_goes_on_with_what_the_other_wrote(tmp_path: Path, kind: str) -> None:
    size = 12 * MIB
    path, copy = tmp_path / "disk.qcow2", tmp_path / "copy.qcow2"
    _create(path, size, KINDS[kind])
    _create(copy, size, [])
    for turn in range(3):
        commands = [command for command in _commands(size, seed=turn) if command[0] != "discard"]
        (_by_us(path, size, commands) if turn % 2 else _by_qemu(path, commands))
        _by_qemu(copy, commands)
        _qemu_img("check", path)
    assert "identical" in _qemu_img("compare", path, copy)


def test_an_image_takes_no_more_space_than_one_of_qemu(tmp_path: Path) -> None:
    size = 1 << 30
    theirs, ours = tmp_path / "theirs.qcow2", tmp_path / "ours.qcow2"
    dice = random.Random(1)
    commands = [("write", dice.randrange(size // 4096) * 4096, 4096, 1 + at % 200) for at in range(200)]
    for path in (theirs, ours):
        _create(path, size, [])
    _by_qemu(theirs, commands)
    _by_us(ours, size, commands)
    _qemu_img("check", ours)
    assert ours.stat().st_blocks <= theirs.stat().st_blocks * 1.02 + 16
    mapped = [
        sum(run["length"] for run in json.loads(_qemu_img("map", "--output=json", path)) if run["data"])
        for path in (theirs, ours)
    ]
    assert mapped[1] == mapped[0], "what was given ahead was taken out again"
    assert "identical" in _qemu_img("compare", theirs, ours)


def test_discarding_everything_gives_the_space_back(tmp_path: Path) -> None:
    size = 64 * MIB
    path = tmp_path / "disk.qcow2"
    _create(path, size, [])
    with blkloom.open(f"0 {size // 512} qcow2 {path}") as device:
        for at in range(0, size, MIB):
            device.pwrite(b"x" * MIB, at)
        device.flush()
        full = path.stat().st_blocks
        device.discard(0, size)
        device.flush()
        assert path.stat().st_blocks < full // 20
        for at in range(0, size // 2, MIB):
            device.pwrite(b"y" * MIB, at)
    _qemu_img("check", path)
    assert path.stat().st_size < 40 * MIB, "freed clusters are used again, and the file's end is cut"


def test_a_bitmap_is_what_qemu_reads_over_nbd(tmp_path: Path, program: Callable[[str, str], str]) -> None:
    nbdinfo = program("nbdinfo", "libnbd-bin")
    path = tmp_path / "disk.qcow2"
    _create(path, 4 * MIB, [])
    _qemu_img("bitmap", "--add", path, "seen")
    _by_us(path, 4 * MIB, [("write", MIB, 4096, 1), ("zero", 2 * MIB, 64 * KIB, 0)])
    served = ["qemu-nbd", "-r", "-f", "qcow2", "-B", "seen", str(path)]
    command = [nbdinfo, "--map=qemu:dirty-bitmap:seen", "--", "[", *served, "]"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    dirty = [line.split()[:2] for line in said.splitlines() if line.split()[2] == "1"]
    assert dirty == [[str(MIB), str(64 * KIB)], [str(2 * MIB), str(64 * KIB)]]
