"""Background repair of refcounts in an image that was not closed, with any part of them missing on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from blkloom.image.qcow2.format.header import encode_fields, parse
from blkloom.image.qcow2.write import recount
from qcow2_python_engine import Disk, Guest, check, create

KIB = 1 << 10
MIB = 1 << 20


def _crashed(folder: Path, *options: str, size: int = 4 * MIB) -> bytearray:
    """An image full of data that was not closed."""
    guest = Guest(create(folder, size, "lazy_refcounts=on", *options).read_bytes())
    guest.write(0, b"x" * (size // 2))
    guest.flush()
    return bytearray(guest.crash())


def _without_blocks(image: bytearray, first: int) -> bytes:
    """As QEMU leaves it when blocks of lazy counts had not been written: the table names none from `first` on."""
    header = parse(bytes(image[: 1 << 16]), path="")
    start = header.refcount_table_offset
    end = start + (header.refcount_table_clusters << header.cluster_bits)
    image[start + first * 8 : end] = bytes(end - start - first * 8)
    return bytes(image)


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("options", [("cluster_size=512",), ("cluster_size=512", "refcount_bits=64")])
def test_blocks_that_never_reached_the_disk_are_made_anew(tmp_path: Path, options: tuple[str, ...], first: int) -> None:
    crashed = _without_blocks(_crashed(tmp_path, *options), first)
    assert "ERROR" in check(crashed, tmp_path)
    guest = Guest(crashed)
    guest.check_all()
    assert not check(guest.crash(), tmp_path), "counts are exact, and nothing leaks"
    assert guest.read(0, 4 * MIB) == b"x" * (2 * MIB) + bytes(2 * MIB)
    guest.write(3 * MIB, b"y" * (512 * KIB))
    image = guest.close()
    assert not check(image, tmp_path)
    assert Guest(image).read(3 * MIB, 512 * KIB) == b"y" * (512 * KIB)


def test_a_table_too_short_for_what_is_in_use_is_made_longer(tmp_path: Path) -> None:
    """As if the longer one had not been named by the header yet."""
    crashed = _crashed(tmp_path, "cluster_size=512", "refcount_bits=64")
    header = parse(bytes(crashed[: 1 << 16]), path="")
    assert header.refcount_table_clusters > 1
    header = replace(header, refcount_table_clusters=1)
    crashed[: header.header_length] = encode_fields(header)
    assert "ERROR" in check(bytes(crashed), tmp_path)
    guest = Guest(bytes(crashed))
    guest.check_all()
    assert guest.image.header.refcount_table_clusters > 1
    assert not check(guest.crash(), tmp_path)
    assert guest.read(0, 2 * MIB) == b"x" * (2 * MIB)


def test_a_repair_that_fails_anywhere_is_done_by_the_next_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed = _without_blocks(_crashed(tmp_path, "cluster_size=512", "refcount_bits=64"), 2)
    steps = 0
    while True:
        disk = Disk(bytearray(crashed), fails=steps)
        with monkeypatch.context() as patch:
            patch.setattr("qcow2_python_engine.Disk", lambda data, disk=disk: disk)
            guest = Guest(crashed)
            guest.check_all()
            if not guest.image.needs_repair:
                break
        again = Guest(bytes(disk.data))
        again.check_all()
        assert not check(again.crash(), tmp_path), f"step {steps}"
        steps += 1
    assert steps > 5


def test_counts_are_not_all_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = _crashed(tmp_path, "cluster_size=512", "refcount_bits=64")
    monkeypatch.setattr(recount, "_HELD", 4 * 512)
    for image in (bytes(crashed), _without_blocks(crashed, 0)):
        guest = Guest(image)
        most = 0
        while guest.writer.work():
            most = max(most, guest.writer._refcounts.held)
        assert most <= 8 * 512
        assert not check(guest.crash(), tmp_path)
