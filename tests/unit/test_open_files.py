"""What the kernel tells of the disk below an open file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blkloom.open_files import is_rotational


@pytest.mark.parametrize(("told", "expected"), [("1\n", True), ("0\n", False), (None, False)])
@pytest.mark.parametrize("is_partition", [False, True])
def test_a_file_is_rotational_if_its_disk_is(
    tmp_path: Path, told: str | None, expected: bool, is_partition: bool
) -> None:
    file = tmp_path / "file"
    file.touch()
    number = file.stat().st_dev
    disk = tmp_path / "sys" / "disk"
    device = disk / "partition" if is_partition else disk
    device.mkdir(parents=True)
    if told is not None:
        (disk / "queue").mkdir()
        (disk / "queue" / "rotational").write_text(told)
    numbers = tmp_path / "dev"
    numbers.mkdir()
    (numbers / f"{os.major(number)}:{os.minor(number)}").symlink_to(device)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        assert is_rotational(descriptor, sysfs=str(numbers)) is expected
    finally:
        os.close(descriptor)
