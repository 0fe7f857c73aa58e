"""Background check of tables while an image is written to: no request waits for it, free clusters inside the file are
not used before its end, and refcounts are exact afterwards.
"""

from __future__ import annotations

import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.format.header import Incompatible, encode_fields, parse
from blkloom.image.qcow2.write import background_check, recount
from blkloom.image.qcow2.write.writer import Options
from qcow2.slow_image import SlowImage
from qcow2_python_engine import Disk, Guest, check, create

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 512
SIZE = 256 * KIB
"""Eight L2 tables of clusters of 512 bytes."""


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One table a step, 256 clusters a window."""
    monkeypatch.setattr(recount, "_STEP", 1)
    monkeypatch.setattr(recount, "_WINDOW", 256)
    monkeypatch.setattr(background_check, "_BLOCKS", 1)


def _image(folder: Path, *options: str, snapshot: bool = False) -> tuple[bytearray, bytes]:
    """An image and what a guest reads of it; half full, with gaps."""
    path = create(folder, SIZE, "cluster_size=512", *options)
    dice = random.Random(1)
    content = bytearray(SIZE)
    for number in range(40):
        if snapshot and number == 20:
            subprocess.run(["qemu-img", "snapshot", "-c", "then", str(path)], check=True)
        at, length = dice.randrange(SIZE // CLUSTER) * CLUSTER, dice.randint(1, 8) * CLUSTER
        length = min(length, SIZE - at)
        words = ["-c", f"write -P {number + 1} {at} {length}"]
        content[at : at + length] = bytes([number + 1]) * length
        if number % 5 == 0:
            words += ["-c", f"discard {at} {CLUSTER}"]
            content[at : at + CLUSTER] = bytes(CLUSTER)
        subprocess.run(["qemu-io", "-f", "qcow2", *words, str(path)], check=True, capture_output=True)
    return bytearray(path.read_bytes()), bytes(content)


def _dirty(image: bytearray) -> bytearray:
    header = parse(bytes(image[:CLUSTER]), path="")
    header = replace(header, incompatible=header.incompatible | Incompatible.DIRTY)
    return bytearray(encode_fields(header) + bytes(image[header.header_length :]))


def _blocks(image: bytearray) -> list[int]:
    header = parse(bytes(image[:CLUSTER]), path="")
    end = header.refcount_table_offset + (header.refcount_table_clusters << header.cluster_bits)
    words = [image[at : at + 8] for at in range(header.refcount_table_offset, end, 8)]
    return [int.from_bytes(word, "big") for word in words if any(word)]


def _lower(image: bytearray) -> None:
    """Every other refcount is 0, but those of the first clusters."""
    for block in _blocks(image):
        for at in range(block, block + CLUSTER, 4):
            image[at : at + 2] = bytes(2)


def _higher(image: bytearray) -> None:
    for block in _blocks(image):
        for at in range(block, block + CLUSTER, 6):
            image[at : at + 2] = b"\0\7"


def _missing(image: bytearray) -> None:
    header = parse(bytes(image[:CLUSTER]), path="")
    start = header.refcount_table_offset
    image[start : start + CLUSTER] = bytes(CLUSTER)


def _nothing(image: bytearray) -> None:
    pass


HARMS = {"right": _nothing, "too low": _lower, "too high": _higher, "missing": _missing}


class _CountingDisk(Disk):
    """reads: how many there were."""

    reads = 0

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        return super().read(offset, length)


def _at_work(guest: Guest, content: bytearray, seed: int, *, whole: bool = True, most: int = 400) -> None:
    """A request between any two steps, until all is checked; of a whole image each leaves it so."""
    dice = random.Random(seed)
    for number in range(most):
        if not guest.writer.checking and number > 30:
            break
        at = dice.randrange(SIZE // CLUSTER) * CLUSTER
        length = min(dice.randint(1, 6) * CLUSTER, SIZE - at)
        kind = dice.choice(["write", "write", "discard", "zero", "flush"])
        if kind == "write":
            data = bytes([number & 0x7F | 0x80]) * length
            guest.write(at, data)
            content[at : at + length] = data
        elif kind == "discard":
            guest.writer.discard(at, length)
            content[at : at + length] = bytes(length)
        elif kind == "zero":
            guest.writer.write_zeroes(at, length, may_unmap=number % 2 == 0)
            content[at : at + length] = bytes(length)
        else:
            guest.flush()
        guest.writer.work()
        if whole:
            found = SlowImage(guest.crash()).check()
            assert not found.corruptions, f"request {number}: {found.corruptions[:3]}"
    guest.check_all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("snapshot", [False, True], ids=["alone", "snapshot"])
@pytest.mark.parametrize("harm", HARMS)
def test_an_image_that_was_not_closed_is_counted_while_it_is_written_to(
    tmp_path: Path, harm: str, snapshot: bool, seed: int
) -> None:
    image, before = _image(tmp_path, "lazy_refcounts=on" if seed == 1 else "lazy_refcounts=off", snapshot=snapshot)
    image = _dirty(image)
    HARMS[harm](image)
    content = bytearray(before)
    changed: list[int] = []
    guest = Guest(bytes(image), options=Options(preallocate=4 * KIB), checked=changed.append)
    assert guest.writer.checking
    _at_work(guest, content, seed, whole=harm == "right")
    assert not guest.writer.checking
    assert [count > 0 for count in changed] == [harm != "right"], "what the guest discards meanwhile was no mistake"
    assert guest.read(0, SIZE) == content
    closed = guest.close()
    assert not check(closed, tmp_path), "counts are exact, nothing leaks, and it says that it was closed"
    assert Guest(closed).read(0, SIZE) == content


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("snapshot", [False, True], ids=["alone", "snapshot"])
def test_a_clean_image_is_looked_through_before_its_free_clusters_are_used(
    tmp_path: Path, snapshot: bool, seed: int
) -> None:
    image, before = _image(tmp_path, snapshot=snapshot)
    content = bytearray(before)
    guest = Guest(bytes(image), options=Options(preallocate=4 * KIB))
    assert not guest.writer.checking, "nothing is done for an image without writes"
    _at_work(guest, content, seed)
    assert not guest.writer.allocator.doubtful
    assert guest.read(0, SIZE) == content
    assert not check(guest.close(), tmp_path)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_clean_image_that_is_closed_before_the_end_of_it_is_exact(tmp_path: Path, steps: int) -> None:
    image, _ = _image(tmp_path)
    changed: list[int] = []
    guest = Guest(bytes(image), options=Options(preallocate=0))
    guest.writer.discard(0, SIZE // 4)
    guest.flush()  # now there are free clusters inside
    for number in range(steps):
        guest.writer.work()
        guest.writer.discard(SIZE // 4 + number * 8 * KIB, 4 * KIB)
    guest.writer.discard(SIZE // 4 * 3, SIZE // 4)
    guest.flush()
    assert guest.writer.checking
    closed = guest.close()
    assert not check(closed, tmp_path)
    again = Guest(closed, options=Options(preallocate=0), checked=changed.append)
    again.write(0, b"x" * CLUSTER)
    again.check_all()
    assert changed == [0]


def test_nothing_is_handed_out_while_it_is_not_known_whether_the_file_was_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, _ = _image(tmp_path)
    end = len(image) // CLUSTER
    index, within = divmod(end + 2, CLUSTER // 2)
    block = _blocks(image)[index]
    image[block + 2 * within : block + 2 * within + 2] = b"\0\1"
    changed: list[int] = []
    guest = Guest(bytes(image), options=Options(preallocate=0), checked=changed.append)
    with monkeypatch.context() as patch:
        patch.setattr(recount, "_MOST_WINDOWS", 0)
        for _ in range(2):
            with pytest.raises(OSError, match="too many to be counted"):
                guest.writer.allocator.take(1)
    assert guest.disk.size() == len(image)
    runs = [guest.writer.allocator.take(1).first for _ in range(8)]
    assert changed == [1]
    assert len(set(runs)) == len(runs), "none is handed out twice"


def test_what_is_handed_out_before_lies_past_the_end_and_afterwards_inside(tmp_path: Path) -> None:
    image, _ = _image(tmp_path)
    guest = Guest(bytes(image), options=Options(preallocate=0))
    end = len(image) // CLUSTER
    guest.write(0, b"x" * CLUSTER)
    first = guest.writer.allocator.take(1).first
    assert first >= end
    guest.check_all()
    assert guest.writer.allocator.take(1).first < end


@pytest.mark.parametrize("harm", HARMS)
def test_the_first_write_reads_no_more_of_a_larger_image_that_was_not_closed(
    tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    for tables in (4, 64):
        path = create(tmp_path, tables * 32 * KIB, "cluster_size=512", "refcount_bits=64", name=f"disk{tables}")
        words = ["-c", f"write -P 7 0 {tables * 32 * KIB - 4 * KIB}"]
        subprocess.run(["qemu-io", "-f", "qcow2", *words, str(path)], check=True, capture_output=True)
        image = _dirty(bytearray(path.read_bytes()))
        HARMS[harm](image)
        with monkeypatch.context() as patch:
            patch.setattr("qcow2_python_engine.Disk", _CountingDisk)
            guest = Guest(bytes(image), options=Options(preallocate=0))
            guest.write(tables * 32 * KIB - CLUSTER, b"x" * CLUSTER)
            assert isinstance(guest.disk, _CountingDisk)
            reads.append(guest.disk.reads)
    assert reads[1] < reads[0] + 4, "60 tables more, and their blocks, wait"


def test_a_table_that_names_what_was_handed_out_meanwhile_is_found(tmp_path: Path) -> None:
    path = create(tmp_path, SIZE, "cluster_size=512")
    words = ["-c", "write -P 1 0 4k", "-c", "write -P 2 128k 4k"]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(path)], check=True, capture_output=True)
    image = bytearray(path.read_bytes())
    end = len(image)
    slow = SlowImage(bytes(image))
    table = slow.l1()[4] & (1 << 56) - 512
    image[table : table + 8] = (end | 1 << 63).to_bytes(8, "big")
    guest = Guest(bytes(image), options=Options(preallocate=0))
    guest.write(8 * KIB, b"x" * (4 * CLUSTER))
    assert guest.disk.size() > end
    with pytest.raises(OSError, match="past the end the file had"):
        guest.write(128 * KIB, b"y" * CLUSTER)
    assert guest.read(8 * KIB, 4 * CLUSTER) == b"x" * (4 * CLUSTER), "it was not overwritten"


def test_a_cluster_in_use_that_nothing_counts_is_found_wherever_it_is(tmp_path: Path) -> None:
    """Also in a table that no request meets."""
    image, content = _image(tmp_path)
    slow = SlowImage(bytes(image))
    used = max(entry for entry in (slow.l2_entry(slow.l1(), n)[0] & (1 << 56) - 512 for n in range(256, 512)))
    index, within = divmod(used // CLUSTER, CLUSTER // 2)
    block = _blocks(image)[index]
    image[block + 2 * within : block + 2 * within + 2] = bytes(2)
    guest = Guest(bytes(image), options=Options(preallocate=64 * KIB))
    guest.write(0, b"x" * CLUSTER)
    with pytest.raises(CorruptImage, match=f"{used:#x}.* free by its refcount"):
        guest.check_all()
    assert parse(guest.crash()[:CLUSTER], path="").incompatible & Incompatible.CORRUPT
    assert guest.read(CLUSTER, SIZE - CLUSTER) == content[CLUSTER:], "nothing was harmed"


def test_a_large_image_that_is_closed_early_stays_unfinished_and_the_next_session_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_check, "_LAST_STEPS", 3)
    image, before = _image(tmp_path)
    image = _dirty(image)
    _lower(image)
    guest = Guest(bytes(image))
    guest.write(0, b"x" * CLUSTER)
    closed = guest.close()
    assert parse(closed[:CLUSTER], path="").incompatible & Incompatible.DIRTY
    again = Guest(closed)
    again.check_all()
    closed = again.close()
    assert not check(closed, tmp_path)
    assert Guest(closed).read(0, SIZE) == b"x" * CLUSTER + before[CLUSTER:]
